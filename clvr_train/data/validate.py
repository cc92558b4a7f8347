"""Every record of a data set held against every rule, in parallel, on past the bad ones."""

import contextlib
import io
import multiprocessing
import signal
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags

from clvr_train.data import captions, readers
from clvr_train.data.captions import ENDINGS, IMAGE_BYTES, fine_t2i_sample, flux_reason_sample, row_groups
from clvr_train.data.cells import Cells
from clvr_train.data.images import UNREADABLE, ImageError, image_name, open_still, orientation
from clvr_train.data.readers import check_pixels, chunks, open_entry
from clvr_train.data.records import Chunk, DataError, FieldError, one_line
from clvr_train.data.sharegpt import check_new_id
from clvr_train.data.stored import in_memory
from clvr_train.data.tar_index import numbered_records
from clvr_train.method.trajectory import Sample, StoredImage

FORMS = ("trajectories", *ENDINGS)
MAX_OFFENDERS = 10_000
_CHUNK_ROWS, _CHUNK_RECORDS = 256, 32  # of parquet, of tars
_MAY_HOLD_EXIF = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}  # chunks of a PNG: ImageMagick writes EXIF as text
_CHUNKS_AHEAD = 4  # of a worker: what is read and not yet checked stays bounded

# What a refused record broke: the codes of all rules, and what each asks for.
RULES = {
    "empty_file": "at least one record",
    "bad_container": "the parquet file or tar shard can be read to its end",
    "bad_utf8": "text is UTF-8",
    "truncated_json": "JSON does not end in the middle",
    "bad_json": "a record is JSON",
    "too_long": "a record has at most 64 MiB, a stored image 512 MiB",
    "missing_field": "every field, column and member that is read is there",
    "wrong_type": "texts are texts, lists are lists",
    "empty_text": "id, goal and caption are not empty",
    "bad_text": "no half of a surrogate pair",
    "duplicate_id": "no two records have the same id, over all files, nor the same key in a tar",
    "no_place": "nothing that a trajectory cannot hold (tools, videos, preferences, content in parts)",
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
    "base64": "no image as text in place of a file",
    "outside_root": "images lie inside the folder",
    "missing_image": "the image is there",
    "not_an_image": "the bytes are an image",
    "unreadable_image": "the image can be decoded",
    "damaged_png": "the chunks of a PNG are whole, to the last one (IEND)",
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
    """What a validation found; a record counts for the first rule that it breaks.

    `left_out` are rows without the chosen caption: training does not read them, and they are none of `records`.
    """

    records: int = 0
    refused: int = 0
    left_out: int = 0
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
        for offender in offenders:
            offender["file"] = one_line(offender["file"])  # a name that is no UTF-8 could not be written
        by_rule = dict(self.by_rule.most_common())
        return {"records": self.records, "refused": self.refused, "by_rule": by_rule, "offenders": offenders}


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
        caption: of `flux_reason`, as `data.captions.FluxReason` takes it.

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
    for chunk, outcomes in _checked(source, check, workers):
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


# ---------------------------------------------------------------------------- captions, some records at a time


@dataclass(frozen=True)
class CaptionChunk:
    """Consecutive records of a file: made cheaply in the order of the corpus, opened in any process (it pickles).

    `records` are numbers, from 1, each with what `open` takes after it to give the sample; or with what is wrong; or
    with None if training leaves it out.
    """

    file: Path
    weight: int  # bytes of the file, for a progress bar
    open: Callable[..., Sample]
    records: tuple[tuple[int, tuple | FieldError | None], ...]
    forwards: bool = False  # behind a record that cannot be read none can


def caption_chunks(path: Path, form: str, caption: str) -> Iterator[CaptionChunk]:
    """The records of a corpus in order, on past what cannot be read: an error stands where a file ends too early."""
    of_file = partial(_parquet_chunks, column=f"caption_{caption}") if form == "flux_reason" else _tar_chunks
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
            yield CaptionChunk(file, rest, _open_row, ((error.record, wrong),))


def _parquet_chunks(name: str, file: Path, column: str) -> Iterator[CaptionChunk]:
    """Of rows of one row group each."""
    before = 0
    for group, (num_rows, kept, weight) in enumerate(row_groups(file, column)):
        has_caption = np.ones(num_rows, bool) if kept is None else np.isin(np.arange(num_rows), kept)
        open_row = partial(_open_row, name, file, column, group, before)
        for first in range(0, num_rows, _CHUNK_ROWS):
            part = has_caption[first : first + _CHUNK_ROWS].tolist()
            records = tuple((before + first + n, () if has else None) for n, has in enumerate(part, start=1))
            yield CaptionChunk(file, weight * len(part) // num_rows, open_row, records, forwards=True)
        before += num_rows


_cells = Cells(1)  # of a worker: it goes on reading a row group where its last chunk ended


def _open_row(name: str, file: Path, column: str, group: int, before: int, number: int) -> Sample:
    """The sample, once its image is found to be there. Raises `FieldError`."""
    row = number - before - 1
    sample = flux_reason_sample(_cells, name, file, group, row, number, column)
    try:
        _cells.read(file, group, row, IMAGE_BYTES)
    except OSError as error:
        raise FieldError("image", str(error), "bad_container") from error
    return sample


def _tar_chunks(name: str, file: Path) -> Iterator[CaptionChunk]:
    start, end, records = 0, 0, []
    open_record = partial(fine_t2i_sample, name, file)
    for number, key, members, end in numbered_records(file):
        records.append((number, members if isinstance(members, FieldError) else (key, members)))
        if len(records) == _CHUNK_RECORDS:
            yield CaptionChunk(file, end - start, open_record, tuple(records))
            start, records = end, []
    if records:
        yield CaptionChunk(file, end - start, open_record, tuple(records))


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


def check_strictly(image: Path | StoredImage) -> None:
    """Refuse also what this project's preprocessing would mend and other programs may not.

    Raises:
        ImageError: as `data.readers.check_pixels`; or for a PNG of damaged chunks, an EXIF orientation, a palette with
            transparency, CMYK.
    """
    if isinstance(image, StoredImage):
        try:
            image = in_memory(image.name, image.read())  # read once
        except OSError as error:
            raise ImageError(f"{image.name}: unreadable image ({error})") from error
    check_pixels(image)
    name, content = image_name(image), image.read() if isinstance(image, StoredImage) else image.read_bytes()
    with open_still(io.BytesIO(content)) as opened:
        turned = orientation(opened)
        if opened.format == "PNG" and _check_chunks(name, content) and turned == 1:
            turned = _orientation_behind(content)
        if turned != 1:
            message = f"{name}: EXIF orientation {turned}; turn the pixels and save it without"
            raise ImageError(message, "exif_rotation")
        if opened.mode in ("P", "PA") and opened.has_transparency_data:
            message = f"{name}: a palette with transparency; lay it on a background and save it as RGB"
            raise ImageError(message, "palette_transparency")
        if opened.mode == "CMYK":
            raise ImageError(f"{name}: CMYK; convert it to sRGB and save it as RGB", "cmyk")


def _check_chunks(name: str, content: bytes) -> bool:
    """Go over the chunks of a PNG to IEND, which Pillow can do without; tell if EXIF may stand behind the pixels.

    Raises:
        ImageError: for a chunk that is cut off; for a wrong checksum of one that a decoder must read (PNG, 5.4).
    """
    at, kind, kinds = 8, b"", []
    while kind != b"IEND":
        end = at + 8 + int.from_bytes(content[at : at + 4])
        kind, checksum = content[at + 4 : at + 8], content[end : end + 4]
        if len(checksum) < 4:
            raise ImageError(f"{name}: a PNG that is cut off before its end (IEND); save it again", "damaged_png")
        if kind[:1].isupper() and int.from_bytes(checksum) != zlib.crc32(memoryview(content)[at + 4 : end]):
            message = f"{name}: a PNG whose chunk {kind.decode('latin-1')} has a wrong checksum; save it again"
            raise ImageError(message, "damaged_png")
        kinds.append(kind)
        at = end + 4
    behind = kinds[len(kinds) - kinds[::-1].index(b"IDAT") :] if b"IDAT" in kinds else kinds
    return not _MAY_HOLD_EXIF.isdisjoint(behind)


def _orientation_behind(content: bytes) -> int:
    """The orientation that Pillow tells of a PNG once it is decoded; 1 of EXIF that cannot be read."""
    with contextlib.suppress(*UNREADABLE), open_still(io.BytesIO(content)) as opened:
        opened.load()
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


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
