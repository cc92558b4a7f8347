"""The processes of one training: who they are, what they tell each other, and what is said when one of them is lost."""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Store

from clvr_train.runtime.redaction import redact

logger = logging.getLogger(__name__)

T = TypeVar("T")
ALIVE, ENDED, TERMINATED, FAILED = "alive", "ended", "terminated", "failed"
STATUS_TERMINATED = 128 + signal.SIGTERM
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # of one that waits for a rank that is alive, say while it writes the model
LOST_S = 10.0  # once a collective has failed, a rank that has been silent for so long is the reason


@dataclass
class World:
    """One process of a training, and what it is at: the watch of the other ranks names `phase` if this one is lost.

    `group` is a gloo group for small things of the host; None where this process is alone.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: ProcessGroup | None = None
    phase: str = "starting"
    ending: bool = False  # all ranks have agreed to

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def share(self, batch: Sequence[T]) -> Sequence[T]:
        """This rank's part of a batch: contiguous, so that the ranks' parts in order are the batch."""
        return batch[len(batch) * self.rank // self.size : len(batch) * (self.rank + 1) // self.size]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in the order of the ranks; of JSON, so that nothing that comes in is code."""
        if self.group is None:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]), group=self.group)
        padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(texts, padded, group=self.group)
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(texts, map(int, lengths), strict=True)]

    def barrier(self) -> None:
        """Returns once all ranks are here."""
        if self.group is not None:
            dist.barrier(group=self.group)


@contextmanager
def start(device: str = "cpu", *, timeout_s: float = 60.0, collectives: bool = False) -> Iterator[World]:
    """Within the block the ranks that torchrun has started are one world, or this process alone is.

    Every rank has a sign of life in the store that brought them together. One that gives none for `timeout_s` was
    killed or is frozen: the others name it and what it was at, and end with status 1 wherever they are waiting.

    Args:
        device: `cuda` is the GPU of the rank's number on its machine.
        collectives: torch.distributed is started for one process too (DeepSpeed wants it).
    """
    environment = os.environ if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else {}
    rank, size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(environment.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    world = World(rank, size, place)
    if size == 1 and not collectives:
        yield world
        return
    store: Store = dist.HashStore() if size == 1 else next(iter(dist.rendezvous("env://")))[0]
    watch = _Watch(world, store, timeout_s) if size > 1 else nullcontext()
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    if size > 1:
        world.group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    level = logging.root.level
    if not world.first:
        logging.root.setLevel(logging.WARNING)
    try:
        with watch:
            yield world
    finally:
        logging.root.setLevel(level)
        dist.destroy_process_group()


class _Watch(threading.Thread):
    """Tells the other ranks that this one lives, and ends this process when another does not.

    A thread of its own: the loop may hang in a collective, but not this. It compares what it reads of the others with
    what it has read before, so clocks need not agree.
    """

    def __init__(self, world: World, store: Store, timeout_s: float) -> None:
        super().__init__(name="watch", daemon=True)
        self._world, self._timeout_s = world, timeout_s
        self._interval_s = min(1.0, timeout_s / 10)
        self._store = dist.PrefixStore("watch", store.clone())  # type: ignore[attr-defined]  # no waiting of the loop blocks it
        self._store.set_timeout(timedelta(seconds=timeout_s))
        self._over, self._done = threading.Event(), threading.Event()
        self._state, self._message, self._count = ALIVE, "", 0
        self._seen = {rank: (0, time.monotonic()) for rank in range(world.size) if rank != world.rank}
        self._beat()

    def run(self) -> None:
        while not self._over.wait(self._interval_s):
            self._done.clear()
            threading.Thread(target=self._round, daemon=True).start()
            # The store of a frozen process never answers, and there is no other way to stop waiting for it.
            if not self._done.wait(self._timeout_s) and not self._over.is_set():
                self._end(f"the store is silent for {self._timeout_s:.0f} s: rank 0, or torchrun, is frozen")

    def _round(self) -> None:
        """Gives and reads the signs once."""
        try:
            self._beat()
            self._look()
        except dist.DistError as error:
            if not self._over.is_set():
                self._end(f"the store is lost: rank 0, or torchrun, has ended ({_line(error)})")
        self._done.set()

    def __enter__(self) -> None:
        self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tells the others how this rank ends; if that is for want of another one, waits until that one is known."""
        if error is None or isinstance(error, SystemExit):  # all are through, or asked to end
            asked = error is not None and error.code == STATUS_TERMINATED
            self._finish(TERMINATED if asked else ENDED)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to those that are left
        if _is_lost(error):
            logger.error("rank %d, %s: %s", self._world.rank, self._world.phase, _line(error))
            self._timeout_s = min(self._timeout_s, LOST_S)
            self.join(2 * self._timeout_s)
        self._finish(FAILED, f"{type(error).__name__}: {_line(error)}")

    def _finish(self, state: str, message: str = "") -> None:
        """The last sign of life. The store may end with this process: waits for the others to be through, for a bit."""
        self._over.set()
        self.join()
        self._state, self._message = state, message
        deadline = time.monotonic() + min(self._timeout_s, LOST_S)
        with suppress(dist.DistError):  # then no one is left who could read it
            self._beat()
            while time.monotonic() < deadline and ALIVE in (sign[1] for sign in self._signs()):
                time.sleep(0.05)

    def _beat(self) -> None:
        self._count += 1
        sign = [self._count, self._state, self._world.phase, self._message]
        self._store.set(str(self._world.rank), json.dumps(sign))

    def _signs(self) -> list[list]:
        return [json.loads(sign) for sign in self._store.multi_get([str(rank) for rank in self._seen])]

    def _look(self) -> None:
        signs, now, silent, failed = self._signs(), time.monotonic(), [], []
        for rank, (count, state, phase, message) in zip(self._seen, signs, strict=True):
            if count != self._seen[rank][0]:
                self._seen[rank] = count, now
            silent_s = now - self._seen[rank][1]
            if state == TERMINATED and not self._world.ending:
                self._world.ending = True
                threading.Thread(target=self._follow, daemon=True).start()
            if state == FAILED:
                failed.append(f"rank {rank} has failed while {phase}: {message}")
            elif state == ALIVE and silent_s > self._timeout_s:
                lost = f"rank {rank} was killed or is frozen"
                silent.append(f"{lost}: silent for {silent_s:.0f} s, last seen while {phase}")
        if silent or failed:
            self._state, self._message = FAILED, "; ".join(silent or failed)
            self._beat()
            time.sleep(2 * self._interval_s)  # the store may end with this process: the others read it first
            self._end(self._message)

    def _follow(self) -> None:
        """Another rank was asked to end and does not wait for this one, which no collective can reach any more."""
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._over.wait(LOST_S / 2):
            os._exit(STATUS_TERMINATED)

    def _end(self, message: str) -> None:
        for handler in logging.root.handlers:
            handler.flush()
        sys.stderr.write(redact(f"error: [rank {self._world.rank}, {self._world.phase}] {message}\n"))
        sys.stderr.flush()
        os._exit(1)  # the loop may hang in a collective, which no exception reaches


def _is_lost(error: BaseException) -> bool:
    """Whether a collective has failed, which says that another rank is gone but seldom which."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
