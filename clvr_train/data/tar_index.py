"""Where the members of a webdataset tar lie, from its headers alone: no member is read to find another.

A record is a run of members with the same key, as in webdataset: the name up to the first dot of its last part. What
follows is the ending.

`webdataset` and `datasets` read a shard from its start, image for image, and give no offsets: any record, or the next
one after a resume, would cost all before it. Headers are read by `tarfile`.
"""

import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clvr_train.data.records import DataError, FieldError, shown

_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # webdataset's: the key ends at the first dot of the file name
_END = bytes(tarfile.BLOCKSIZE)

Span = tuple[int, int]  # offset and size of a member's content


def tar_records(file: Path) -> Iterator[tuple[str, dict[str, Span] | FieldError, int]]:
    """(key, places of the members by ending in lower case, bytes of the file so far) of every record, in order.

    An error stands in place of the members where a record has an ending twice, and as the last item where the archive
    cannot be read on.
    """
    key, members = None, {}
    end = 0
    for item in _members(file):
        if isinstance(item, FieldError):
            yield key or "", item, file.stat().st_size
            return
        name, span = item
        match = _MEMBER.fullmatch(name)
        if match is None:
            continue
        if match[1] != key:
            if key is not None:
                yield key, members, end
            key, members = match[1], {}
        suffix, end = match[2].lower(), sum(span)
        if isinstance(members, dict):
            twice = suffix in members
            members[suffix] = span
            members = FieldError("record", f"two members {shown(name)}", "bad_container") if twice else members
    if key is not None:
        yield key, members, end


def numbered_records(file: Path) -> Iterator[tuple[int, str, dict[str, Span] | FieldError, int]]:
    """The same with their numbers, from 1, in front; an error also in place of a record whose key came before."""
    seen: set[str] = set()
    for number, (key, members, end) in enumerate(tar_records(file), start=1):
        if key in seen and not isinstance(members, FieldError):
            members = FieldError("key", f"{shown(key)} stands in an earlier record too", "duplicate_id")
        seen.add(key)
        yield number, key, members, end


def _members(file: Path) -> Iterator[tuple[str, Span] | FieldError]:
    """(name, place) of the regular members; an error as the last item where the archive cannot be read on."""
    try:
        with tarfile.open(file, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # tarfile would keep them all
                if member.isreg() and not member.issparse():
                    yield member.name, (member.offset_data, member.size)
            # At a damaged header tarfile ends as at the end of the archive.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != _END:
                yield FieldError("record", "the shard is cut off or damaged from here on", "bad_container")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield FieldError("record", f"not a readable tar file ({error}); a packed one must be unpacked", "bad_container")


def read_span(file: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on.

    Raises:
        OSError: the file is gone, or ends before.
    """
    with file.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) != size:
        raise OSError(f"{file}: ends {size - len(content)} bytes too early")
    return content


def read_head(file: Path, offset: int, size: int, limit: int) -> bytes:
    """The first bytes of a member, at most `limit`. Raises as `read_span`."""
    return read_span(file, offset, min(size, limit))


@dataclass(frozen=True)
class TarIndex:
    """The records of a tar, counted from 0, without Python objects for each. n records, m members.

    `starts` (n + 1,) is the first member of every record; `kinds` (m,) are places in `endings`; `offsets` and `sizes`
    (m,) are bytes. The keys are `names`, cut at `name_ends` (n,).
    """

    path: Path
    endings: tuple[str, ...]
    starts: np.ndarray
    kinds: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    names: bytes
    name_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.name_ends)

    def key(self, record: int) -> str:
        """The name that the members of a record share."""
        first = self.name_ends[record - 1] if record else 0
        return self.names[first : self.name_ends[record]].decode("utf-8", "surrogateescape")

    def members(self, record: int) -> dict[str, Span]:
        """The places of the members of a record by ending, in the order of the tar."""
        part = slice(int(self.starts[record]), int(self.starts[record + 1]))
        kinds, offsets, sizes = (column[part].tolist() for column in (self.kinds, self.offsets, self.sizes))
        return {self.endings[kind]: (at, size) for kind, at, size in zip(kinds, offsets, sizes, strict=True)}


def index_tar(path: Path) -> TarIndex:
    """The index of a whole tar.

    Raises:
        DataError: if the tar cannot be read to its end, a record has an ending twice, or a key comes back later.
    """
    kind_of: dict[str, int] = {}
    starts, kinds, offsets, sizes, name_ends = (array(code) for code in "qiqqq")
    names = bytearray()
    for number, key, members, _ in numbered_records(path):
        if isinstance(members, FieldError):
            raise DataError.at(path, number, members)
        starts.append(len(kinds))
        for ending, (offset, size) in members.items():
            kinds.append(kind_of.setdefault(ending, len(kind_of)))
            offsets.append(offset)
            sizes.append(size)
        names += key.encode("utf-8", "surrogateescape")
        name_ends.append(len(names))
    starts.append(len(kinds))
    columns = [np.array(column) for column in (starts, kinds, offsets, sizes)]
    return TarIndex(path, tuple(kind_of), *columns, bytes(names), np.array(name_ends, dtype=np.int64))
