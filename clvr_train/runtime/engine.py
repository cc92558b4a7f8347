"""One optimiser step: AdamW, gradient clipping, a learning-rate schedule, and a guard against non-finite gradients."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from clvr_train.runtime.checkpoint import flatten_optimizer, load_latest, restore_optimizer, save_checkpoint

WEIGHTS = "model."  # what the names of the trained weights begin with in a checkpoint
SCHEDULES = ("constant", "cosine")


def lr_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by at a step (from 0): linear warm-up, then constant or cosine to 0."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Engine:
    """Owns the optimiser and the count of its steps.

    Args:
        parameters: what is trained. lr: peak learning rate. clip: largest norm of the gradient.
        max_skipped: so many non-finite gradients in a row are skipped; one more is an error.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        total_steps: int,
        schedule: str = "cosine",
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float = 1.0,
        max_skipped: int = 3,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter asks for a gradient: nothing to train")
        fused = self.parameters[0].device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=fused
        )
        self.lr, self.clip, self.max_skipped = lr, clip, max_skipped
        self.schedule, self.warmup_steps, self.total_steps = schedule, warmup_steps, total_steps
        self.steps = 0
        self.skipped = 0
        self.skipped_in_a_row = 0

    def step(self) -> dict[str, float]:
        """Updates the parameters from their gradients and clears these. A non-finite gradient changes nothing.

        Returns:
            `grad_norm` (before clipping), `lr`, and `skipped` (0 or 1).

        Raises:
            FloatingPointError: after more than `max_skipped` non-finite gradients in a row.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip).item()
        lr = self.lr * lr_factor(
            self.steps, schedule=self.schedule, warmup_steps=self.warmup_steps, total_steps=self.total_steps
        )
        finite = math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row > self.max_skipped:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} gradients in a row are not finite at optimiser step {self.steps}; "
                f"the last checkpoint is untouched: start a run with a lower learning rate than {self.lr}"
            )
        self.steps += 1
        return {"grad_norm": norm, "lr": lr, "skipped": float(not finite)}

    def save(self, folder: Path, step: int, weights: dict[str, Tensor]) -> None:
        """Writes a checkpoint of the weights, the optimiser and the counts under `step`."""
        tensors, optimizer = flatten_optimizer(self.optimizer)
        named = {f"{WEIGHTS}{name}": tensor for name, tensor in weights.items()}
        counts = {"steps": self.steps, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        # Two stay: one that the disk has damaged is noticed at resume, and then there is another.
        save_checkpoint(folder, step, named | tensors, {"optimizer": optimizer, **counts}, keep=2)

    def resume(self, folder: Path) -> tuple[int, dict[str, Tensor]] | None:
        """Takes over the newest whole checkpoint and returns its step and weights; None if there is none."""
        saved = load_latest(folder)
        if saved is None:
            return None
        step, tensors, state = saved
        restore_optimizer(self.optimizer, tensors, state["optimizer"])
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        return step, {n.removeprefix(WEIGHTS): t for n, t in tensors.items() if n.startswith(WEIGHTS)}
