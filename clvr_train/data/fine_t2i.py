"""Fine-T2I: webdataset tars of `<key>.jpg`, `<key>.json` and `<key>.txt`.

arXiv 2602.09439, huggingface.co/datasets/ma-xu/fine-t2i.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from clvr_train.data.captions import CaptionChunk, Captions, check_caption, find_files
from clvr_train.data.jsonstream import parse_line
from clvr_train.data.records import DataError, FieldError, shown
from clvr_train.data.tar_index import Span, index_tar, numbered_records, read_head, read_span
from clvr_train.method.trajectory import Sample, StoredImage

ENDING = ".tar"
# What Fine-T2I names as the generator of a picture that was taken, not generated.
PHOTO_SOURCES = ("pexels", "pixabay", "unsplash_lite")
_IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
_CHUNK_RECORDS = 32


class FineT2I(Captions):
    """The records of tars.

    The caption is what the image was made from: `enhanced_prompt` if the image was generated with it or is a photograph
    (both prompts describe it, and the enhanced one says more), else `prompt`. The `.txt` is not read: it repeats one of
    the two, and some are empty. The ending of an image may be wrong; its bytes are believed.

    Args:
        source: a folder, searched whole, a tar, or tars.
        limit: use only the first so many.

    Raises:
        FileNotFoundError: without any tar.
        DataError: if a tar is damaged (see `data.tar_index.index_tar`).
        ValueError: if no record is left.
    """

    def __init__(self, source: Path | Sequence[Path], limit: int | None = None) -> None:
        files = find_files(source, ENDING)
        self._tars = [index_tar(path) for _, path in files]
        super().__init__(files, np.cumsum([len(tar) for tar in self._tars]), limit)

    def _sample(self, part: int, number: int) -> Sample:
        name, path = self.files[part]
        tar = self._tars[part]
        try:
            return fine_t2i_sample(name, path, number + 1, tar.key(number), tar.members(number))
        except FieldError as error:
            raise DataError.at(path, number + 1, error) from error


def fine_t2i_sample(name: str, path: Path, record: int, key: str, members: dict[str, Span]) -> Sample:
    """The sample of the members of a key: number `record` (from 1) of a tar called `name`.

    Raises:
        FieldError: if its caption cannot be read, or says nothing, or it has no image.
    """
    goal = _fine_t2i_caption(path, key, members)
    ending = next((ending for ending in _IMAGE_ENDINGS if ending in members), None)
    if ending is None:
        raise FieldError("jpg", f"{shown(key)} has no image beside it", "missing_image")
    offset, size = members[ending]
    image = StoredImage(
        f"{path}:{record}:{ending}",
        partial(read_span, path, offset, size),
        partial(read_head, path, offset, size),
    )
    return Sample(f"{name}:{key}", 1, goal, (), (), image)


def _fine_t2i_caption(path: Path, key: str, members: dict[str, Span]) -> str:
    """The text that the image of a record shows."""
    if "json" not in members:
        raise FieldError("json", f"{shown(key)} has none", "missing_field")
    try:
        fields = parse_line(read_span(path, *members["json"]))
    except FieldError as error:
        raise FieldError("json", error.message, error.rule) from error
    except OSError as error:
        raise FieldError("json", str(error), "bad_container") from error
    if not isinstance(fields, dict):
        raise FieldError("json", "must be a JSON object", "wrong_type")
    flag, source = "image_generated_with_enhanced_prompt", "image_generator"
    for field in (flag, source):
        if field not in fields:
            raise FieldError(f"json.{field}", "is missing", "missing_field")
    if not isinstance(fields[flag], bool | None):  # null of photographs
        raise FieldError(f"json.{flag}", f"must be true, false or null, not {shown(fields[flag])}", "wrong_type")
    field = "enhanced_prompt" if fields[flag] or fields[source] in PHOTO_SOURCES else "prompt"
    check_caption(fields.get(field), f"json.{field}")
    return fields[field]


def record_chunks(name: str, file: Path) -> Iterator[CaptionChunk]:
    """The records of a tar, some at a time, on past what is wrong with one; only headers are read."""
    start, end, records = 0, 0, []
    open_record = partial(fine_t2i_sample, name, file)
    for number, key, members, end in numbered_records(file):
        records.append((number, members if isinstance(members, FieldError) else (key, members)))
        if len(records) == _CHUNK_RECORDS:
            yield CaptionChunk(file, end - start, tuple(records), open_record)
            start, records = end, []
    if records:
        yield CaptionChunk(file, end - start, tuple(records), open_record)
