"""The grammar of a record: a decoded JSON object to a `Trajectory` and back, whatever file it lies in.

`{"id": ..., "conversations": [{"from": "human", "value": goal}, {"from": "gpt", "value": "r_1\\ngenerate <IMG_GEN_1>"},
{"from": "human", "value": "<image>"}, ...], "images": [...]}`: ShareGPT (CLVR A.3, A.6). The full grammar, and every
rule with its code, stand in `docs/data_format.md`. Nothing here opens a file: what an item of `images` means, the
container says.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from clvr_train.method.protocol import CONTINUE_TURN, IMAGE_TURN, MEDIA_MARKERS, ProtocolError, format_turn, parse_turn
from clvr_train.method.trajectory import DRAWING_ACTIONS, ImageLike, Step, Trajectory

ROLES = ("human", "gpt")
_FIELDS = {"id": str, "conversations": list, "images": list}
_TURN_FIELD = re.compile(r"conversations\[([0-9]+)\](|\.from|\.value)")
_NAMES = {".from": ".role", ".value": ".content"}
_DRAWN_MARKER = "<IMG_GEN_"
_SURROGATE = re.compile("[\ud800-\udfff]")


def one_line(text: str, limit: int = 500) -> str:
    """Text for a message: what cannot be printed is escaped, and the middle of what is longer than `limit` left out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _middle_out(text, limit))
    return _middle_out(text, limit)


def _middle_out(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[len(text) + 5 - (limit - limit // 2) :]}"


def shown(value: object) -> str:
    """A value of a record for a message: in quotes if it is a text, in one line of at most 80 characters."""
    return one_line(repr(value), 80)


class FieldError(ValueError):
    """A field of a record breaks a rule; `rule` is its short code. Who knows file and record makes a `DataError`.

    Its texts are kept in one line.
    """

    def __init__(self, field: str, message: str, rule: str) -> None:
        field, message = one_line(field), one_line(message)
        super().__init__(field, message, rule)
        self.field, self.message, self.rule = field, message, rule

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class DataError(ValueError):
    """A record is not usable: `<file>:<number or id of it>: <field>: <message>`, and the short code of the rule."""

    def __init__(self, file: Path | str, record: int | str, field: str, message: str, rule: str) -> None:
        field, message = one_line(field), one_line(message)
        super().__init__(str(file), record, field, message, rule)  # as they stand, so that workers can send it
        self.file, self.record, self.field, self.message, self.rule = self.args

    def __str__(self) -> str:
        return f"{one_line(self.file)}:{self.record}: {self.field}: {self.message}"

    @classmethod
    def at(cls, file: Path | str, record: int, error: FieldError) -> "DataError":
        return cls(file, record, error.field, error.message, error.rule)


# What an item of `images` stands for, given with the name of its field; raises FieldError.
Resolve = Callable[[object, str], ImageLike]


class Foreign(dict):
    """A record in the project's own form whose turns have other names in its file.

    There they stand in `key`, behind `turns_before` more, with `role` and `content` if it is "messages".
    """

    key = "conversations"
    turns_before = 0

    def in_file(self, field: str) -> str:
        """What a field of the own form is called in the file."""
        turn = _TURN_FIELD.fullmatch(field)
        if turn is None:
            return self.key if field == "conversations" else field
        name = _NAMES.get(turn[2], turn[2]) if self.key == "messages" else turn[2]
        return f"{self.key}[{int(turn[1]) + self.turns_before}]{name}"


@dataclass(frozen=True)
class Entry:
    """A record as its file holds it.

    `record` is what was decoded, or the FieldError that says why it could not be. `resolve` gives two pointers to the
    image of an item of `images`: the one that lasts, and one to check it by now, which may be cheaper.
    """

    number: int
    record: object
    resolve: Callable[[object, str], tuple[ImageLike, ImageLike]]


class Chunk(Protocol):
    """Some records of a file: made cheaply in file order, opened in any process (it pickles)."""

    file: Path
    weight: int  # bytes of the file, for a progress bar

    def entries(self) -> Iterator[Entry]: ...


# ---------------------------------------------------------------------------- reading


def to_trajectory(record: object, resolve: Resolve) -> Trajectory:
    """The trajectory of a record of the project's own grammar (`data.foreign.to_own` makes others so).

    Args:
        resolve: gives the image that an item of `images` stands for, and refuses an item that stands for none.

    Raises:
        FieldError: for the first rule that the record breaks.
    """
    try:
        return _to_trajectory(record, resolve)
    except FieldError as error:
        if not isinstance(record, Foreign):
            raise
        raise FieldError(record.in_file(error.field), error.message, error.rule) from error


def _to_trajectory(record: object, resolve: Resolve) -> Trajectory:
    if not isinstance(record, dict):
        raise FieldError("record", "must be a JSON object", "wrong_type")
    for field, kind in _FIELDS.items():
        if field not in record:
            raise FieldError(field, "is missing", "missing_field")
        if not isinstance(record[field], kind):
            raise FieldError(field, f"must be a {'string' if kind is str else 'list'}", "wrong_type")
    check_text(record["id"], "id")
    values = [_turn_value(turn, index) for index, turn in enumerate(record["conversations"])]
    rounds = _rounds(values, len(record["images"]))
    for field, text in (("id", record["id"]), ("goal", values[0])):
        if not text.strip():
            raise FieldError(field, "must not be empty", "empty_text")
    images = iter([resolve(value, f"images[{n}]") for n, value in enumerate(record["images"], start=1)])
    steps = tuple(Step(r, action, next(images) if action in DRAWING_ACTIONS else None) for r, action in rounds)
    return Trajectory(record["id"], values[0], steps)


def _rounds(values: list[str], num_images: int) -> list[tuple[str, str]]:
    """(reasoning, action) of every round, once the turns are found to follow the grammar."""
    if len(values) < 2:
        raise FieldError("conversations", "needs a goal (human) and at least one round (gpt)", "no_rounds")
    check_goal(values[0], _where(0))
    rounds: list[tuple[str, str]] = []
    number = 0
    for index in range(1, len(values), 2):
        try:
            reasoning, action = parse_turn(values[index], number + 1)
        except ProtocolError as error:
            raise FieldError(_where(index), str(error), error.rule) from error
        number += action in DRAWING_ACTIONS
        _check_answer(action, values[index + 1] if index + 1 < len(values) else None, _where(index + 1))
        if number > num_images:
            message = f"has {num_images} files for {number} or more {IMAGE_TURN} turns"
            raise FieldError("images", message, "image_count")
        rounds.append((reasoning, action))
    if number != num_images:
        raise FieldError("images", f"has {num_images} files for {number} {IMAGE_TURN} turns", "image_count")
    return rounds


def check_goal(goal: str, field: str) -> None:
    """Refuse a goal that holds what only images and rounds have. Raises `FieldError`."""
    if IMAGE_TURN in goal:
        message = f"the goal holds {IMAGE_TURN}; images follow the round that drew them"
        raise FieldError(field, message, "image_marker")
    if _DRAWN_MARKER in goal:
        raise FieldError(field, f"the goal holds {_DRAWN_MARKER}n>, and nothing is drawn yet", "unknown_image")
    for marker in MEDIA_MARKERS:
        if marker in goal:
            raise FieldError(field, f"the goal holds {marker}, and a trajectory holds images only", "no_place")


def _check_answer(action: str, answer: str | None, field: str) -> None:
    expected = IMAGE_TURN if action in DRAWING_ACTIONS else CONTINUE_TURN if action == "verify" else None
    # A trajectory may end with a verify that nobody answers, but an image that was drawn must be there.
    if answer != expected and not (action == "verify" and answer is None):
        message = f"must be {expected!r} after {action!r}" if expected else "nothing follows 'stop'"
        raise FieldError(field, message, "wrong_answer")


def _turn_value(turn: object, index: int) -> str:
    role, field = ROLES[index % 2], f"conversations[{index + 1}].from"
    if not isinstance(turn, dict):
        raise FieldError(f"conversations[{index + 1}]", "must be an object with 'from' and 'value'", "wrong_type")
    if turn.get("from") != role:
        if turn.get("from") not in ROLES:
            message = f"{shown(turn.get('from'))} is no role; must be {role!r}: human and gpt take turns"
            raise FieldError(field, message, "unknown_role")
        raise FieldError(field, f"must be {role!r}: human and gpt take turns", "turn_order")
    if not isinstance(turn.get("value"), str):
        raise FieldError(_where(index), "must be a string", "wrong_type")
    check_text(turn["value"], _where(index))
    return turn["value"]


def check_text(text: str, field: str) -> None:
    """Refuse text that cannot be written as UTF-8. Raises `FieldError`."""
    if _SURROGATE.search(text):
        raise FieldError(field, "holds half a surrogate pair, which is no text", "bad_text")


def _where(index: int) -> str:
    return f"conversations[{index + 1}].value"


# ---------------------------------------------------------------------------- writing


def to_record(trajectory: Trajectory, images: Sequence[object]) -> dict:
    """The record of a trajectory, the inverse of `to_trajectory`.

    Args:
        images: an item of `images` for every image of the trajectory, in order: what the container's `resolve` takes.

    Raises:
        FieldError: if a text would not come back as it is.
    """
    check_text(trajectory.id, "id")
    check_text(trajectory.goal, "goal")
    check_goal(trajectory.goal, "goal")
    turns = [{"from": "human", "value": trajectory.goal}]
    number = 0
    for index, step in enumerate(trajectory.steps, start=1):
        number += step.draws
        check_text(step.reasoning, f"steps[{index}].reasoning")
        try:
            turns.append({"from": "gpt", "value": format_turn(step, number)})
        except ProtocolError as error:
            raise FieldError(f"steps[{index}].reasoning", str(error), error.rule) from error
        if step.action != "stop":
            turns.append({"from": "human", "value": IMAGE_TURN if step.draws else CONTINUE_TURN})
    return {"id": trajectory.id, "conversations": turns, "images": list(images)}
