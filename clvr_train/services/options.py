"""Where a chat server is and how it is asked; what of it may be wrong or secret."""

import os
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx


@dataclass(frozen=True)
class ChatOptions:
    """Where a server is and how it is asked. Seconds are of wall time, prices in USD for a million tokens."""

    url: str  # up to and with /v1
    model: str
    key_env: str | None = None  # the environment variable that holds the key
    limit: int = 32  # requests under way at once
    attempt_s: float = 60.0  # for one attempt, to its last byte
    deadline_s: float = 180.0  # for all attempts of a request and the waits between them
    retries: int = 4
    backoff_s: float = 0.5  # before the second attempt, doubled for every further one, times 0.5 .. 1.5
    max_tokens: int = 1024
    max_reply_bytes: int = 1_000_000
    breaker: int = 16  # so many requests in a row without a reply, and the rest fail at once
    cooldown_s: float = 30.0  # until one request may try again
    cache: str | None = None  # folder of accepted replies
    price_in: float = 0.0
    price_out: float = 0.0


def retry_after_s(header: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for, as a number or a date; None without a header that says so."""
    if header is None:
        return None
    try:
        if header.isascii() and header.isdigit():
            return float(header)
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def checked_url(text: str) -> str:
    """The URL without its last slash. Raises ValueError, without what may be a secret."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise ValueError("url: cannot be read") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("url: http://host:port/v1 or https://... is needed")
    if url.userinfo or url.query or url.fragment:
        raise ValueError(f"url of {url.host}: without name, password and query; a key comes from key_env")
    return text.rstrip("/")


def key_of(variable: str | None) -> str | None:
    """The key in an environment variable; None without a variable. Raises ValueError, without the key."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"key_env={variable}: the environment variable is not set")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"key_env={variable}: its value cannot be sent as a key")
    return key
