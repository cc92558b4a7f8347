"""The pictures of a benchmark, drawn into files: what is there and whole is kept, so a run that ended can go on."""

import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tqdm import tqdm

from clvr_train.data.images import ImageError, open_image
from clvr_train.evaluation.checkout import Item
from clvr_train.runtime.distributed import World
from clvr_train.runtime.files import write_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """What a system made of a text: the picture, or none, with its rounds, network evaluations, seconds, and why it
    ended.
    """

    image: Image | None
    rounds: int
    nfe: int
    seconds: float
    stop: str = ""


Draw = Callable[[Sequence[Item]], list[Drawn]]


def draw_pictures(items: Sequence[Item], images: Path, run: Path, world: World, draw: Draw, batch: int) -> None:
    """Draws this rank's share of the pictures that are not there yet into files below `images`.

    A picture is written whole or not at all, PNG or, by the end of its name, JPEG of quality 95. Its facts are appended
    to `run`/drawn-<rank>.jsonl first, also those of an item that came to no picture, which is not tried again.

    Items are drawn in groups of `batch`, always the same: a picture's last bits depend on what is computed beside it.
    So files do not depend on the number of ranks, or on where an earlier command ended.
    """
    for folder in sorted({(images / item.file).parent for item in items}):
        folder.mkdir(parents=True, exist_ok=True)  # a scorer lists them, be there pictures or not
    undrawn = {name for name, row in read_facts(run).items() if not row["drawn"]}
    groups = world.share([items[start : start + batch] for start in range(0, len(items), batch)])
    lacking = [[i for i in group if i.id not in undrawn and not is_picture(images / i.file)] for group in groups]
    there = sum(map(len, groups)) - sum(map(len, lacking))
    if there:
        logger.info("%d of %d pictures are there already", there, sum(map(len, groups)))
    with tqdm(total=sum(map(len, lacking)), desc="draw", unit="picture", disable=not any(lacking)) as bar:
        for group, part in zip(groups, lacking, strict=True):
            if not part:
                continue
            drawn = {item.id: one for item, one in zip(group, draw(group), strict=True)}
            append_rows(run / f"drawn-{world.rank}.jsonl", [_facts(item, drawn[item.id]) for item in part])
            for item in part:
                if drawn[item.id].image is not None:
                    write_atomic(images / item.file, encoded(drawn[item.id].image, Path(item.file).suffix))
            bar.update(len(part))


def read_facts(run: Path) -> dict[str, dict[str, Any]]:
    """id -> what was noted of its drawing, by all ranks."""
    return {row["id"]: row for row in read_rows(run.glob("drawn-*.jsonl"))}


def write_beside(beside: Mapping[str, str], images: Path) -> None:
    """The further files that a scorer looks for among the pictures."""
    for name, text in beside.items():
        path = images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)


def is_picture(path: Path) -> bool:
    """Whether a picture is there that can be read to its last pixel."""
    try:
        open_image(path)
    except ImageError:
        return False
    return True


def encoded(image: Image, suffix: str) -> bytes:
    """The file of a picture, by the end of its name."""
    buffer = io.BytesIO()
    if suffix == ".jpg":
        image.convert("RGB").save(buffer, "JPEG", quality=95)
    else:
        image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds JSON lines and pushes them to disk; a line that a kill has cut off before does not spoil them."""
    if not rows:
        return
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The JSON lines of files that are there, without those that a kill has cut off."""
    rows = []
    for path in sorted(paths):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows.append(row)
    return rows


def _facts(item: Item, one: Drawn) -> dict[str, Any]:
    facts = {"id": item.id, "drawn": one.image is not None, "rounds": one.rounds, "nfe": one.nfe}
    return facts | {"seconds": one.seconds, "stop": one.stop}
