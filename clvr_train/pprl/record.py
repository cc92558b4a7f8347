"""What PPRL leaves behind: `rollouts.jsonl`, grids of rollouts, and the state of the policies."""

import json
from collections.abc import Sequence
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
            save_grid(self._run / "samples" / f"epoch-{epoch:05d}.png", [_best_first(group) for group in groups])


def _best_first(group: Group) -> list[Image.Image]:
    """The images of a group that this rank has drawn."""
    order = sorted(range(len(group.images or ())), key=lambda k: -(group.scores[k].value or 0.0))
    return [group.images[k] for k in order]


def save_grid(file: Path, rows: Sequence[Sequence[Image.Image]]) -> None:
    """Writes images as a PNG, row by row; nothing if there are none."""
    rows = [row for row in rows if row]
    if not rows:
        return
    width, height = (max(getattr(image, side) for row in rows for image in row) for side in ("width", "height"))
    grid = Image.new("RGB", (max(map(len, rows)) * (width + 2), len(rows) * (height + 2)), "white")
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            grid.paste(image, (column * (width + 2), number * (height + 2)))
    file.parent.mkdir(exist_ok=True)
    grid.save(file)
