"""Rows of a benchmark: what was measured, and the goal that it has."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from clvr_train.models.plan import GPUS


@dataclass(frozen=True)
class Row:
    """One number with its unit ("" for a ratio) and, if it has a goal, the bound."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.at_least is None and self.at_most is None:
            return None
        low, high = self.at_least, self.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    def to_json(self) -> dict:
        return asdict(self) | {"met": self.met}


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| measured | value | goal | met |", "|---|---|---|---|"]
    for row in rows:
        bounds = [f">= {row.at_least}"] * (row.at_least is not None) + [f"<= {row.at_most}"] * (row.at_most is not None)
        met = {None: "", True: "yes", False: "no"}[row.met]
        lines.append(f"| {row.name} | {row.value:.3g} {row.unit} | {', '.join(bounds)} | {met} |")
    return "\n".join(lines)


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Of one step, to its end on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gpu_name() -> str:
    """The name of this GPU in models.plan.GPUS."""
    name = torch.cuda.get_device_name().lower()
    known = [gpu for gpu in GPUS if gpu in name]
    if not known:
        raise ValueError(f"the GPU {name!r} is not one of {', '.join(GPUS)}, whose peaks are known")
    return known[0]


def on_gpu(flops_per_second: float, mfu: float, planned_bytes: int) -> list[Row]:
    """Share of this GPU's peak, with the share `mfu` as its goal, and the peak of memory against the plan."""
    gpu, peak = gpu_name(), torch.cuda.max_memory_allocated()
    share = flops_per_second / GPUS[gpu].bf16
    return [
        Row(f"MFU of {gpu}'s {GPUS[gpu].bf16 / 1e12:.0f} TFLOP/s", share, "", at_least=mfu),
        Row("peak memory", peak / 1e9, "GB"),
        Row("peak memory over the plan", peak / planned_bytes, "", at_least=0.93, at_most=1.07),
    ]
