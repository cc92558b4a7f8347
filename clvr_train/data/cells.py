"""Single cells of parquet files, in memory that does not grow with the file or its row groups.

`datasets` streams the rows of a file in their order, and shuffles by a buffer: an order by (seed, epoch), resumed at
once, asks for any row.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

# Of a column, this much of an open row group is held at a time, besides the page that it comes from (in most files of
# 1024 rows or less, which may be all of the row group); reading goes through a buffer of the second size.
BLOCK_BYTES = 4 * 2**20
_BUFFER_BYTES = 2**20
_OPEN = 4  # footers that are kept, and row groups that are open where nobody asks for another number

T = TypeVar("T")


def open_parquet(path: Path, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A parquet file that is read through a small buffer, not a column of a row group at once.

    For one `iter_batches` at a time: it sets the number of rows of a batch for all that were begun before, which then
    lose rows without a word.

    Args:
        footer: of the file, if it was read already.

    Raises:
        OSError: if it cannot be opened, is no parquet file, or was cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return pq.ParquetFile(path, metadata=footer, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{path}: no parquet file, or cut short ({_reason(error)})") from error


def kept_footer(path: Path) -> pq.FileMetaData:
    """The footer, read once by every thread: it may name thousands of row groups. Raises as `open_parquet`."""
    return _footers.newest.get(_version(path), lambda: open_parquet(path).metadata)


def _version(path: Path) -> tuple[Path, int, int]:
    stat = os.stat(path)
    return path, stat.st_mtime_ns, stat.st_size


class Cells(threading.local):
    """Reads single cells. Every thread keeps the row groups open that it read last: a reader has a position.

    Rows of an open row group in rising order cost a block now and then. A row before the block at hand, or of a row
    group that is not open, starts the row group anew. What is open is not pickled.

    Args:
        window: how many row groups a thread keeps open; see `data.order.BlockPermutation`. Of every column that is
            asked for, each holds `BLOCK_BYTES`, a page and a buffer.

    Raises:
        ValueError: window is below 1.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window={window}: must be at least 1")
        self.window = window
        self._groups = _Newest(window)

    def __reduce__(self) -> tuple:
        return Cells, (self.window,)

    def read(self, path: Path, group: int, row: int, column: str) -> object:
        """The value of `column` (`image.bytes` is a field of a struct) in a row of a row group, both from 0.

        Raises:
            OSError: if the file cannot be read there.
        """
        key = (*_version(path), group)
        try:
            return self._groups.get(key, partial(_Group, path, group)).value(row, column)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise OSError(f"row group {group + 1} cannot be read ({_reason(error)})") from error


def read_cell(path: Path, group: int, row: int, column: str) -> object:
    """`Cells.read` of the row groups that all who call this keep open together."""
    return _cells.read(path, group, row, column)


class _Newest:
    """What was asked for last."""

    def __init__(self, limit: int) -> None:
        self._values, self._limit = OrderedDict(), limit

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        value = self._values.pop(key, None)
        if value is None:
            if len(self._values) == self._limit:
                self._values.popitem(last=False)  # first, or one more would be held
            value = make()
        self._values[key] = value
        return value


class _Footers(threading.local):
    def __init__(self) -> None:
        self.newest = _Newest(_OPEN)


_footers = _Footers()
_cells = Cells(_OPEN)


class _Group:
    """A row group, of which every column that is asked for is read for itself."""

    def __init__(self, path: Path, group: int) -> None:
        self._path, self._footer, self._group = path, kept_footer(path), group
        self._columns: dict[str, _Column] = {}

    def value(self, row: int, column: str) -> object:
        if column not in self._columns:
            self._columns[column] = _Column(open_parquet(self._path, self._footer), self._group, column)
        return self._columns[column].value(row)


class _Column:
    """A column of a row group, read forwards a block of rows at a time; the block at hand begins with row `first`.

    Args:
        file: read by nobody else (`open_parquet`).
    """

    def __init__(self, file: pq.ParquetFile, group: int, column: str) -> None:
        self._file, self._group, self._column = file, group, column
        layout = file.metadata.row_group(group)
        parts = [layout.column(n) for n in range(layout.num_columns)]
        size = sum(part.total_uncompressed_size for part in parts if f"{part.path_in_schema}.".startswith(f"{column}."))
        self._rows = max(1, BLOCK_BYTES * layout.num_rows // max(1, size))
        self.restart()

    def restart(self) -> None:
        self.first = 0
        self._block: Sequence | pa.Array = ()
        self._blocks = self._read()

    def value(self, row: int) -> object:
        if row < self.first or self._blocks is None:
            self.restart()
        while row >= self.first + len(self._block):
            self.first += len(self._block)
            self._block = ()  # or two would be held while the next is made
            blocks, self._blocks = self._blocks, None  # stays so if reading fails
            self._block = next(blocks, None)
            if self._block is None:
                raise OSError(f"it has {self.first} rows, not {row + 1}")
            self._blocks = blocks
        return self._block[row - self.first].as_py()

    def _read(self) -> Iterator[pa.Array]:
        batches = self._file.iter_batches(
            self._rows, row_groups=[self._group], columns=[self._column], use_threads=False
        )
        return (_values(batch.column(0)) for batch in batches)


def _values(array: pa.Array) -> pa.Array:
    """The one field of a struct that was asked for."""
    return array.flatten()[0] if pa.types.is_struct(array.type) else array


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())
