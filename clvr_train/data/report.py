"""The rules that a validation holds records against, and the report of what it found."""

from collections import Counter
from dataclasses import dataclass, field

from clvr_train.data.records import DataError, one_line

MAX_OFFENDERS = 10_000

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
