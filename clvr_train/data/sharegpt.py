"""Trajectories as JSON, with the images as files beside it: reading in pieces, and writing (CLVR A.3, A.6).

A record a line (`trajectories.jsonl`), or one array of records (`.json`). An item of `images` is a path relative to the
folder of the file. The number of `<image>` turns equals the number of images, as LLaMA-Factory and ms-swift ask for.
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from clvr_train.data.jsonstream import elements, is_array, lines, parse_line
from clvr_train.data.paths import path_inside
from clvr_train.data.records import DataError, Entry, FieldError, shown, to_record
from clvr_train.data.stored import encoded_images
from clvr_train.method.trajectory import Trajectory

FILE_NAME = "trajectories.jsonl"
_ID_FOR_FILES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CHUNK_RECORDS, _CHUNK_BYTES = 32, 1 << 20


# ---------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class JsonChunk:
    """Records of a JSON file: lines that are not yet decoded, or elements of an array that are."""

    file: Path
    weight: int
    items: tuple[tuple[int, object], ...]

    def entries(self) -> Iterator[Entry]:
        resolve = functools.partial(_path_twice, self.file.parent)
        for number, item in self.items:
            try:
                record = parse_line(item) if isinstance(item, bytes) else item
            except FieldError as error:
                record = error
            yield Entry(number, record, resolve)


def json_chunks(file: Path) -> Iterator[JsonChunk]:
    """The records of a `.jsonl` or `.json` file, some at a time."""
    array = file.suffix == ".json" and is_array(file)
    items: list[tuple[int, object]] = []
    weight = 0
    for number, size, item in elements(file) if array else lines(file):
        items.append((number, item))
        weight += size
        if len(items) == _CHUNK_RECORDS or weight > _CHUNK_BYTES:
            yield JsonChunk(file, weight, tuple(items))
            items, weight = [], 0
    if items:
        yield JsonChunk(file, weight, tuple(items))


def _path_twice(folder: Path, value: object, field: str) -> tuple[Path, Path]:
    path = path_inside(value, field, folder)
    return path, path


# ---------------------------------------------------------------------------- writing


def write_trajectories(
    folder: Path, trajectories: Iterable[Trajectory], facts: Mapping[str, Mapping] | None = None
) -> int:
    """Write `trajectories.jsonl` and the images beside it, and return how many trajectories there were.

    An image that lies in a file keeps its bytes, a decoded one becomes a PNG. `trajectories.jsonl` appears, or replaces
    an older one, only once the last record is written: who finds it finds all of it. No image file that is there is
    changed: where its name is taken by other bytes, an image gets a name with their hash. A call that fails leaves
    what it found; a killed one at most `trajectories.jsonl.tmp` and image files besides.

    Args:
        facts: by id, what else a record says; readers pass over fields that are not of the grammar.

    Raises:
        DataError: if an id comes twice, a text breaks the protocol, or an image is unreadable or of no use.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    staging = folder / (FILE_NAME + ".tmp")
    seen: set[str] = set()
    made: list[str] = []
    try:
        with staging.open("w", encoding="utf-8") as stream:
            for number, trajectory in enumerate(trajectories, start=1):
                try:
                    check_new_id(trajectory.id, seen)
                    record = _write_images(folder, trajectory, made)
                except FieldError as error:
                    raise DataError.at(folder / FILE_NAME, number, error) from error
                record |= (facts or {}).get(trajectory.id, {})
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        made.clear()  # they stay, from here on
        os.replace(staging, folder / FILE_NAME)
    finally:
        for name in (staging.name, *made):
            (folder / name).unlink(missing_ok=True)
    return len(seen)


def check_new_id(name: str, seen: set[str]) -> None:
    """Note an id. Raises `FieldError` if it was noted before."""
    if name in seen:
        raise FieldError("id", f"{shown(name)} stands in an earlier record too", "duplicate_id")
    seen.add(name)


def _write_images(folder: Path, trajectory: Trajectory, made: list[str]) -> dict:
    """The record of a trajectory, its images written; `made` gets the files that this added."""
    safe = _ID_FOR_FILES.fullmatch(trajectory.id)
    stem = trajectory.id if safe else "id-" + sha256(trajectory.id.encode(errors="replace")).hexdigest()[:32]
    contents = encoded_images(trajectory)
    names = [
        _free_name(folder, f"images/{stem}_{number}", content, suffix)
        for number, (content, suffix) in enumerate(contents, start=1)
    ]
    record = to_record(trajectory, names)
    for name, (content, _) in zip(names, contents, strict=True):
        path = folder / name
        if not _holds(path, content):
            staging = folder / f"{name}.tmp"
            made.append(f"{name}.tmp")
            staging.write_bytes(content)
            made[-1] = name
            os.replace(staging, path)
    return record


def _free_name(folder: Path, name: str, content: bytes, suffix: str) -> str:
    plain = f"{name}.{suffix}"
    if not (folder / plain).exists() or _holds(folder / plain, content):
        return plain
    return f"{name}-{sha256(content).hexdigest()[:32]}.{suffix}"


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and not path.is_symlink() and path.read_bytes() == content
