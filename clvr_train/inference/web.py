"""A small web page for closed loops: a prompt goes in, and rounds appear as they are drawn.

One thread draws for all requests, so that those under way share batches, whichever round each of them is in. The page
is one file without anything from elsewhere, and its policy lets a browser load nothing else.
"""

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from clvr_train.inference.closed_loop import Budget, Run
from clvr_train.inference.loop import ClosedLoop
from clvr_train.services.chat import image_url

logger = logging.getLogger(__name__)
HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("page.html")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline';"
    " style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_LONGEST_BODY = 200_000  # bytes
Tell = Callable[[dict], None]


@dataclass(eq=False)
class _Job:
    run: Run
    tell: Tell
    told: int = 0  # rounds


class Desk(AbstractContextManager):
    """Draws what is submitted, in a thread of its own, until it is closed.

    Args:
        active: most requests under way at once; the others wait. waiting: most of those.
    """

    def __init__(self, loop: ClosedLoop, active: int = 16, waiting: int = 256) -> None:
        self.loop, self.active, self.waiting = loop, active, waiting
        self._jobs: list[_Job] = []
        self._queue: deque[_Job] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="desk", daemon=True)
        self._thread.start()

    def submit(self, goal: str, tell: Tell, **budget: Any) -> Run:
        """Hands in a goal; `tell` is called, from the desk's thread, with a round or with the end. A run is given up by
        setting its `stop_reason`.

        Raises:
            ValueError: as `ClosedLoop.start`. BlockingIOError: too many are waiting.
        """
        job = _Job(self.loop.start("goal-0001", goal, **budget), tell)
        with self._changed:
            if len(self._queue) >= self.waiting:
                raise BlockingIOError(f"{self.waiting} requests are waiting already")
            self._queue.append(job)
            self._changed.notify()
        return job.run

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue or self._jobs)
                if self._closed:
                    return
                while self._queue and len(self._jobs) < self.active:
                    self._jobs.append(self._queue.popleft())
                    self._jobs[-1].run.began = time.monotonic()
            self._round()

    def _round(self) -> None:
        try:
            self.loop.advance([job.run for job in self._jobs])
        except (RuntimeError, ValueError, OSError) as error:  # say, no memory for so many images
            logger.exception("a round failed")
            for job in self._jobs:
                job.run.stop_reason = job.run.stop_reason or f"error: {error}"
        for job in self._jobs:
            for event in self._news(job):
                job.tell(event)
        self._jobs = [job for job in self._jobs if not job.run.stop_reason]

    def _news(self, job: _Job) -> list[dict]:
        """Rounds that were not told yet, and the end."""
        facts = self.loop.result(job.run).facts()
        news = [
            {
                "action": step.action,
                "reasoning": step.reasoning,
                "image": None if step.image is None else image_url(step.image, "PNG"),
                "seconds": seconds,
            }
            for step, seconds in zip(job.run.steps, facts["turn_seconds"], strict=False)
        ]
        new, job.told = news[job.told :], len(news)
        return [*new, facts] if job.run.stop_reason else new


def read_request(body: bytes) -> tuple[str, dict]:
    """Goal and budget of a request.

    Raises:
        ValueError: it is no JSON object of a goal and fields of `Budget`.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("goal"), str):
        raise ValueError("goal: a text is needed")
    goal = fields.pop("goal")
    for name, value in fields.items():
        if name not in Budget.__dataclass_fields__:
            raise ValueError(f"{name}: no such field")
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{name}: a number is needed")
    return goal, fields


def make_app(desk: Desk, budget: Budget) -> Starlette:
    """The page, with sliders that start at `budget`, and what it asks: POST /draw, answered by a line a round."""
    start: Mapping[str, Any] = asdict(budget) | {"nfe_per_image": desk.loop.sampler.nfe_per_image}
    page = PAGE.read_text(encoding="utf-8").replace("START", json.dumps(start))

    async def show(request: Request) -> Response:
        return HTMLResponse(page, headers=_HEADERS)

    async def draw(request: Request) -> Response:
        # Another site's form or script cannot send this type without asking first, and nobody answers that.
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return JSONResponse({"error": "application/json is needed"}, 415)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _LONGEST_BODY:
                return JSONResponse({"error": f"more than {_LONGEST_BODY} bytes"}, 413)
        news: asyncio.Queue[dict] = asyncio.Queue()
        thread = asyncio.get_running_loop()
        try:
            goal, allowed = read_request(body)
            run = desk.submit(goal, lambda event: thread.call_soon_threadsafe(news.put_nowait, event), **allowed)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        except BlockingIOError as error:
            return JSONResponse({"error": str(error)}, 503)

        async def lines() -> AsyncIterator[str]:
            try:
                while True:
                    event = await news.get()
                    yield json.dumps(event) + "\n"
                    if "stop_reason" in event:
                        return
            finally:  # the browser may have gone
                run.stop_reason = run.stop_reason or "cancelled"

        return StreamingResponse(lines(), media_type="application/x-ndjson", headers=_HEADERS)

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=[Route("/", show), Route("/draw", draw, methods=["POST"])], middleware=[hosts])
