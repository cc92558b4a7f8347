"""Plain multi-image ShareGPT, as LLaMA-Factory and ms-swift read it, to the project's own records where it maps.

Differences that are only of form are taken away: `messages` with `role` and `content`, the roles `user` and
`assistant`, a system prompt of text, white space around `<image>`, `images` as one path or as objects with a path, no
id. What a trajectory has no place for is refused. Columns and tags: LLaMA-Factory `data/README.md`
(`formatting: sharegpt`), ms-swift "Custom dataset".
"""

from clvr_train.data.records import FieldError
from clvr_train.method.protocol import CONTINUE_TURN, IMAGE_TURN

_ROLES = {"user": "human", "assistant": "gpt"}
_NO_PLACE = ("tools", "videos", "audios", "chosen", "rejected", "rejected_response")


def to_own(record: object, name: str) -> object:
    """The record in the project's own form; one that is so already, or is nothing of the kind, comes back as it is.

    Args:
        name: the id of a record that has none.

    Raises:
        FieldError: for what is well formed elsewhere and maps to no trajectory.
    """
    if not isinstance(record, dict) or not ("messages" in record or "conversations" in record):
        return record
    for field in _NO_PLACE:
        if record.get(field):
            raise FieldError(field, "a trajectory has no place for it; remove the key or the record", "no_place")
    key = "conversations" if "conversations" in record else "messages"
    if not isinstance(record[key], list):
        raise FieldError(key, "must be a list", "wrong_type")
    turns = [_own_turn(turn, number, f"{key}[{number}]") for number, turn in enumerate(record[key], start=1)]
    own = {"id": record.get("id", name), "conversations": _without_system(turns, record.get("system"))}
    if "images" in record:
        images = [record["images"]] if isinstance(record["images"], str) else record["images"]
        own["images"] = [_own_image(image) for image in images] if isinstance(images, list) else images
    return own


def _own_turn(turn: object, number: int, field: str) -> object:
    if not isinstance(turn, dict):
        return turn
    role, value = (turn.get(new, turn.get(old)) for new, old in (("from", "role"), ("value", "content")))
    role = _ROLES.get(role, role) if isinstance(role, str) else role
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


def _own_image(image: object) -> object:
    """ms-swift also writes an image as an object of `path` and `bytes`."""
    if isinstance(image, dict) and not image.get("bytes") and isinstance(image.get("path"), str):
        return image["path"]
    return image
