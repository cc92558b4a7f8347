"""What a training costs, for its log: seconds by phase, and memory. The one part of a log that no two runs share."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# How names of numbers begin that depend on the machine and its load.
MEASURED = ("seconds_", "memory_", "mfu", "judge_seconds", "judge_latency_s")


class Clock:
    """Adds up seconds by phase since it was last asked, and in all."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done in the block counts as `name`, also if it fails."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - start

    def take(self) -> dict[str, float]:
        """`seconds_<phase>` of every phase and `seconds_total` since the last call, which then begin anew."""
        now = time.monotonic()
        seconds = {**self._seconds, "total": now - self._since}
        self._since, self._seconds = now, {}
        return {f"seconds_{name}": value for name, value in seconds.items()}


def memory(device: torch.device) -> dict[str, float]:
    """`memory_host_gib`, the largest that this process has held, and on a GPU `memory_gpu_gib`, the largest that torch
    has had reserved there since the process began.
    """
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"memory_host_gib": held / 2**30}
    if device.type == "cuda":
        found["memory_gpu_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return found
