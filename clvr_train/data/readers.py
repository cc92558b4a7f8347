"""One way to trajectories, whatever holds them: JSON, parquet or webdataset shards, a file or a folder of them."""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from clvr_train.data.foreign import to_own
from clvr_train.data.images import ImageError, check_size, image_name, image_size, open_image
from clvr_train.data.parquet import parquet_chunks
from clvr_train.data.records import Chunk, DataError, Entry, FieldError, to_trajectory
from clvr_train.data.shards import shard_chunks
from clvr_train.data.sharegpt import FILE_NAME, check_new_id, json_chunks
from clvr_train.method.trajectory import ImageLike, Trajectory

logger = logging.getLogger(__name__)
CONTAINERS: dict[str, Callable[[Path], Iterator[Chunk]]] = {
    ".jsonl": json_chunks,
    ".json": json_chunks,
    ".parquet": parquet_chunks,
    ".tar": shard_chunks,
}
# Of a folder's JSON files only these are trajectories; recipes leave others beside them.
_JSON_NAMES = (FILE_NAME, "trajectories.json")
_JUDGED_EVERY = 1000


def find_files(path: Path) -> list[Path]:
    """The files of trajectories that a path means, in the order of their names: the file itself, or those of a folder.

    Raises:
        FileNotFoundError: there is nothing of the kind.
        ValueError: a file of an unknown kind, or a folder that holds trajectories in two forms.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix not in CONTAINERS:
            raise ValueError(f"{path}: not one of {', '.join(CONTAINERS)}")
        return [path]
    if path.suffix in CONTAINERS and not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    forms = [[path / name] for name in _JSON_NAMES if (path / name).is_file()]
    forms += [files for kind in (".parquet", ".tar") if (files := sorted(path.glob(f"*{kind}")))]
    if not forms:
        where = f"{path / FILE_NAME}: no such file"
        raise FileNotFoundError(f"{where}; a folder of trajectories holds {FILE_NAME}, parquet files or tar shards")
    if len(forms) > 1:
        found = " and ".join(files[0].name for files in forms)
        raise ValueError(f"{path}: holds {found}; name the file, or keep each form in a folder of its own")
    return forms[0]


def chunks(path: Path) -> Iterator[Chunk]:
    """The records of a path, some at a time, in order."""
    for file in find_files(path):
        yield from CONTAINERS[file.suffix](file)


class Refusals:
    """Counts refused records, logs each, and ends the reading once they are more than a share of all.

    With a share of 0 the first refusal ends it. Otherwise the share is that of the records read so far, judged after
    every 1,000 of them and at the end, so that one early record does not count for much.
    """

    def __init__(self, path: Path | str, max_refused: float = 0.0) -> None:
        if not 0 <= max_refused < 1:
            raise ValueError(f"max_refused={max_refused}: a share of records, from 0 to below 1")
        self.path, self.max_refused = path, max_refused
        self.records = self.refused = 0

    def accept(self) -> None:
        """Raises as `finish`."""
        self.records += 1
        if self.records % _JUDGED_EVERY == 0:
            self._judge()

    def refuse(self, error: DataError) -> None:
        """Raises as `finish`, and `error` itself where none may be refused."""
        if self.max_refused == 0:
            raise error
        logger.warning("refused: %s", error)
        self.refused += 1
        self.accept()

    def finish(self) -> None:
        """Judge, and say how many were refused, at the end of the data.

        Raises:
            ValueError: more records were refused than may be.
        """
        self._judge()
        if self.refused:
            logger.warning("%s: %d of %d records refused", self.path, self.refused, self.records)

    def _judge(self) -> None:
        if self.refused > self.max_refused * self.records:
            raise ValueError(
                f"{self.path}: {self.refused} of {self.records} records refused, more than max_refused="
                f"{self.max_refused} allows; recipes/validate_data.py lists them all"
            )


def read_trajectories(
    path: Path, decode: bool = False, max_refused: float = 0.0, limit: int | None = None
) -> Iterator[Trajectory]:
    """The trajectories of a file or folder, in file order; their images are pointers that `open_image` opens later.

    Every record is checked whole before it is given out. Of an image only the header is read unless `decode` (of one in
    parquet, all of it).

    Args:
        path: a `.jsonl`, `.json`, `.parquet` or `.tar` file, or a folder with `trajectories.jsonl`,
            `trajectories.json`, or parquet files, or shards.
        max_refused: the share of bad records that may be left out (`Refusals`).
        limit: read no further than so many trajectories.

    Raises:
        FileNotFoundError: if there is nothing to read.
        DataError: at the first record that is malformed, or whose images are missing, unreadable, of no use or outside
            the folder, if `max_refused` is 0.
        ValueError: once more records are refused than `max_refused` allows.
    """
    refusals, seen = Refusals(path, max_refused), set()
    yield from islice(_accepted(Path(path), decode, refusals, seen), limit)
    if not refusals.records and limit != 0:
        raise DataError(find_files(path)[0], 1, "record", "the file is empty", "empty_file")
    refusals.finish()


def _accepted(path: Path, decode: bool, refusals: Refusals, seen: set[str]) -> Iterator[Trajectory]:
    for chunk in chunks(path):
        for entry in chunk.entries():
            try:
                trajectory = open_entry(chunk.file, entry, check_pixels if decode else check_header)
                check_new_id(trajectory.id, seen)
            except FieldError as error:
                refusals.refuse(DataError.at(chunk.file, entry.number, error))
                continue
            refusals.accept()
            yield trajectory


def open_entry(file: Path, entry: Entry, check: Callable[[ImageLike], None]) -> Trajectory:
    """The trajectory of an entry, its images checked by `check`, which raises `ImageError`.

    Raises:
        FieldError: for the first rule that the record breaks.
    """

    def resolve(value: object, field: str) -> ImageLike:
        image, probe = entry.resolve(value, field)
        try:
            check(probe)
        except ImageError as error:
            raise FieldError(field, str(error), error.rule) from error
        return image

    if isinstance(entry.record, FieldError):
        raise entry.record
    return to_trajectory(to_own(entry.record, f"{file.stem}-{entry.number}"), resolve)


def check_header(image: ImageLike) -> None:
    """Refuse an image that no sample can be made of, by its header. Raises `ImageError`."""
    check_size(image_size(image), image_name(image))


def check_pixels(image: ImageLike) -> None:
    """The same by decoding it, as training will. Raises `ImageError`."""
    opened = open_image(image)
    check_size((opened.height, opened.width), image_name(image))
