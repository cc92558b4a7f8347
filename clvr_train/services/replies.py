"""What goes into a question and what may come out of a reply: text of others is quoted, values are read strictly; and a
folder of replies.

A judge or a teacher answers in a demanded form and in nothing else. What is not wholly in that form is no answer: a
number in the middle of prose may be one that the model read in the prompt or in the image.
"""

import json
import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any
from uuid import uuid4

logger = logging.getLogger(__name__)
_THOUGHT = re.compile(r"\A\s*<think>.*</think>", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n(.*)\n```\Z", re.DOTALL)


def quoted(text: str) -> str:
    """A text as a JSON string between quotes: it can end neither its quotation nor its line, and spells no special
    token of a chat template, since `<` and `[` are escaped too.
    """
    return json.dumps(text, ensure_ascii=False).replace("<", "\\u003c").replace("[", "\\u005b")


def answer_of(text: str) -> str:
    """The answer in a reply: without a thought `<think>...</think>` before it and a code fence around it."""
    answer = _THOUGHT.sub("", text).strip()
    fence = _FENCE.match(answer)
    return fence[1].strip() if fence else answer


def read_object(text: str, fields: Collection[str]) -> dict[str, Any]:
    """The JSON object that the answer is, with exactly these fields.

    Raises:
        ValueError: there is anything else around it, a field is missing, unknown or repeated, a number is not finite.
    """
    found = strict_json(answer_of(text))
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    if found.keys() != set(fields):
        raise ValueError(f"the fields {', '.join(map(repr, fields))} are needed, got {', '.join(map(repr, found))}")
    return found


def strict_json(text: str) -> Any:
    """JSON in which no field comes twice and every number is finite.

    Raises:
        ValueError: otherwise.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field comes twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is no finite number")
    return number


class ReplyCache:
    """A folder of replies by key that any number of processes use at once; an entry is `<ab>/<key>.json`.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> str | None:
        """The reply, or None if there is none, or no more than a power cut has left of it."""
        try:
            text = strict_json(self._path(key).read_text(encoding="utf-8"))["text"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return text if isinstance(text, str) else None

    def put(self, key: str, text: str) -> None:
        """Keeps a reply: readers see all of it or nothing. A full disk costs the entry, not the reply."""
        path = self._path(key)
        staging = path.with_name(f"{uuid4().hex}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            staging.write_text(json.dumps({"text": text}), encoding="utf-8")
            os.replace(staging, path)
        except OSError as error:
            logger.warning("%s: a reply was not kept (%s)", self.folder, error.strerror)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def is_unicode(text: str) -> bool:
    """Whether a file can hold it: JSON can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
