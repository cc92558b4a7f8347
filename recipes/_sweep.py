"""The jobs of a sweep (`-m`): how one runs as a command of its own, and the table that compares them at the end."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from clvr_train.runtime.files import write_atomic
from clvr_train.runtime.metrics import FILE, read_metrics
from clvr_train.runtime.redaction import redact
from recipes._config import job_overrides, parse, pinned

MULTIRUN = "multirun.yaml"  # Hydra's, secrets and all
SAVING_S = 280  # what the processes of a job have after SIGTERM, as in launch/torchrun.sh
# What the table shows of metrics.jsonl and evaluation.json, and which value is the best; sweep.json has all.
SHOWN: dict[str, Callable[..., float]] = {
    "reward": max,
    "val_loss": min,
    "loss": min,
    "val_action": max,
    "pass_rate": max,
    "mean_score": max,
}

logger = logging.getLogger(__name__)


def swept_overrides(overrides: list[str]) -> list[list[str]]:
    """For every job what it does not share with the others by the command line, as Hydra writes it."""
    fixed = {pinned(override) for override in parse(overrides) if not override.is_sweep_override()}
    return [[text for text in job if text not in fixed] for job in job_overrides(overrides)]


def folder_name(overrides: list[str]) -> str:
    """The overrides as one folder name; a long one is cut and gets a hash (file systems allow 255)."""
    name = quote(redact(",".join(sorted(overrides))), safe="=,.+-_[]{}: ")
    return name if len(name) <= 200 else f"{name[:180]}-{sha256(name.encode()).hexdigest()[:12]}"


@dataclass
class Sweep:
    """The jobs of one `-m` command.

    `swept` and `runs` have an entry a job: the overrides that are its own, and the name of its run. `command` is that
    of a job without its overrides, where jobs are commands of their own (processes by torchrun, or a launcher on other
    machines); else it is empty and jobs run in this process. `errors`: number of a job that has ended -> what went
    wrong, empty if nothing did.
    """

    swept: list[list[str]]
    runs: list[str]
    command: list[str]
    elsewhere: bool  # jobs end in other processes than this one: their errors are read from files
    errors: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, overrides: list[str], jobs: list[DictConfig], script: str, nproc: int | None) -> "Sweep":
        """Of the overrides of a command line and the configs of its jobs, which are in the same order."""
        swept = swept_overrides(overrides)
        runs = [f"{job.run}/{folder_name(own)}" if own else str(job.run) for job, own in zip(jobs, swept, strict=True)]
        launcher = [override.value() for override in parse(overrides) if override.key_or_group == "hydra/launcher"]
        elsewhere = bool(launcher) and launcher[-1] != "basic"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--shutdown-timeout", str(SAVING_S)]
        torchrun = [*torchrun, "--nproc_per_node", str(nproc)] if nproc else []
        command = [sys.executable, *torchrun, script] if nproc or elsewhere else []
        sweep = cls(swept, runs, command, elsewhere)
        shutil.rmtree(sweep.notes, ignore_errors=True)
        return sweep

    @property
    def folder(self) -> Path:
        """Where the jobs' folders lie, or that of the only job."""
        above = [run.rpartition("/")[0] if own else run for run, own in zip(self.runs, self.swept, strict=True)]
        return Path("runs") / os.path.commonpath(above)

    @property
    def notes(self) -> Path:
        return self.folder / ".sweep"

    def note(self, job: int, error: str) -> None:
        """Keeps how a job has ended."""
        self.errors[job] = redact(" ".join(error.split()))
        if self.elsewhere:
            self.notes.mkdir(parents=True, exist_ok=True)
            write_atomic(self.notes / str(job), self.errors[job])

    def job(self, cfg: DictConfig) -> None:
        """Hydra's task function where jobs are commands of their own. A launcher sends it to other machines."""
        hydra = HydraConfig.get()
        Path(hydra.sweep.dir, MULTIRUN).unlink(missing_ok=True)
        self.note(hydra.job.num, self._run_command(hydra.job.num, list(hydra.overrides.task)))

    def _run_command(self, job: int, overrides: list[str]) -> str:
        """Runs a job, with what it prints here too; returns its error, empty if none."""
        name = self.runs[job].replace("\\", "\\\\").replace("'", "\\'")
        tail = b""
        with subprocess.Popen([*self.command, *overrides, f"run='{name}'"], stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            try:
                while chunk := process.stderr.read1(65536):  # type: ignore[attr-defined]
                    tail = (tail + chunk)[-65536:]
                    sys.stderr.write(chunk.decode("utf-8", "replace"))
                    sys.stderr.flush()
                status = process.wait()
            finally:
                if process.poll() is None:  # this process was asked to end: the job saves first
                    process.terminate()
                    sys.stderr.write(process.communicate()[1].decode("utf-8", "replace"))
        said = re.findall(r"^error: (.*)$", tail.decode("utf-8", "replace").replace("\r", "\n"), re.MULTILINE)
        return "" if status == 0 else said[0] if said else f"exit status {status}"

    def finish(self) -> bool:
        """Prints and writes the table and what failed; returns whether all went well."""
        for job in range(len(self.runs)):
            if self.elsewhere and (self.notes / str(job)).exists():
                self.errors[job] = (self.notes / str(job)).read_text(encoding="utf-8")
        shutil.rmtree(self.notes, ignore_errors=True)
        rows = [self._row(job) for job in range(len(self.runs))]
        text = markdown(rows)
        failed = [f"- {','.join(row['overrides'])}: {row['error']}" for row in rows if row["error"]]
        if failed:
            text += f"\n{len(failed)} of {len(rows)} jobs failed:\n\n" + "\n".join(failed) + "\n"
        if failed or any((Path("runs") / run).is_dir() for run in self.runs):  # some recipes write no runs
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "sweep.json", json.dumps(rows, indent=2) + "\n")
            write_atomic(self.folder / "sweep.md", text)
        logger.info("%s", text)
        return not failed

    def _row(self, job: int) -> dict:
        folder = Path("runs") / self.runs[job]
        error = self.errors.get(job, "it did not come to an end")
        return {"overrides": redact(self.swept[job]), "run": self.runs[job], "error": error, "metrics": values(folder)}


def values(folder: Path) -> dict[str, dict[str, float]]:
    """Of every number that a run has logged its `last`, `min` and `max`; of those of its evaluation too."""
    series: dict[str, list[float]] = {}
    for row in read_metrics(folder) if (folder / FILE).exists() else []:
        for name, value in row.items():
            if value == value and name != "step":
                series.setdefault(name, []).append(value)
    file = folder / "evaluation.json"
    evaluation = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    series |= {name: [value] for name, value in evaluation.items() if isinstance(value, float)}
    return {name: {"last": row[-1], "min": min(row), "max": max(row)} for name, row in series.items()}


def markdown(rows: list[dict]) -> str:
    """The table of jobs: a column for every swept key, then the last and the best value of what is shown."""
    own = [dict(text.partition("=")[::2] for text in row["overrides"]) for row in rows]
    keys = list(dict.fromkeys(key for mapping in own for key in mapping))
    names = [name for name in SHOWN if any(name in row["metrics"] for row in rows)]
    if "reward" in names and "loss" in names:
        names.remove("loss")  # of RL it tells nothing
    head = [*keys, "result", *(f"{name} {which}" for name in names for which in ("last", "best"))]
    lines = [head, ["---"] * len(head)]
    for row, mapping in zip(rows, own, strict=True):
        cells = [mapping.get(key, "") for key in keys] + ["failed" if row["error"] else "done"]
        for name in names:
            best = "max" if SHOWN[name] is max else "min"
            found = row["metrics"].get(name)
            cells += [f"{found['last']:.4g}", f"{found[best]:.4g}"] if found else ["", ""]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    aligned = (" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"| {line} |\n" for line in aligned)
