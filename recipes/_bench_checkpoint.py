"""How long a training waits for a save: one that returns when all is on disk against one that a thread finishes."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from omegaconf import DictConfig

from clvr_train.runtime.checkpoint import Saver
from recipes._bench import Row


def bench_checkpoint(cfg: DictConfig, device: str, folder: Path) -> list[Row]:
    """Saves the same tensors of `device` both ways in turn; a ratio is of one pair. Also the first: it finds its
    memory made, as in a training, but not yet used.
    """
    values = cfg.mib * 2**20 // 4 // cfg.tensors
    tensors = {f"w{number}": torch.randn(values, device=device) for number in range(cfg.tensors)}
    blocking, stalls = [], []
    try:
        with (
            Saver(folder / "at_once", keep=1, asynchronous=False) as at_once,
            Saver(folder / "behind", keep=1) as behind,
        ):
            behind.reserve(tensors.items())
            behind.wait()
            for step in range(cfg.pairs):
                blocking.append(_seconds(lambda step=step: at_once.save(step, tensors.items(), {})))
                stalls.append(_seconds(lambda step=step: behind.save(step, tensors.items(), {})))
                behind.wait()
    finally:
        for name in ("at_once", "behind"):
            shutil.rmtree(folder / name, ignore_errors=True)
    ratios = [stall / whole for stall, whole in zip(stalls, blocking, strict=True)]
    return [
        Row(f"a save of {cfg.mib} MiB at once", median(blocking), "s"),
        Row("the training's wait for one by a thread", median(stalls), "s"),
        Row("wait / save at once", median(ratios), "", at_most=0.2),
        Row("wait / save at once, the first", ratios[0], "", at_most=0.2),
    ]


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
