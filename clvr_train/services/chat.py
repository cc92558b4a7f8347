"""One client for chat servers that speak OpenAI's protocol: bounded, retried, cached; a failure is an answer without a
value.

A request is a conversation, at temperature 0 if nothing else is asked for. What can go wrong on the way (no connection,
no reply in time, a status of 4xx or 5xx, a body that is no chat completion) and what can be wrong with the reply
(refused, cut at `max_tokens`, not in the demanded form) comes back as `Answer.reason`, never as a value.
"""

import asyncio
import base64
import hashlib
import io
import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import anyio
import httpx
from PIL.Image import Image

from clvr_train.services.options import ChatOptions, checked_url, key_of, retry_after_s
from clvr_train.services.replies import ReplyCache, is_unicode, strict_json

logger = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request otherwise, through every progress bar

_RETRIED = (408, 429)  # and 5xx
_OF_THE_REQUEST = (400, 413, 422)  # statuses that say nothing about the server's health
_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class Answer:
    """What came of a request: the parsed value, or None with the reason.

    `away`: the server is to blame, and another request would fare no better now. `unusable`: there was a reply, but it
    is no value.
    """

    value: Any
    reason: str = ""
    text: str = ""
    away: bool = False
    unusable: bool = False


class ChatError(OSError):
    """No chat completion came of a request; not `away`: only this request is to blame."""

    def __init__(self, message: str, away: bool = True) -> None:
        super().__init__(message)
        self.away = away


def user_turn(*parts: str | Image) -> dict[str, Any]:
    """A user's message of texts and images in their order; images as data URLs of JPEGs of quality 95."""
    return {"role": "user", "content": [_part(part) for part in parts]}


def _part(part: str | Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": image_url(part, "JPEG", quality=95)}}


def image_url(image: Image, kind: str, **options: int) -> str:
    """A data URL of the image as JPEG or PNG; `options` are those of Pillow's `save`."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


class ChatClient:
    """Asks one server; safe to use from any number of threads.

    All sending is done in one event loop in a thread of its own, so that deadlines hold to the last byte of headers and
    body however slowly they trickle. Proxies and `.netrc` of the environment are not looked at. `counts` holds
    `requests`, `attempts`, `cached`, `failed` (no reply), `unusable` (a reply that is no value), `tokens_in`,
    `tokens_out`, `cost_usd`, and `seconds`, the sum of how long each request that was not cached has taken, waits and
    further attempts included.

    Raises:
        ValueError: for a URL that is not http(s), or that holds a name, password or query; for a limit below 1; for an
            environment variable that is not set.
        OSError: the folder of the cache cannot be made.
    """

    def __init__(self, options: ChatOptions) -> None:
        self.options = options
        self._url = checked_url(options.url)
        self._key = key_of(options.key_env)
        if options.limit < 1 or options.breaker < 1 or options.retries < 0:
            raise ValueError(f"limit={options.limit}, breaker={options.breaker}: at least 1; retries: at least 0")
        self._cache = None if options.cache is None else ReplyCache(Path(options.cache))
        names = ("requests", "attempts", "cached", "failed", "unusable", "tokens_in", "tokens_out", "cost_usd")
        self.counts: dict[str, float] = dict.fromkeys((*names, "seconds"), 0)
        self._lock = threading.Lock()
        self._not_before = 0.0  # a server that asks for patience asks all requests
        self._failures, self._open_until, self._last_failure = 0, 0.0, ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat", daemon=True)
        self._thread.start()
        self._submit(anyio.sleep(0)).result()  # httpx would load it while the first requests wait
        # A slot is a client of one connection: a pool of many is looked through whole at every request.
        self._slots: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()
        self._clients = self._make_clients(options.limit + 1)
        self._for_health = self._clients[-1]
        for client in self._clients[:-1]:
            self._slots.put_nowait(client)

    def _make_clients(self, num: int) -> list[httpx.AsyncClient]:
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # The deadlines here are of the whole, httpx's would be of every single read.
        options: dict[str, Any] = {"verify": ssl.create_default_context(), "timeout": None, "trust_env": False}
        return [httpx.AsyncClient(headers=headers, **options) for _ in range(num)]

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is under way, the connections and the thread."""
        if not self._loop.is_closed():
            self._submit(self._end()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for client in self._clients:
            await client.aclose()

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        parse: Callable[[str], Any],
        sampling: Mapping[str, float] | None = None,
    ) -> Answer:
        """Sends the messages and parses the text of the reply; blocks until it is there or has failed.

        Replies that `parse` accepts are kept in the cache, found again by the whole request and the server's URL.

        Args:
            parse: text to value; raises ValueError for a text that is none.
            sampling: `temperature`, `top_p`, `seed` and the like, in place of temperature 0.
        """
        body = {"model": self.options.model, "messages": list(messages)} | dict(sampling or {"temperature": 0})
        payload = json.dumps(body | {"max_tokens": self.options.max_tokens}).encode()
        key = hashlib.sha256(self._url.encode() + b"\n" + payload).hexdigest()
        self._count(requests=1)
        kept = self._cache.get(key) if self._cache else None
        if kept is not None:
            try:
                answer = Answer(parse(kept), text=kept)
            except ValueError:
                pass  # the form that is demanded has changed since
            else:
                self._count(cached=1)
                return answer
        text, start = "", time.monotonic()
        try:
            text, complaint = self._submit(self._request(payload)).result()
            if complaint:
                raise ValueError(complaint)
            value = parse(text)
        except ChatError as error:
            self._count(failed=1)
            return Answer(None, str(error), away=error.away)
        except ValueError as error:
            self._count(unusable=1)
            return Answer(None, self._clean(f"reply: {error}"), text, unusable=True)
        finally:
            self._count(seconds=time.monotonic() - start)
        if self._cache:
            self._cache.put(key, text)
        return Answer(value, text=text)

    def healthy(self) -> bool:
        """Whether the server lists its models; if so, requests that were held back go through again."""
        return self._submit(self._health()).result()

    def models(self) -> list[str]:
        """What the server calls its models; none if it does not say so in OpenAI's form.

        Raises:
            ChatError: it does not list them; with the reason.
        """
        return self._submit(self._models()).result()

    def _submit(self, coroutine: Any) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _health(self) -> bool:
        try:
            await self._models()
        except ChatError:
            return False
        self._failures, self._open_until, self._not_before = 0, 0.0, 0.0
        return True

    async def _models(self) -> list[str]:
        try:
            async with asyncio.timeout(self.options.attempt_s):
                status, _, body = await self._send(self._for_health, "GET", "/models", None)
        except TimeoutError:
            raise ChatError(f"no reply within {self.options.attempt_s:g} s") from None
        except httpx.TransportError as error:
            raise ChatError(self._clean(f"no connection: {type(error).__name__} {error}")) from None
        if status != 200:
            raise ChatError(self._clean(f"HTTP {status}: {body[:1000].decode('utf-8', 'replace')}"))
        try:
            return [str(model["id"]) for model in strict_json(body.decode())["data"]]
        except (ValueError, TypeError, KeyError):
            return []

    async def _request(self, payload: bytes) -> tuple[str, str]:
        """The text of the reply and why it cannot be used (empty: it can), within limit, deadline and circuit breaker.

        Raises:
            ChatError: there is no reply.
        """
        client = await self._slots.get()
        try:
            now = time.monotonic()
            if self._failures >= self.options.breaker:
                if now < self._open_until:
                    raise ChatError(f"not asked: {self._failures} requests in a row failed ({self._last_failure})")
                self._open_until = now + self.options.cooldown_s  # this one tries for all
            try:
                async with asyncio.timeout(self.options.deadline_s):
                    body = await self._attempts(client, payload, now + self.options.deadline_s)
                message, finish = self._message(body)
            except (TimeoutError, ChatError) as error:
                reason = str(error) or f"no reply within {self.options.deadline_s:g} s"
                away = not isinstance(error, ChatError) or error.away
                if away:
                    self._failures, self._last_failure = self._failures + 1, reason
                    self._open_until = time.monotonic() + self.options.cooldown_s
                raise ChatError(reason, away) from None
            self._failures = 0
        finally:
            self._slots.put_nowait(client)
        text = message.get("content")
        if isinstance(text, str) and not is_unicode(text):
            return "", "not Unicode text"
        if not isinstance(text, str):
            return "", f"refused: {message['refusal']}" if message.get("refusal") else "no text"
        return text, f"cut at max_tokens={self.options.max_tokens}" if finish == "length" else ""

    async def _attempts(self, client: httpx.AsyncClient, payload: bytes, ends: float) -> bytes:
        """The body of the first attempt that succeeds. Raises ChatError."""
        for attempt in range(self.options.retries + 1):
            if self._not_before > ends:
                raise ChatError("not asked: the server wants to be left alone for longer than the deadline")
            await asyncio.sleep(self._not_before - time.monotonic())
            self._count(attempts=1)
            wait = min(self.options.backoff_s * 2**attempt, _LONGEST_WAIT_S) * random.uniform(0.5, 1.5)
            try:
                async with asyncio.timeout(self.options.attempt_s):
                    status, headers, body = await self._send(client, "POST", "/chat/completions", payload)
            except TimeoutError:
                reason = f"no reply within {self.options.attempt_s:g} s"
            except httpx.TransportError as error:
                reason = self._clean(f"no connection: {type(error).__name__} {error}")
            else:
                if status == 200:
                    return body
                reason = self._clean(f"HTTP {status}: {body[:1000].decode('utf-8', 'replace')}")
                if status not in _RETRIED and status < 500:
                    raise ChatError(reason, away=status not in _OF_THE_REQUEST)
                asked = retry_after_s(headers.get("retry-after"))
                if asked is not None:
                    wait = asked + random.uniform(0, self.options.backoff_s)
                    self._not_before = max(self._not_before, time.monotonic() + asked)
            if attempt == self.options.retries or time.monotonic() + wait > ends:
                raise ChatError(f"{reason} (attempt {attempt + 1})")
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _send(
        self, client: httpx.AsyncClient, method: str, path: str, payload: bytes | None
    ) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body. Raises ChatError for a body beyond the bound, httpx.TransportError."""
        async with client.stream(method, self._url + path, content=payload) as response:
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > self.options.max_reply_bytes:
                    raise ChatError(f"a reply of more than {self.options.max_reply_bytes} bytes")
            return response.status_code, response.headers, bytes(body)

    def _message(self, body: bytes) -> tuple[dict[str, Any], str | None]:
        """The message of a chat completion and why it ended; counts its tokens. Raises ChatError."""
        try:
            completion = strict_json(body.decode())
            choice = completion["choices"][0]
            message, finish = dict(choice["message"]), choice.get("finish_reason")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            text = body[:100].decode("utf-8", "replace")
            raise ChatError(self._clean(f"no chat completion ({type(error).__name__}): {text}")) from None
        usage = completion.get("usage")
        used = [_whole(usage, name) for name in ("prompt_tokens", "completion_tokens")]
        cost = (used[0] * self.options.price_in + used[1] * self.options.price_out) / 1e6
        self._count(tokens_in=used[0], tokens_out=used[1], cost_usd=cost)
        return message, finish

    def _count(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self.counts[name] += amount

    def _clean(self, text: str) -> str:
        """One short line without the key, which some servers repeat."""
        line = " ".join(text.encode("utf-8", "replace").decode().split())
        return (line.replace(self._key, "***") if self._key else line)[:200]


def _whole(usage: Any, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else 0
