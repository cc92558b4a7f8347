"""What PPRL leaves behind: `rollouts.jsonl`, grids of rollouts, and the state of the policies."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from PIL import Image
from torch import Tensor

from clvr_train.data.images import open_image
from clvr_train.method.truncation import trace
from clvr_train.models.adapters import ADAPTERS, adapter_weights
from clvr_train.pprl.rollout import Group
from clvr_train.runtime.files import write_atomic

FILE = "rollouts.jsonl"
GRID_PIXELS = 40_000_000  # of an epoch's picture: more is made smaller
TABLE_ROWS, TABLE_PIXELS = 16, 2_000_000  # of a table of rollouts, and of the pictures in each of its rows


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

    def write(self, epoch: int, groups: list[Group], images: bool) -> Path | None:
        """The rollouts of one epoch; with `images` also `samples/epoch-<n>.png`, a row a group: its rollouts, best
        reward first, then its references. The lines say where in the picture each is. Returns the picture, if any.
        """
        cells, references, file = {}, {}, None
        if images:
            drawn = [group for group in groups if group.images]
            orders = [_best_first(group) for group in drawn]
            rows = [[g.images[k] for k in order] + _references(g) for g, order in zip(drawn, orders, strict=True)]
            file = self._run / "samples" / f"epoch-{epoch:05d}.png" if any(rows) else None
            boxes = save_grid(file, bounded(rows)) if file else []
            for group, order, row in zip(drawn, orders, boxes, strict=True):
                cells |= {(group.place, k): box for k, box in zip(order, row, strict=False)}
                references[group.place] = row[len(order) :]
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
                if (group.place, k) in cells:
                    row["cell"] = cells[group.place, k]
                if k == 0 and references.get(group.place):
                    row["reference_cells"] = references[group.place]
                if k == 0:
                    row["context"] = trace(task.sample.goal, task.sample.reasonings)
                    row["p_t2i"], row["p_i2i"] = task.prompt.p_t2i, task.prompt.p_i2i
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        return file


def _best_first(group: Group) -> list[int]:
    """The numbers of the rollouts, best reward first."""
    return sorted(range(group.size), key=lambda k: -(group.scores[k].value or 0.0))


def _references(group: Group) -> list[Image.Image]:
    """The images of the history, no larger than those that were drawn."""
    images = [open_image(image) for image in group.task.sample.references]
    for image in images:
        image.thumbnail(group.images[0].size)
    return images


def bounded(rows: Sequence[Sequence[Image.Image]], pixels: int = GRID_PIXELS) -> list[list[Image.Image]]:
    """The images made smaller, all to the same longest side, where their grid would have more pixels than that."""
    cells = len(rows) * max(map(len, rows), default=0)
    side = max(1, math.isqrt(pixels // max(1, cells)) - 2)
    smaller = [[image.copy() for image in row] for row in rows]
    for image in (image for row in smaller for image in row):
        image.thumbnail((side, side))
    return smaller


def save_grid(file: Path, rows: Sequence[Sequence[Image.Image]]) -> list[list[list[int]]]:
    """Writes images as a PNG, row by row; nothing if there are none. Returns where each is, as `join`."""
    if not any(rows):
        return [[] for _ in rows]
    grid, boxes = join(rows)
    file.parent.mkdir(exist_ok=True)
    grid.save(file)
    return boxes


def join(rows: Sequence[Sequence[Image.Image]]) -> tuple[Image.Image, list[list[list[int]]]]:
    """Images, of which there is one at least, in one; and where each is: [x, y, width, height] in pixels, row by row.
    A row without images takes no room.
    """
    width, height = (max(getattr(image, side) for row in rows for image in row) for side in ("width", "height"))
    grid = Image.new("RGB", (max(map(len, rows)) * (width + 2), sum(map(bool, rows)) * (height + 2)), "white")
    boxes: list[list[list[int]]] = []
    top = 0
    for row in rows:
        boxes.append([[column * (width + 2), top, *image.size] for column, image in enumerate(row)])
        for (left, *_), image in zip(boxes[-1], row, strict=True):
            grid.paste(image, (left, top))
        top += height + 2 if row else 0
    return grid, boxes


def rollout_rows(groups: Sequence[Group]) -> list[dict[str, object]]:
    """Groups that this rank has drawn, TABLE_ROWS at most, as rows of a table, with pictures made smaller: a part of
    what rollouts.jsonl and the grid hold.
    """
    rows: list[dict[str, object]] = []
    for group in [group for group in groups if group.images][:TABLE_ROWS]:
        task, order = group.task, _best_first(group)
        drawn, references = bounded([[group.images[k] for k in order], _references(group)], TABLE_PIXELS)
        goal, _, reasoning = trace(task.sample.goal, task.sample.reasonings).partition("\n")
        said = [f"k {k}: {group.scores[k].transcript or group.scores[k].reason}" for k in order]
        rows.append(
            {"goal": goal, "reasoning": reasoning,
             "references": join([references])[0] if references else None,
             "rollouts by reward": join([drawn])[0],
             "rewards": ", ".join("missing" if (v := group.scores[k].value) is None else f"{v:.3f}" for k in order),
             "scene prompt": task.prompt.p_t2i, "edit prompt": task.prompt.p_i2i or "",
             "judge's words": "\n".join(text for text in said if not text.endswith(": "))}
        )  # fmt: skip
    return rows
