"""Forked processes: real ones, which a signal can kill, that need not import torch again. Each may be a rank."""

import io
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

# Python announces these changes of the file system; writes and fsyncs are counted by `strike_at` itself.
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def fork(work: Callable[[], Any]) -> int:
    """Runs `work` in a process of its own; returns the id of the process."""
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        work()
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


def ended(child: int, timeout_s: float = 60) -> int:
    """The exit status of a forked process, negative for a signal; it is killed at the end of the timeout."""
    deadline = time.monotonic() + timeout_s
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"process {child} had not ended after {timeout_s} s")
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(found[1])


def fork_ranks(world: int, work: Callable[[int], Any]) -> list[tuple[int, Any]]:
    """Runs `work(rank)` in `world` processes of one gloo group; returns (exit status, result as JSON gives it back)."""
    with tempfile.TemporaryDirectory() as folder:

        def run(rank: int) -> None:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
            result = work(rank)
            if result is not None:
                Path(folder, f"{rank}.json").write_text(json.dumps(result))

        children = [fork(lambda rank=rank: run(rank)) for rank in range(world)]
        statuses = [ended(child) for child in children]
        results = [Path(folder, f"{rank}.json") for rank in range(world)]
        return [(s, json.loads(r.read_text()) if r.exists() else None) for s, r in zip(statuses, results, strict=True)]


def strike_at(moment: int) -> None:
    """From here on this process dies by SIGKILL at its `moment`-th change of the disk (from 1; 0: never): before a file
    is opened, made, renamed, removed or synced, and before and in the middle of every write.
    """
    moments = itertools.count(1)
    opened, synced = io.open, os.fsync

    def strike(event: str, arguments: tuple = ()) -> None:
        if event in CHANGES and next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    class Torn(io.FileIO):
        def write(self, data: bytes | memoryview) -> int:
            half = len(data) // 2
            for part in (data[:half], data[half:]):
                strike("open")
                super().write(part)
            return len(data)

    def torn_open(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        assert mode in ("r", "rb", "wb"), f"mode {mode!r}: its writes would not be counted"
        return Torn(path, mode) if mode == "wb" else opened(path, mode, *rest, **options)

    io.open = torn_open
    os.fsync = lambda descriptor: (strike("open"), synced(descriptor))
    sys.addaudithook(strike)
