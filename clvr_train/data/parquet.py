"""Trajectories in parquet: columns `id`, `conversations` (list of struct{from, value}) and `images`.

An item of `images` is the encoded image, as binary or as struct{bytes, path} (the form of `datasets.Image`); a struct
without bytes names a file relative to the parquet file. Row groups are small when written here, because an image is
read by opening the row group that it lies in.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clvr_train.data.cells import kept_footer, open_parquet, read_cell
from clvr_train.data.foreign import KEYS
from clvr_train.data.paths import new_folder, path_inside
from clvr_train.data.records import DataError, Entry, FieldError, to_record
from clvr_train.data.sharegpt import check_new_id
from clvr_train.data.stored import encoded_images, in_memory
from clvr_train.method.trajectory import ImageLike, StoredImage, Trajectory

FILE_NAME = "trajectories-{:05d}.parquet"
GROUP_BYTES, FILE_BYTES, _GROUP_ROWS = 4 << 20, 1 << 30, 256
_COLUMNS = ("id", "conversations", "messages", "images", *KEYS)
_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SCHEMA = pa.schema([("id", pa.string()), ("conversations", pa.list_(_TURN)), ("images", pa.list_(_IMAGE))])


# ---------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class ParquetChunk:
    """A row group of a parquet file, or the error that the file cannot be opened for."""

    file: Path
    weight: int
    group: int
    first: int
    error: FieldError | None = None

    def entries(self) -> Iterator[Entry]:
        if self.error is not None:
            yield Entry(self.first, self.error, _no_images)
            return
        row = 0
        try:
            for batch in _rows(self.file, self.group):
                number = self.first + row
                yield Entry(number, _decoded(batch), functools.partial(_cell, self.file, self.group, row, number))
                row += 1
        except (pa.ArrowException, OSError) as error:
            yield Entry(self.first + row, _unreadable(error), _no_images)


def _decoded(batch: pa.RecordBatch) -> dict | FieldError:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return FieldError("record", f"text that is no UTF-8 ({error})", "bad_utf8")


def parquet_chunks(file: Path) -> Iterator[ParquetChunk]:
    """The row groups of a parquet file; of the file itself only the footer is read."""
    try:
        metadata = kept_footer(file)
    except (pa.ArrowException, OSError) as error:
        yield ParquetChunk(file, file.stat().st_size, 0, 1, _unreadable(error))
        return
    first = 1
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        yield ParquetChunk(file, row_group.total_byte_size, group, first)
        first += row_group.num_rows


def _unreadable(error: BaseException) -> FieldError:
    return FieldError("record", f"not a readable parquet file ({' '.join(str(error).split())})", "bad_container")


def _no_images(value: object, field: str) -> tuple[ImageLike, ImageLike]:
    raise FieldError(field, "the record is unreadable", "bad_container")


def _cell(file: Path, group: int, row: int, number: int, value: object, field: str) -> tuple[ImageLike, ImageLike]:
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        name = f"{file}:{number}:{field}"
        index = int(field[len("images[") : -1]) - 1
        return StoredImage(name, functools.partial(read_image, file, group, row, index)), in_memory(name, content)
    if isinstance(value, (dict, str)):
        path = path_inside(value.get("path") if isinstance(value, dict) else value, field, file.parent)
        return path, path
    raise FieldError(field, "must be the bytes of an image", "wrong_type")


def read_image(file: Path, group: int, row: int, index: int) -> bytes:
    """The bytes of image `index` of a row of a row group, all from 0. Raises `OSError` as `cells.read_cell`."""
    value = read_cell(file, group, row, "images")[index]
    return value["bytes"] if isinstance(value, dict) else value


def _rows(file: Path, group: int) -> Iterator[pa.RecordBatch]:
    """The rows of a row group one at a time: one of a stranger may be larger than memory.

    Raises:
        OSError: if it cannot be read, or holds another number of rows than the footer says.
    """
    opened = open_parquet(file, kept_footer(file))  # its own, whatever else is read meanwhile
    columns = [name for name in opened.schema_arrow.names if name in _COLUMNS]
    expected, row = opened.metadata.row_group(group).num_rows, 0
    for batch in opened.iter_batches(batch_size=1, row_groups=[group], columns=columns, use_threads=False):
        if batch.num_rows != 1:
            raise OSError(f"row group {group + 1} gave {batch.num_rows} rows where one was asked for")
        row += 1
        yield batch
    if row != expected:
        raise OSError(f"row group {group + 1} has {row} rows, and the footer says {expected}")


# ---------------------------------------------------------------------------- writing


def write_parquet(folder: Path, trajectories: Iterable[Trajectory], file_bytes: int = FILE_BYTES) -> int:
    """Write `trajectories-00000.parquet`, ... into a new folder that appears whole; return how many trajectories.

    An image that lies in a file keeps its bytes, a decoded one becomes a PNG. A file is ended after `file_bytes` of
    images, a row group after `GROUP_BYTES`.

    Raises:
        FileExistsError: the folder is there and not empty.
        DataError: if an id comes twice, a text breaks the protocol, or an image is unreadable.
    """
    folder, seen, number = Path(folder), set(), 0
    with new_folder(folder) as staging:
        rows = _encoded_rows(folder, trajectories, seen)
        row = next(rows, None)
        while row is not None or number == 0:
            with pq.ParquetWriter(
                staging / FILE_NAME.format(number), _SCHEMA, compression="none", use_dictionary=False
            ) as writer:
                row = _write_file(writer, row, rows, file_bytes)
            number += 1
    return len(seen)


def _encoded_rows(folder: Path, trajectories: Iterable[Trajectory], seen: set[str]) -> Iterator[tuple[dict, int]]:
    for number, trajectory in enumerate(trajectories, start=1):
        try:
            check_new_id(trajectory.id, seen)
            contents = encoded_images(trajectory)
            images = [{"bytes": content, "path": None} for content, _ in contents]
            yield to_record(trajectory, images), sum(len(content) for content, _ in contents)
        except FieldError as error:
            raise DataError.at(folder, number, error) from error


def _write_file(
    writer: pq.ParquetWriter, row: tuple[dict, int] | None, rows: Iterator[tuple[dict, int]], file_bytes: int
) -> tuple[dict, int] | None:
    """Write rows until the file is full; return the first row of the next file."""
    group, group_bytes, total = [], 0, 0
    while row is not None and total < file_bytes:
        record, size = row
        group.append(record)
        group_bytes, total = group_bytes + size, total + size
        if group_bytes >= GROUP_BYTES or len(group) == _GROUP_ROWS:
            writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
            group, group_bytes = [], 0
        row = next(rows, None)
    if group:
        writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
    return row
