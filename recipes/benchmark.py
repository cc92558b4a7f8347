"""Measures parts of the project against their goals on this machine.

Writes runs/<run>/{config.yaml, benchmark.json} and prints the table; what it reads meanwhile it makes itself.
"""

import json
import logging
import os

import torch
from omegaconf import DictConfig

from clvr_train.runtime.files import write_atomic
from recipes._bench import table
from recipes._bench_checkpoint import bench_checkpoint
from recipes._bench_data import bench_data
from recipes._bench_pprl import bench_pprl
from recipes._bench_sft import bench_klein, bench_sft
from recipes._bench_vlm import bench_vlm
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)


@recipe("benchmark")
def main(cfg: DictConfig) -> None:
    benches = {
        "data": lambda: bench_data(cfg.data, run, cfg.seed),
        "sft": lambda: bench_sft(cfg),
        "sft_klein": lambda: bench_klein(cfg),
        "pprl": lambda: bench_pprl(cfg),
        "vlm": lambda: bench_vlm(cfg, device),
        "checkpoint": lambda: bench_checkpoint(cfg.checkpoint, device, run),
    }
    if cfg.bench not in benches:
        raise ValueError(f"bench={cfg.bench!r} is not one of {', '.join(benches)}")
    device = cfg.model.device
    if cfg.bench == "vlm":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    run = run_folder(cfg)
    load = os.getloadavg()[0]
    rows = benches[cfg.bench]()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    machine = {"cores": os.cpu_count(), "device": name, "load_before": load, "load_after": os.getloadavg()[0]}
    report = {"bench": cfg.bench, "machine": machine, "rows": [row.to_json() for row in rows]}
    write_atomic(run / "benchmark.json", json.dumps(report, indent=2) + "\n")
    logger.info("%s\n%s", table(rows), f"load of the machine before: {load:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
