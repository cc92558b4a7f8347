"""Plain multi-image ShareGPT, as LLaMA-Factory and ms-swift read it, to the project's own records where it maps.

Differences that are only of form are taken away: `messages` with `role` and `content`, the roles `user` and
`assistant`, a system prompt of text, white space around `<image>`, `images` as one path or as objects with a path, no
id. What a trajectory has no place for is refused. Columns and tags: LLaMA-Factory `data/README.md`
(`formatting: sharegpt`), ms-swift "Custom dataset".
"""

import re

from clvr_train.data.records import FieldError, Foreign, shown
from clvr_train.method.protocol import CONTINUE_TURN, IMAGE_TURN

_ROLES = {"user": "human", "assistant": "gpt"}
_REMOVE = "a trajectory has no place for it; remove the key or the record"
_JUDGED = "it tells good answers from bad, and every record is trained on as good; keep the good ones, without the key"
_NO_PLACE = dict.fromkeys(("tools", "videos", "audios", "objects"), _REMOVE) | dict.fromkeys(
    ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "kto_tag"), _JUDGED
)
_EMPTY = (None, "", [], {})
# Forms that hold no list of turns: the keys by which they are known.
_NOT_READ = {("query", "response"): "ms-swift", ("instruction", "output"): "Alpaca"}
KEYS = (*_NO_PLACE, "label", "system", *(key for keys in _NOT_READ for key in keys))  # what is looked at besides turns
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}")
_BASE64_IMAGES = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "Qk0")  # PNG, JPEG, WebP, GIF, BMP


def to_own(record: object, name: str) -> object:
    """The record in the project's own form; one that is so already, or is nothing of the kind, comes back as it is.

    Args:
        name: the id of a record that has none.

    Raises:
        FieldError: for what is well formed elsewhere and maps to no trajectory.
    """
    if not isinstance(record, dict):
        return record
    _refuse_no_place(record)
    if not ("messages" in record or "conversations" in record):
        _refuse_other_forms(record)
        return record
    key = "conversations" if "conversations" in record else "messages"
    if not isinstance(record[key], list):
        raise FieldError(key, "must be a list", "wrong_type")
    turns = [_own_turn(turn, number, f"{key}[{number}]") for number, turn in enumerate(record[key], start=1)]
    rounds = _without_system(turns, record.get("system"))
    own = Foreign(id=record.get("id", name), conversations=rounds)
    own.key, own.turns_before = key, len(turns) - len(rounds)
    if "images" in record:
        images = [record["images"]] if isinstance(record["images"], str) else record["images"]
        if isinstance(images, list):
            images = [_own_image(image, f"images[{number}]") for number, image in enumerate(images, start=1)]
        own["images"] = images
    return own


def _refuse_other_forms(record: dict) -> None:
    for keys, origin in _NOT_READ.items():
        if any(key in record for key in keys):
            message = (
                f"is missing; the {' and '.join(keys)} of {origin} are not read: write them as a list of turns, "
                '{"from": "human" or "gpt", "value": text}'
            )
            raise FieldError("conversations", message, "missing_field")


def _refuse_no_place(record: dict) -> None:
    for field, message in _NO_PLACE.items():
        if record.get(field) not in _EMPTY:
            raise FieldError(field, message, "no_place")
    # In messages it is KTO's or a classifier's; elsewhere a note like any other, unless it can only be KTO's.
    label = record.get("label")
    if label not in _EMPTY and ("messages" in record or isinstance(label, bool)):
        raise FieldError("label", _JUDGED, "no_place")


def _own_turn(turn: object, number: int, field: str) -> object:
    if not isinstance(turn, dict):
        return turn
    role, value = (turn.get(new, turn.get(old)) for new, old in (("from", "role"), ("value", "content")))
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if turn.get("loss") is not None:
        message = "loss: the loss is on every turn of the assistant and on no other; remove the key, or the turn"
        raise FieldError(field, message, "no_place")
    if isinstance(value, list):
        message = f"content in parts; write it as one text with {IMAGE_TURN} and the files in images"
        raise FieldError(field, message, "no_place")
    if role == "gpt" and isinstance(value, str) and IMAGE_TURN in value:
        message = f"{IMAGE_TURN} in the assistant's text; the image is the next turn of the user"
        raise FieldError(field, message, "image_marker")
    answers = number > 1 and role == "human" and isinstance(value, str)
    if answers and value.strip() in (IMAGE_TURN, CONTINUE_TURN):
        value = value.strip()
    return {"from": role, "value": value}


def _without_system(turns: list, system: object) -> list:
    # The controller is trained and run without a system prompt, so a text there may go; an image may not.
    if turns and isinstance(turns[0], dict) and turns[0]["from"] == "system":
        system, turns = turns[0]["value"], turns[1:]
    if isinstance(system, str) and IMAGE_TURN in system:
        raise FieldError("system", f"the system prompt holds {IMAGE_TURN}, and a trajectory has none", "no_place")
    return turns


def _own_image(image: object, field: str) -> object:
    """ms-swift also writes an image as an object of `path` and `bytes`."""
    inside = isinstance(image, dict) and image.get("bytes")
    text = inside or (image.get("path") if isinstance(image, dict) else image)
    if isinstance(text, str) and (inside or _is_base64(text.strip())):
        message = f"an image in base64 ({shown(text[:20])}...); write it to a file and name the file"
        raise FieldError(field, message, "base64")
    if isinstance(image, dict) and not image.get("bytes") and isinstance(image.get("path"), str):
        return image["path"]
    return image


def _is_base64(text: str) -> bool:
    likely = text.startswith(_BASE64_IMAGES) or len(text) > 255  # longer than any name of a file
    return likely and _BASE64.fullmatch(text) is not None
