"""One way to trajectories, whatever holds them: JSON, parquet or webdataset shards, a file or a folder of them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from clvr_train.data.foreign import to_own
from clvr_train.data.images import ImageError, check_size, image_name, image_size, open_image
from clvr_train.data.parquet import parquet_chunks
from clvr_train.data.records import Chunk, DataError, Entry, FieldError, to_trajectory
from clvr_train.data.refusals import Refusals
from clvr_train.data.shards import shard_chunks
from clvr_train.data.sharegpt import FILE_NAME, check_new_id, json_chunks
from clvr_train.method.trajectory import ImageLike, Trajectory

CONTAINERS: dict[str, Callable[[Path], Iterator[Chunk]]] = {
    ".jsonl": json_chunks,
    ".json": json_chunks,
    ".parquet": parquet_chunks,
    ".tar": shard_chunks,
}
# Of a folder's JSON files only these are trajectories; recipes leave others beside them.
_JSON_NAMES = (FILE_NAME, "trajectories.json")
MAX_THREADS = 16  # each holds what it decodes, and of parquet a page


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


def read_trajectories(
    path: Path, decode: bool = False, refusals: Refusals | None = None, limit: int | None = None
) -> Iterator[Trajectory]:
    """The trajectories of a file or folder, in file order; their images are pointers that `open_image` opens later.

    Every record is checked whole before it is given out. Of an image only the header is read unless `decode` (of one in
    parquet, all of it).

    Args:
        path: a `.jsonl`, `.json`, `.parquet` or `.tar` file, or a folder with `trajectories.jsonl`,
            `trajectories.json`, or parquet files, or shards.
        refusals: counts bad records, and says how many may be left out; without it none.
        limit: read no further than so many trajectories.

    Raises:
        FileNotFoundError: if there is nothing to read.
        DataError: at the first record that is malformed, or whose images are missing, unreadable, of no use or outside
            the folder, if none may be left out.
        ValueError: once more records are refused than may be.
    """
    check = check_pixels if decode else check_header
    yield from _accepted(Path(path), ((chunk, _opened(chunk, check)) for chunk in chunks(path)), refusals, limit)


def load_trajectories(
    path: Path,
    refusals: Refusals | None = None,
    limit: int | None = None,
    progress: Callable[[Iterator[Trajectory]], Iterable[Trajectory]] = iter,
) -> list[Trajectory]:
    """The same as `read_trajectories` with `decode`, whole; every core decodes. Raises as it does.

    Args:
        progress: wraps the iterator, as tqdm does.
    """
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(threads)  # they will do: Pillow decodes without holding Python's lock
    try:
        return list(progress(_accepted(Path(path), _opened_ahead(path, pool, 2 * threads), refusals, limit)))
    finally:  # not in a generator: the collector may end one in any thread, where to wait for others is a deadlock
        pool.shutdown(cancel_futures=True)


# Of every record: its number, and the trajectory, or what is wrong with it.
Opened = Iterable[tuple[int, Trajectory | FieldError]]


def _opened(chunk: Chunk, check: Callable[[ImageLike], None]) -> Opened:
    for entry in chunk.entries():
        try:
            yield entry.number, open_entry(chunk.file, entry, check)
        except FieldError as error:
            yield entry.number, error


def _opened_ahead(path: Path, pool: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[Chunk, Opened]]:
    pending: deque[tuple[Chunk, Future]] = deque()
    for chunk in chunks(path):
        pending.append((chunk, pool.submit(lambda one: list(_opened(one, check_pixels)), chunk)))
        if len(pending) == ahead:
            first, future = pending.popleft()
            yield first, future.result()
    yield from ((chunk, future.result()) for chunk, future in pending)


def _accepted(
    path: Path, opened: Iterator[tuple[Chunk, Opened]], refusals: Refusals | None, limit: int | None
) -> Iterator[Trajectory]:
    refusals = refusals or Refusals(path)
    yield from islice(_without_bad(opened, refusals), limit)
    if not refusals.records and limit != 0:
        raise DataError(find_files(path)[0], 1, "record", "the file is empty", "empty_file")
    refusals.finish()


def _without_bad(opened: Iterator[tuple[Chunk, Opened]], refusals: Refusals) -> Iterator[Trajectory]:
    seen: set[str] = set()
    for chunk, outcomes in opened:
        for number, outcome in outcomes:
            try:
                if isinstance(outcome, FieldError):
                    raise outcome
                check_new_id(outcome.id, seen)
            except FieldError as error:
                refusals.refuse(DataError.at(chunk.file, number, error))
                continue
            refusals.accept()
            yield outcome


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
