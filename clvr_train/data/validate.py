"""Every record of a data set held against every rule, in parallel, on past the bad ones."""

import io
import multiprocessing
import signal
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from clvr_train.data.images import ImageError, orientation
from clvr_train.data.readers import check_pixels, chunks, find_files, open_entry
from clvr_train.data.records import Chunk, DataError, FieldError
from clvr_train.data.sharegpt import check_new_id
from clvr_train.data.stored import in_memory
from clvr_train.method.trajectory import StoredImage

MAX_OFFENDERS = 10_000
_CHUNKS_AHEAD = 4  # of a worker: what is read and not yet checked stays bounded

# What a refused record broke: the codes of all rules, and what each asks for.
RULES = {
    "empty_file": "at least one record",
    "bad_container": "the parquet file or tar shard can be read to its end",
    "bad_utf8": "text is UTF-8",
    "truncated_json": "JSON does not end in the middle",
    "bad_json": "a record is JSON",
    "too_long": "a record has at most 64 MiB, a stored image 512 MiB",
    "missing_field": "id, conversations and images are there, and every image of a trajectory",
    "wrong_type": "texts are texts, lists are lists",
    "empty_text": "id and goal are not empty",
    "bad_text": "no half of a surrogate pair",
    "duplicate_id": "no two records have the same id, over all files",
    "no_place": "nothing that a trajectory cannot hold (tools, videos, content in parts)",
    "no_rounds": "a goal and a round",
    "unknown_role": "only human and gpt (user, assistant) speak",
    "turn_order": "human and gpt take turns, human first",
    "unknown_action": "the last line of a gpt turn is an action",
    "empty_reasoning": "a reasoning before the action",
    "image_number": "<IMG_GEN_n> where an image is drawn, counted from 1",
    "unknown_image": "no reference to an image that is not drawn yet",
    "image_marker": "no <image> in goals and gpt turns, no <IMG_GEN_n> in reasonings",
    "wrong_answer": "<image> follows a drawing, continue a verify, nothing a stop",
    "image_count": "as many images as <image> turns",
    "url": "no URL in place of a file",
    "outside_root": "images lie inside the folder",
    "missing_image": "the image is there",
    "not_an_image": "the bytes are an image",
    "unreadable_image": "the image is whole",
    "too_many_pixels": "at most 50 million pixels",
    "small_side": "at least 64 px a side",
    "aspect": "an aspect of at most 8",
    "animated": "one frame",
    "mode": "8 or 16 bits a channel",
    "exif_rotation": "pixels stand upright without EXIF",
    "palette_transparency": "no transparent colours in a palette",
    "cmyk": "no CMYK",
}


@dataclass
class Report:
    """What a validation found; a record counts for the first rule that it breaks."""

    records: int = 0
    refused: int = 0
    by_rule: Counter = field(default_factory=Counter)
    offenders: list[DataError] = field(default_factory=list)

    def refuse(self, error: DataError) -> None:
        """Count an error, and keep it if it is one of the first `MAX_OFFENDERS`."""
        self.refused += 1
        self.by_rule[error.rule] += 1
        if len(self.offenders) < MAX_OFFENDERS:
            self.offenders.append(error)

    def as_json(self) -> dict:
        """Counts, `by_rule` as {rule: n}, and `offenders` as objects of file, record, field, rule, message."""
        keys = ("file", "record", "field", "rule", "message")
        offenders = [{key: getattr(error, key) for key in keys} for error in self.offenders]
        by_rule = dict(self.by_rule.most_common())
        return {"records": self.records, "refused": self.refused, "by_rule": by_rule, "offenders": offenders}


def validate(path: Path, workers: int, on_chunk: Callable[[int, Report], None] | None = None) -> Report:
    """Read every record of a file or folder of trajectories once, decode every image, and report what is refused.

    A file that cannot be read on counts as one refused record, at the place where it ends. Memory holds a few chunks of
    records and all ids.

    Args:
        workers: processes that check; 0: this one alone.
        on_chunk: called as records are checked, with bytes of the data files and the report so far.

    Raises:
        FileNotFoundError, ValueError: there is nothing to validate (`data.readers.find_files`).
        ChildProcessError: a worker was killed.
    """
    report, seen = Report(), set()
    files = find_files(path)
    for chunk, outcomes in _checked(chunks(path), workers):
        for number, outcome in outcomes:
            report.records += 1
            try:
                if isinstance(outcome, FieldError):
                    raise outcome
                check_new_id(outcome, seen)
            except FieldError as error:
                report.refuse(DataError.at(chunk.file, number, error))
        if on_chunk is not None:
            on_chunk(chunk.weight, report)
    if not report.records:
        report.records = 1
        report.refuse(DataError(files[0], 1, "record", "the file is empty", "empty_file"))
    return report


Outcomes = list[tuple[int, str | FieldError]]  # number of the record, and its id or what is wrong with it


def check_chunk(chunk: Chunk) -> Outcomes:
    """What a worker does: every record of a chunk opened and its images decoded."""
    outcomes: Outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on files that are refused or do no harm
        for entry in chunk.entries():
            try:
                outcomes.append((entry.number, open_entry(chunk.file, entry, check_strictly).id))
            except FieldError as error:
                outcomes.append((entry.number, error))
    return outcomes


def check_strictly(image: Path | StoredImage) -> None:
    """Refuse also what this project's preprocessing would mend and other programs may not.

    Raises:
        ImageError: as `data.readers.check_pixels`; or for an EXIF orientation, a palette with transparency, CMYK.
    """
    if isinstance(image, StoredImage):
        try:
            image = in_memory(image.name, image.read())  # read once
        except OSError as error:
            raise ImageError(f"{image.name}: unreadable image ({error})") from error
    check_pixels(image)
    name, source = (image.name, io.BytesIO(image.read())) if isinstance(image, StoredImage) else (image, image)
    with Image.open(source) as opened:
        turned = orientation(opened)
        if turned != 1:
            message = f"{name}: EXIF orientation {turned}; turn the pixels and save it without"
            raise ImageError(message, "exif_rotation")
        if opened.mode in ("P", "PA") and opened.has_transparency_data:
            message = f"{name}: a palette with transparency; lay it on a background and save it as RGB"
            raise ImageError(message, "palette_transparency")
        if opened.mode == "CMYK":
            raise ImageError(f"{name}: CMYK; convert it to sRGB and save it as RGB", "cmyk")


def _checked(source: Iterator[Chunk], workers: int) -> Iterator[tuple[Chunk, Outcomes]]:
    """Chunks in order, each with what was found in it."""
    if workers == 0:
        yield from ((chunk, check_chunk(chunk)) for chunk in source)
        return
    # Not by fork: this process has threads. Workers come of one server, which imports all of this once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    pending: deque[tuple[Chunk, Future]] = deque()
    try:
        for chunk in source:
            pending.append((chunk, pool.submit(check_chunk, chunk)))
            if len(pending) >= workers * _CHUNKS_AHEAD:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(chunk: Chunk, future: Future) -> tuple[Chunk, Outcomes]:
    try:
        return chunk, future.result()
    except BrokenProcessPool as error:
        message = "a worker was killed, by lack of memory perhaps; use fewer workers (0: none)"
        raise ChildProcessError(f"{chunk.file}: {message}") from error
