"""FLUX-Reason-6M: parquet files of 36 columns, of which a caption and the image are read.

arXiv 2509.09680, huggingface.co/datasets/LucasFang/FLUX-Reason-6M.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from clvr_train.data.captions import CaptionChunk, Captions, check_caption, find_files
from clvr_train.data.cells import Cells, open_parquet
from clvr_train.data.order import Blocks
from clvr_train.data.records import DataError, FieldError
from clvr_train.method.trajectory import Sample, StoredImage

ENDING = ".parquet"
_IMAGE_BYTES = "image.bytes"
_CHUNK_ROWS = 256


class FluxReason(Captions):
    """The records of parquet files.

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
        files = find_files(source, ENDING)
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
    content = cells.read(path, group, row, _IMAGE_BYTES)
    if content is None:
        raise OSError("it is null")
    return content


# ---------------------------------------------------------------------------- some rows at a time


def record_chunks(name: str, file: Path, caption: str) -> Iterator[CaptionChunk]:
    """The records of a file, some of one row group at a time. Raises as `row_groups`."""
    column = f"caption_{caption}"
    before = 0
    for group, (num_rows, kept, weight) in enumerate(row_groups(file, column)):
        has_caption = np.ones(num_rows, bool) if kept is None else np.isin(np.arange(num_rows), kept)
        open_row = partial(_open_row, name, file, column, group, before)
        for first in range(0, num_rows, _CHUNK_ROWS):
            part = has_caption[first : first + _CHUNK_ROWS].tolist()
            records = tuple((before + first + n, () if has else None) for n, has in enumerate(part, start=1))
            yield CaptionChunk(file, weight * len(part) // num_rows, records, open_row, forwards=True)
        before += num_rows


_cells = Cells(1)  # of a worker: it goes on reading a row group where its last chunk ended


def _open_row(name: str, file: Path, column: str, group: int, before: int, number: int) -> Sample:
    """The sample, once its image is found to be there. Raises `FieldError`."""
    row = number - before - 1
    sample = flux_reason_sample(_cells, name, file, group, row, number, column)
    try:
        _cells.read(file, group, row, _IMAGE_BYTES)
    except OSError as error:
        raise FieldError("image", str(error), "bad_container") from error
    return sample
