"""Secrets are read from the environment only; one that stands elsewhere does not get into what a run writes or says."""

import os
import re
from typing import Any

HIDDEN = "<redacted>"
_SECRET = r"(?:\w*[_.-])?(?:api_?key|access_key|secret|password|passwd)(?:_id|_key)?|\w*[_.-]token"
_NAME = re.compile(_SECRET, re.IGNORECASE)
_VALUES = (
    (re.compile(r"(:/{1,2})[^/\s@'\"]+(?=@)"), rf"\1{HIDDEN}"),  # user information of a URL, which a path makes :/
    (re.compile(r"(?<![A-Za-z0-9])sk-(?=[\w-]{16}|[a-z_-]*[0-9A-Z])[\w-]{8,}"), HIDDEN),  # OpenAI and what is like it
    (re.compile(r"(?<![A-Za-z0-9])hf_(?=\w{16}|[a-z]*[0-9A-Z])[A-Za-z0-9]{8,}"), HIDDEN),  # Hugging Face
    (re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_|github_pat_)\w{16,}"), HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic) +[\w.~+/-]{8,}=*"), rf"\1 {HIDDEN}"),
    (re.compile(rf"(?i)\b((?:{_SECRET})['\"]? ?[=:] ?['\"]?)(?!\$\{{)[^\s'\"&,;)}}\]]+"), rf"\1{HIDDEN}"),
)
_SHORTEST = 8  # characters: a shorter value of a variable may be a word that means nothing


def redact(value: Any) -> Any:
    """A text, or what JSON can hold, without secrets.

    What is hidden: the values of keys and environment variables that are called like a secret (`*_API_KEY`, `*_TOKEN`,
    `*_SECRET`, `*PASSWORD`), what looks like a key (`sk-...`, `hf_...`), and user information in URLs. References to
    variables, `${oc.env:NAME}`, stay.
    """
    if isinstance(value, dict):
        return {name: _hide(item) if _NAME.fullmatch(str(name)) else redact(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if len(secret) >= _SHORTEST and _NAME.fullmatch(name):
            value = value.replace(secret, HIDDEN)
    for pattern, replacement in _VALUES:
        value = pattern.sub(replacement, value)
    return value


def _hide(value: Any) -> Any:
    if isinstance(value, dict | list):
        return redact(value)
    return value if value in (None, "") or str(value).startswith("${") else HIDDEN
