"""Trajectories in webdataset shards: a `<key>.json` with the record and its images as `<key>.1.png`, `<key>.2.jpg`, ...

An item of `images` is the name of a member of the same key, with or without the key (`1.png`). Shards are written by
webdataset, and read from the offsets that the headers give: any image is one seek. Its decoders (some unpickle) and its
`gopen` (which runs `pipe:` as a command) are not used.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from webdataset.writer import TarWriter

from clvr_train.data.jsonstream import MAX_RECORD_BYTES, parse_line
from clvr_train.data.paths import new_folder
from clvr_train.data.records import DataError, Entry, FieldError, shown, to_record
from clvr_train.data.sharegpt import check_new_id
from clvr_train.data.stored import encoded_images
from clvr_train.data.tar_index import Span, read_head, read_span, tar_records
from clvr_train.method.trajectory import StoredImage, Trajectory

FILE_NAME = "trajectories-{:06d}.tar"
FILE_BYTES = 1 << 30
MAX_IMAGE_BYTES = 512 << 20
_CHUNK_RECORDS = 32


# ---------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class ShardChunk:
    """Records of a shard as (number, key, ending -> place of the member), or an error in place of the members."""

    file: Path
    weight: int
    samples: tuple[tuple[int, str, dict[str, Span] | FieldError], ...]

    def entries(self) -> Iterator[Entry]:
        for number, key, members in self.samples:
            resolve = functools.partial(_member, self.file, number, key, members)
            try:
                yield Entry(number, _record(self.file, key, members), resolve)
            except FieldError as error:
                yield Entry(number, error, resolve)


def shard_chunks(file: Path) -> Iterator[ShardChunk]:
    """The records of a shard, some at a time; only headers are read."""
    start, end, samples = 0, 0, []
    for number, (key, members, end) in enumerate(tar_records(file), start=1):
        samples.append((number, key, members))
        if len(samples) == _CHUNK_RECORDS:
            yield ShardChunk(file, end - start, tuple(samples))
            start, samples = end, []
    if samples:
        yield ShardChunk(file, end - start, tuple(samples))


def _record(file: Path, key: str, members: dict[str, Span] | FieldError) -> object:
    if isinstance(members, FieldError):
        raise members
    if "json" not in members:
        raise FieldError("record", f"there is no member {shown(key + '.json')}", "missing_field")
    offset, size = members["json"]
    if size > MAX_RECORD_BYTES:
        raise FieldError("record", f"longer than {MAX_RECORD_BYTES} bytes", "too_long")
    return parse_line(read_span(file, offset, size))


def _member(
    file: Path, number: int, key: str, members: dict[str, Span], value: object, field: str
) -> tuple[StoredImage, StoredImage]:
    if not isinstance(value, str) or not value:
        raise FieldError(field, "must be the name of a member", "wrong_type")
    span = members.get(value.removeprefix(key + ".").lower())
    if span is None or value.lower() in ("json", f"{key}.json".lower()):
        raise FieldError(field, f"{shown(value)} is no image of {shown(key)} in the shard", "missing_image")
    offset, size = span
    if size > MAX_IMAGE_BYTES:
        raise FieldError(field, f"{size} bytes are more than the {MAX_IMAGE_BYTES} allowed", "too_long")
    head = functools.partial(read_head, file, offset, size)
    image = StoredImage(f"{file}:{number}:{field}", functools.partial(read_span, file, offset, size), head)
    return image, image


# ---------------------------------------------------------------------------- writing


def write_shards(folder: Path, trajectories: Iterable[Trajectory], file_bytes: int = FILE_BYTES) -> int:
    """Write `trajectories-000000.tar`, ... into a new folder that appears whole; return how many trajectories.

    An image that lies in a file keeps its bytes, a decoded one becomes a PNG. Keys are numbers, so that an id may be
    any text. A shard is ended after `file_bytes` of content; the same trajectories give the same bytes.

    Raises:
        FileExistsError: the folder is there and not empty.
        DataError: if an id comes twice, a text breaks the protocol, or an image is unreadable.
    """
    folder, seen, shard = Path(folder), set(), 0
    with new_folder(folder) as staging:
        samples = _encoded_samples(folder, trajectories, seen)
        sample = next(samples, None)
        while sample is not None or shard == 0:
            path, total = staging / FILE_NAME.format(shard), 0
            with path.open("wb") as stream, TarWriter(stream, encoder=False, compress=False, mtime=0) as writer:
                while sample is not None and total < file_bytes:
                    total += writer.write(sample)
                    sample = next(samples, None)
            shard += 1
    return len(seen)


def _encoded_samples(folder: Path, trajectories: Iterable[Trajectory], seen: set[str]) -> Iterator[dict]:
    for number, trajectory in enumerate(trajectories, start=1):
        try:
            check_new_id(trajectory.id, seen)
            contents = encoded_images(trajectory)
            images = {f"{n}.{suffix}": content for n, (content, suffix) in enumerate(contents, start=1)}
            record = json.dumps(to_record(trajectory, list(images)), ensure_ascii=False)
        except FieldError as error:
            raise DataError.at(folder, number, error) from error
        yield {"__key__": f"{number - 1:08d}", "json": record.encode(), **images}
