"""What PPRL leaves behind: `rollouts.jsonl`, grids of rollouts, and the state of the policies."""

import json
from pathlib import Path
from types import TracebackType

import torch
from PIL import Image
from torch import Tensor

from clvr_train.method.truncation import trace
from clvr_train.models.adapters import ADAPTERS, adapter_weights
from clvr_train.pprl.rollout import Group
from clvr_train.runtime.files import write_atomic

FILE = "rollouts.jsonl"


def policy_tensors(transformer: torch.nn.Module) -> dict[str, Tensor]:
    """The LoRA weights of all policies, for a checkpoint."""
    return {
        f"{adapter}.{name}": tensor.detach()
        for adapter in ADAPTERS
        for name, tensor in adapter_weights(transformer, adapter).items()
    }


def load_policies(transformer: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of `policy_tensors`, in place."""
    with torch.no_grad():
        for adapter in ADAPTERS:
            for name, parameter in adapter_weights(transformer, adapter).items():
                parameter.copy_(tensors[f"{adapter}.{name}"])


class RolloutRecord:
    """Appends a JSON line a rollout to `<run>/rollouts.jsonl`; on resume, lines after the checkpoint's epoch go."""

    def __init__(self, run: Path, resume_epoch: int | None) -> None:
        self._run = run
        path = run / FILE
        lines: list[str] = []
        if resume_epoch is not None and path.exists():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            lines = [line for line in whole if json.loads(line)["epoch"] <= resume_epoch]
        write_atomic(path, "".join(lines))
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "RolloutRecord":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, epoch: int, groups: list[Group], images: bool) -> None:
        """The rollouts of one epoch; with `images` also `samples/epoch-<n>.png`, a row a group, best reward first."""
        for group in groups:
            task = group.task
            for k, score in enumerate(group.scores):
                row = {
                    "epoch": epoch,
                    "trajectory": task.sample.trajectory_id,
                    "step": task.sample.step,
                    "k": k,
                    "reward": score.value,
                    "missing": score.reason,
                    "parts": score.parts,
                    "transcript": score.transcript,
                    "advantage": group.advantages[k],
                    "r": group.r[k],
                }
                if k == 0:
                    row["context"] = trace(task.sample.goal, task.sample.reasonings)
                    row["p_t2i"], row["p_i2i"] = task.prompt.p_t2i, task.prompt.p_i2i
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        if images:
            self._save_grid(epoch, groups)

    def _save_grid(self, epoch: int, groups: list[Group]) -> None:
        groups = [group for group in groups if group.images]  # those that this rank has drawn
        if not groups:
            return
        width, height = groups[0].images[0].size
        columns = max(len(group.images) for group in groups)
        grid = Image.new("RGB", (columns * (width + 2), len(groups) * (height + 2)), "white")
        for row, group in enumerate(groups):
            order = sorted(range(len(group.images)), key=lambda k: -(group.scores[k].value or 0.0))
            for column, k in enumerate(order):
                grid.paste(group.images[k], (column * (width + 2), row * (height + 2)))
        (self._run / "samples").mkdir(exist_ok=True)
        grid.save(self._run / "samples" / f"epoch-{epoch:05d}.png")
