"""Whether this machine is fit to train: Python, torch, CUDA, driver, NCCL, GPU memory, disk, versions, judges, teacher.

    python recipes/doctor.py
    python recipes/doctor.py device=cuda reward=unified_reward teacher=openai teacher.chat.model=teacher
    python recipes/doctor.py format=json

Each problem comes with its remedy. Exit status 1: something that training needs is broken; warnings alone are 0. It
writes only a trial file in runs/<run>/ and takes it away again.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

try:
    from omegaconf import DictConfig

    from recipes import _doctor
    from recipes._recipe import recipe
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; install the project: make .venv, or pip install -e . in its folder") from None

FORMATS = ("text", "json")
DEVICES = ("auto", "cpu", "cuda")


def examine(cfg: DictConfig) -> list[dict]:
    """The findings as rows with `name`, `status`, `found`, `remedy`; and the seconds of the check that found them."""
    run, limit = Path("runs") / cfg.run, cfg.timeout_s
    checks: dict[str, tuple[Callable[[], Iterable[_doctor.Finding]], float]] = {
        "python": (_doctor.python, limit),
        "packages": (_doctor.packages, limit),
        "cuda": (lambda: _doctor.gpus(cfg.device), limit),
        "disk": (lambda: _doctor.disk(run, cfg.disk_gb), limit),
        "run folder": (lambda: _doctor.writes(run), limit),
        "devices": (lambda: _doctor.devices(cfg.device), cfg.devices_s),
    }
    for name, (key, options) in _doctor.chat_servers(cfg.reward, cfg.teacher, limit).items():
        checks[name] = (partial(_doctor.server, name, key, options), 2 * limit)
    rows = []
    for name, (check, limit_s) in checks.items():
        start = time.monotonic()
        found = _doctor.bounded(name, check, limit_s)
        rows += [asdict(finding) | {"seconds": round(time.monotonic() - start, 3)} for finding in found]
    return rows


def text(rows: list[dict]) -> str:
    width = max(len(row["name"]) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row['status']:8} {row['name']:{width}}  {row['found']}")
        if row["remedy"]:
            lines.append(f"{'':8} {'':{width}}  -> {row['remedy']}")
    return "\n".join(lines)


@recipe("doctor")
def main(cfg: DictConfig) -> None:
    for key, choices in (("format", FORMATS), ("device", DEVICES)):
        if cfg[key] not in choices:
            raise ValueError(f"{key}={cfg[key]!r} is not one of {', '.join(choices)}")
    rows = examine(cfg)
    ok = all(row["status"] != _doctor.FAILED for row in rows)
    shown = json.dumps({"ok": ok, "checks": rows}, indent=2) if cfg.format == "json" else text(rows)
    sys.stdout.write(shown + "\n")
    if any("no result within" in row["found"] for row in rows):
        sys.stdout.flush()
        os._exit(1)  # what hangs may hang the interpreter's end too
    if not ok:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
