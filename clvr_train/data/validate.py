"""Every record of a data set held against every rule, in parallel, on past the bad ones."""

import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from pathlib import Path

from clvr_train.data import captions, fine_t2i, flux_reason, readers
from clvr_train.data.captions import CaptionChunk
from clvr_train.data.images import ImageError
from clvr_train.data.readers import chunks, open_entry
from clvr_train.data.records import Chunk, DataError, FieldError
from clvr_train.data.report import Report
from clvr_train.data.sharegpt import check_new_id
from clvr_train.data.strict import check_strictly

# The forms of data sets; of corpora, how the names of their files end.
ENDINGS = {"flux_reason": flux_reason.ENDING, "fine_t2i": fine_t2i.ENDING}
FORMS = ("trajectories", *ENDINGS)
_CHUNKS_AHEAD = 4  # of a worker: what is read and not yet checked stays bounded


def data_files(path: Path, form: str = "trajectories") -> list[Path]:
    """The files of a data set, in the order in which they are read.

    Args:
        form: one of `FORMS`.

    Raises:
        FileNotFoundError: there is nothing of the kind.
        ValueError: there is no such form; or see `data.readers.find_files`.
    """
    if form not in FORMS:
        raise ValueError(f"format={form!r} is not one of {', '.join(FORMS)}")
    if form == "trajectories":
        return readers.find_files(path)
    return [file for _, file in captions.find_files(path, ENDINGS[form])]


def validate(
    path: Path,
    workers: int,
    on_chunk: Callable[[int, Report], None] | None = None,
    form: str = "trajectories",
    caption: str = "detail",
) -> Report:
    """Read every record of a file or folder once, decode every image, and report what is refused.

    A file that cannot be read on counts as one refused record, at the place where it ends. Memory holds a few chunks of
    records, and all ids of trajectories or all keys of a tar.

    Args:
        workers: processes that check; 0: this one alone.
        on_chunk: called as records are checked, with bytes of the data files and the report so far.
        form: what the path holds, one of `FORMS`.
        caption: of `flux_reason`, as `data.flux_reason.FluxReason` takes it.

    Raises:
        FileNotFoundError, ValueError: there is nothing to validate (`data_files`).
        ChildProcessError: a worker was killed.
    """
    report, seen = Report(), set()
    files = data_files(path, form)
    if form == "trajectories":
        source, check = chunks(path), check_trajectories
    else:
        source, check = caption_chunks(path, form, caption), check_captions
    with closing(_checked(source, check, workers)) as checked:
        for chunk, outcomes in checked:
            for number, outcome in outcomes:
                if outcome is None:
                    report.left_out += 1
                    continue
                report.records += 1
                try:
                    if isinstance(outcome, FieldError):
                        raise outcome
                    if outcome:
                        check_new_id(outcome, seen)
                except FieldError as error:
                    report.refuse(DataError.at(chunk.file, number, error))
            if on_chunk is not None:
                on_chunk(chunk.weight, report)
    if not report.records:
        report.records = 1
        message = "no record has this caption" if report.left_out else "the file is empty"
        report.refuse(DataError(files[0], 1, "record", message, "empty_file"))
    return report


def caption_chunks(path: Path, form: str, caption: str) -> Iterator[CaptionChunk]:
    """The records of a corpus in order, on past what cannot be read: an error stands where a file ends too early."""
    of_file = fine_t2i.record_chunks
    if form == "flux_reason":
        of_file = partial(flux_reason.record_chunks, caption=caption)
    for name, file in captions.find_files(path, ENDINGS[form]):
        done = 0
        try:
            for chunk in of_file(name, file):
                done += chunk.weight
                yield chunk
        except (DataError, OSError) as error:
            if not isinstance(error, DataError):
                error = DataError(file, 1, "file", str(error), "bad_container")
            wrong = FieldError(error.field, error.message, error.rule)
            rest = file.stat().st_size - done if file.exists() else 0
            yield CaptionChunk(file, rest, ((error.record, wrong),))


# ---------------------------------------------------------------------------- what a worker does

# Number of the record, and: its id (empty if no other can have it), or what is wrong with it, or None if training
# leaves it out.
Outcomes = list[tuple[int, str | FieldError | None]]


def check_trajectories(chunk: Chunk) -> Outcomes:
    """Every record of a chunk opened and its images decoded."""
    outcomes: Outcomes = []
    for entry in chunk.entries():
        try:
            outcomes.append((entry.number, open_entry(chunk.file, entry, check_strictly).id))
        except FieldError as error:
            outcomes.append((entry.number, error))
    return outcomes


def check_captions(chunk: CaptionChunk) -> Outcomes:
    """The caption of every record of a chunk read and its image decoded."""
    outcomes: Outcomes = []
    end: FieldError | None = None
    for number, place in chunk.records:
        found = place
        if isinstance(place, tuple):
            found = end or _check_caption(chunk, number, place)
            if chunk.forwards and isinstance(found, FieldError) and found.rule == "bad_container":
                end = found  # to try the next would be to read all that comes before it again
        outcomes.append((number, found))
    return outcomes


def _check_caption(chunk: CaptionChunk, number: int, place: tuple) -> str | FieldError:
    try:
        sample = chunk.open(number, *place)
        check_strictly(sample.target)
    except FieldError as error:
        return error
    except ImageError as error:
        field = sample.target.name.rpartition(":")[2]
        return FieldError(field, str(error), error.rule)
    return ""


# ---------------------------------------------------------------------------- the pool

AnyChunk = Chunk | CaptionChunk


def _checked(
    source: Iterator[AnyChunk], check: Callable[[AnyChunk], Outcomes], workers: int
) -> Iterator[tuple[AnyChunk, Outcomes]]:
    """Chunks in order, each with what `check`, a function of a module, finds in it."""
    if workers == 0:
        yield from ((chunk, _quietly(check, chunk)) for chunk in source)
        return
    # Not by fork: this process has threads. Workers come of one server, which imports all of this once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    pending: deque[tuple[AnyChunk, Future]] = deque()
    try:
        for chunk in source:
            pending.append((chunk, pool.submit(_quietly, check, chunk)))
            if len(pending) >= workers * _CHUNKS_AHEAD:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _quietly(check: Callable[[AnyChunk], Outcomes], chunk: AnyChunk) -> Outcomes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on files that are refused or do no harm
        return check(chunk)


def _result(chunk: AnyChunk, future: Future) -> tuple[AnyChunk, Outcomes]:
    try:
        return chunk, future.result()
    except BrokenProcessPool as error:
        message = "a worker was killed, by lack of memory perhaps; use fewer workers (0: none)"
        raise ChildProcessError(f"{chunk.file}: {message}") from error
