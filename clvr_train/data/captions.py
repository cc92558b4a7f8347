"""Corpora of captions and images: FLUX-Reason-6M (parquet) and Fine-T2I (webdataset tars).

Both are map-style sequences of samples without reasoning or history: `goal` is the caption, `target` points to the
image, which is read when `open_image` opens it. What is held is a few numbers a row group or a tar member.

FLUX-Reason-6M: arXiv 2509.09680, huggingface.co/datasets/LucasFang/FLUX-Reason-6M; Fine-T2I: arXiv 2602.09439,
huggingface.co/datasets/ma-xu/fine-t2i.
"""

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

from clvr_train.data.buckets import Size, nearest_bucket
from clvr_train.data.cells import Cells, open_parquet
from clvr_train.data.images import image_size, target_image
from clvr_train.data.jsonstream import parse_line
from clvr_train.data.order import Blocks
from clvr_train.data.records import DataError, FieldError, check_text, shown
from clvr_train.data.tar_index import Span, index_tar, read_head, read_span
from clvr_train.method.trajectory import Sample, StoredImage

# The forms of corpora, and how the names of their files end.
ENDINGS = {"flux_reason": ".parquet", "fine_t2i": ".tar"}
IMAGE_BYTES = "image.bytes"
# What Fine-T2I names as the generator of a picture that was taken, not generated.
PHOTO_SOURCES = ("pexels", "pixabay", "unsplash_lite")
_IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")


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


class FluxReason(Captions):
    """FLUX-Reason-6M: parquet files of 36 columns, of which a caption and the image are read.

    Records whose caption is null (every kind but `detail` has many) are left out: `num_without_caption` counts them.
    One that is empty is an error when it is asked for.

    Args:
        source: a folder, searched whole, a file, or files.
        caption: what follows `caption_` in the name of the column: detail, composition, entity, text, imaginative,
            style, abstract, original, or one of these with `_cn`.
        limit: use only the first so many.
        window: how many row groups every thread keeps open (see `data.cells.Cells`): that of the order by `blocks`.

    Raises:
        FileNotFoundError: without any file.
        DataError: if a file is damaged or lacks a column.
        ValueError: if no record is left, or window is below 1.
    """

    def __init__(
        self, source: Path | Sequence[Path], caption: str = "detail", limit: int | None = None, window: int = 1
    ) -> None:
        files = find_files(source, ENDINGS["flux_reason"])
        self.column = f"caption_{caption}"
        self._cells = Cells(window)
        self.num_without_caption = 0
        # Of every row group: its file, its number in the file, the record before its first.
        self._groups: list[tuple[int, int, int]] = []
        self._kept: dict[int, np.ndarray] = {}  # rows that have a caption, of row groups where some have none
        ends = [0]
        for number, (_, path) in enumerate(files):
            before = 0
            for group, (rows, kept, _) in enumerate(row_groups(path, self.column)):
                if kept is not None:
                    self._kept[len(self._groups)] = kept
                    self.num_without_caption += rows - len(kept)
                self._groups.append((number, group, before))
                ends.append(ends[-1] + (rows if kept is None else len(kept)))
                before += rows
        super().__init__(files, ends[1:], limit)

    @property
    def blocks(self) -> Blocks:
        """The samples of every row group, up to `limit`: a row is read by way of those before it in its row group."""
        sizes = np.diff(np.minimum(self._ends, len(self)), prepend=0)
        return Blocks(sizes.tolist(), self._cells.window)

    def _sample(self, part: int, number: int) -> Sample:
        file, group, before = self._groups[part]
        row = int(self._kept[part][number]) if part in self._kept else number
        name, path = self.files[file]
        try:
            return flux_reason_sample(self._cells, name, path, group, row, before + row + 1, self.column)
        except FieldError as error:
            raise DataError.at(path, before + row + 1, error) from error


class FineT2I(Captions):
    """Fine-T2I: webdataset tars of `<key>.jpg`, `<key>.json` and `<key>.txt`.

    The caption is what the image was made from: `enhanced_prompt` if the image was generated with it or is a photograph
    (both prompts describe it, and the enhanced one says more), else `prompt`. The `.txt` is not read: it repeats one of
    the two, and some are empty. The ending of an image may be wrong; its bytes are believed.

    Args:
        source: a folder, searched whole, a tar, or tars.
        limit: use only the first so many.

    Raises:
        FileNotFoundError: without any tar.
        DataError: if a tar is damaged (see `data.tar_index.index_tar`).
        ValueError: if no record is left.
    """

    def __init__(self, source: Path | Sequence[Path], limit: int | None = None) -> None:
        files = find_files(source, ENDINGS["fine_t2i"])
        self._tars = [index_tar(path) for _, path in files]
        super().__init__(files, np.cumsum([len(tar) for tar in self._tars]), limit)

    def _sample(self, part: int, number: int) -> Sample:
        name, path = self.files[part]
        tar = self._tars[part]
        try:
            return fine_t2i_sample(name, path, number + 1, tar.key(number), tar.members(number))
        except FieldError as error:
            raise DataError.at(path, number + 1, error) from error


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


# ---------------------------------------------------------------------------- FLUX-Reason-6M


def row_groups(path: Path, column: str) -> Iterator[tuple[int, np.ndarray | None, int]]:
    """Of every row group how many rows it has, which of them have a caption, or None where all have one, and its share
    of the bytes of the file.

    Raises:
        DataError: at the first row group whose captions cannot be read.
    """
    try:
        file = open_parquet(path)
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:  # the latter of a name of a column
        raise DataError(path, 1, "file", str(error).removeprefix(f"{path}: "), "bad_container") from error
    with file:
        _check_columns(path, file.schema_arrow, column)
        layout = file.metadata
        place = [layout.schema.column(n).path for n in range(layout.num_columns)].index(column)
        before, size = 0, path.stat().st_size
        for number in range(layout.num_row_groups):
            rows = layout.row_group(number).num_rows
            weight = size * rows // max(1, layout.num_rows)
            before += rows
            statistics = layout.row_group(number).column(place).statistics
            if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
                yield rows, None, weight
                continue
            try:
                captions = file.read_row_group(number, columns=[column], use_threads=False).column(0)
            except (pa.ArrowException, OSError) as error:
                reason = f"row group {number + 1} cannot be read ({' '.join(str(error).split())})"
                raise DataError(path, before - rows + 1, column, reason, "bad_container") from error
            kept = np.flatnonzero(captions.is_valid().to_numpy()).astype(np.int32)
            yield rows, kept if len(kept) < rows else None, weight


def _check_columns(path: Path, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        there = ", ".join(name.removeprefix("caption_") for name in schema.names if name.startswith("caption_"))
        raise DataError(path, 1, column, f"there is no such column; captions are {there or 'none'}", "missing_field")
    if not pa.types.is_string(schema.field(column).type) and not pa.types.is_large_string(schema.field(column).type):
        raise DataError(path, 1, column, f"must be strings, not {schema.field(column).type}", "wrong_type")
    image = schema.field("image").type if "image" in schema.names else None
    if image is None:
        raise DataError(path, 1, "image", "there is no such column", "missing_field")
    part = image.field("bytes").type if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0 else None
    if part is None or not (pa.types.is_binary(part) or pa.types.is_large_binary(part)):
        raise DataError(path, 1, "image", f"must be a struct with binary 'bytes', not {image}", "wrong_type")


def flux_reason_sample(cells: Cells, name: str, path: Path, group: int, row: int, record: int, column: str) -> Sample:
    """The sample of a row (from 0) of a row group: number `record` (from 1) of a file called `name`.

    Raises:
        FieldError: if its caption cannot be read, or says nothing.
    """
    try:
        goal = cells.read(path, group, row, column)
    except OSError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise FieldError(column, f"text that is no UTF-8 ({error.__cause__})", "bad_utf8") from error
        raise FieldError(column, str(error), "bad_container") from error
    check_caption(goal, column)
    image = StoredImage(f"{path}:{record}:image", partial(_image_bytes, cells, path, group, row))
    return Sample(f"{name}:{record}", 1, goal, (), (), image)


def _image_bytes(cells: Cells, path: Path, group: int, row: int) -> bytes:
    content = cells.read(path, group, row, IMAGE_BYTES)
    if content is None:
        raise OSError("it is null")
    return content


# ---------------------------------------------------------------------------- Fine-T2I


def fine_t2i_sample(name: str, path: Path, record: int, key: str, members: dict[str, Span]) -> Sample:
    """The sample of the members of a key: number `record` (from 1) of a tar called `name`.

    Raises:
        FieldError: if its caption cannot be read, or says nothing, or it has no image.
    """
    goal = _fine_t2i_caption(path, key, members)
    ending = next((ending for ending in _IMAGE_ENDINGS if ending in members), None)
    if ending is None:
        raise FieldError("jpg", f"{shown(key)} has no image beside it", "missing_image")
    offset, size = members[ending]
    image = StoredImage(
        f"{path}:{record}:{ending}",
        partial(read_span, path, offset, size),
        partial(read_head, path, offset, size),
    )
    return Sample(f"{name}:{key}", 1, goal, (), (), image)


def _fine_t2i_caption(path: Path, key: str, members: dict[str, Span]) -> str:
    """The text that the image of a record shows."""
    if "json" not in members:
        raise FieldError("json", f"{shown(key)} has none", "missing_field")
    try:
        fields = parse_line(read_span(path, *members["json"]))
    except FieldError as error:
        raise FieldError("json", error.message, error.rule) from error
    except OSError as error:
        raise FieldError("json", str(error), "bad_container") from error
    if not isinstance(fields, dict):
        raise FieldError("json", "must be a JSON object", "wrong_type")
    flag, source = "image_generated_with_enhanced_prompt", "image_generator"
    for field in (flag, source):
        if field not in fields:
            raise FieldError(f"json.{field}", "is missing", "missing_field")
    if not isinstance(fields[flag], bool | None):  # null of photographs
        raise FieldError(f"json.{flag}", f"must be true, false or null, not {shown(fields[flag])}", "wrong_type")
    field = "enhanced_prompt" if fields[flag] or fields[source] in PHOTO_SOURCES else "prompt"
    check_caption(fields.get(field), f"json.{field}")
    return fields[field]
