"""Corpora of captions and images: what FLUX-Reason-6M (`flux_reason.py`) and Fine-T2I (`fine_t2i.py`) have in common.

Both are map-style sequences of samples without reasoning or history: `goal` is the caption, `target` points to the
image, which is read when `open_image` opens it. What is held is a few numbers a row group or a tar member.
"""

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

from clvr_train.data.buckets import Size, nearest_bucket
from clvr_train.data.images import image_size, target_image
from clvr_train.data.order import Blocks
from clvr_train.data.records import FieldError, check_text
from clvr_train.method.trajectory import Sample


class Captions(Sequence[Sample]):
    """The records of several parts (row groups, tars), one after the other.

    `ends` are the numbers of records up to the end of every part; `limit` ends them all earlier.
    """

    def __init__(self, files: Sequence[tuple[str, Path]], ends: Sequence[int], limit: int | None) -> None:
        self.files = files
        self._ends = np.asarray(ends, dtype=np.int64)
        records = int(self._ends[-1]) if len(self._ends) else 0
        self._num = records if limit is None else min(limit, records)
        if not self._num:
            raise ValueError(f"{files[0][1]}: no records in {len(files)} files like this one, limit={limit}")

    @property
    def blocks(self) -> Blocks:
        """The blocks by which an order should go through the samples; none where each is as near as any other."""
        return Blocks()

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index):
        """The sample at an index. Its caption is read, its image is not.

        Raises:
            DataError: if the caption cannot be read, or is empty.
            IndexError: beyond the ends.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._sample(part, index - int(self._ends[part - 1] if part else 0))

    @abstractmethod
    def _sample(self, part: int, number: int) -> Sample:
        """The sample of a record of a part, both from 0."""


@dataclass(frozen=True)
class CaptionChunk:
    """Consecutive records of a file: made cheaply in the order of the corpus, opened in any process (it pickles).

    `records` are numbers, from 1, each with what `open` takes after it to give the sample; or with what is wrong; or
    with None if training leaves it out.
    """

    file: Path
    weight: int  # bytes of the file, for a progress bar
    records: tuple[tuple[int, tuple | FieldError | None], ...]
    open: Callable[..., Sample] | None = None
    forwards: bool = False  # behind a record that cannot be read none can


def fit_target(sample: Sample, sizes: Sequence[Size]) -> Sample:
    """The sample with its target decoded and brought to the nearest of the sizes, (height, width): what a worker does
    for the loop.

    Raises:
        ImageError: as `data.images.target_image`.
    """
    size_px = nearest_bucket(image_size(sample.target), sizes)
    return replace(sample, target=target_image(sample.target, size_px))


def find_files(source: Path | Sequence[Path], ending: str) -> list[tuple[str, Path]]:
    """(name, path) of the files of this ending in a folder, or of the files given, by name.

    A name is the path below the folder, or below what the files have in common, without the ending: it stays when the
    whole is moved.

    Raises:
        FileNotFoundError: if there is none, or not one of those given.
    """
    if isinstance(source, Path):
        folder = source if source.is_dir() else source.parent
        paths = list(source.rglob(f"*{ending}")) if source.is_dir() else [source]
    else:
        paths = [Path(path) for path in source]
        folder = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    if missing := [path for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{missing[0]}: no such file")
    if not paths:
        raise FileNotFoundError(f"{source}: no file *{ending} there")
    return sorted((path.relative_to(folder).as_posix().removesuffix(ending), path) for path in paths)


def check_caption(caption: object, field: str) -> None:
    """Raises `FieldError` if it is no text, or an empty one."""
    if not isinstance(caption, str):
        raise FieldError(field, f"must be a string, not {type(caption).__name__}", "wrong_type")
    check_text(caption, field)
    if not caption.strip():
        raise FieldError(field, "must not be empty", "empty_text")
