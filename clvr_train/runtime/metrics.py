"""The log of a run: `metrics.jsonl` first, Weights & Biases as a mirror that can never stop the run."""

import json
import logging
import math
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from PIL.Image import Image

from clvr_train.runtime.files import write_atomic
from clvr_train.runtime.redaction import redact

FILE = "metrics.jsonl"
MOST_WAITING = 10_000  # lines that wait for wandb, say while it looks for its server
WAITS: dict[str, Any] = {"init_timeout": 30.0, "finish_timeout": 60.0, "finish_timeout_raises": True}  # seconds

logger = logging.getLogger(__name__)


class Metrics:
    """Appends one JSON line a call of `log` to `<folder>/metrics.jsonl`; use it as a context manager.

    Args:
        folder: the run's folder; made if it is missing.
        resume_step: the step of the checkpoint that the run goes on from: later lines are dropped, as they
            will be written again. `None` starts a new log.
        wandb: keyword arguments of `wandb.init`, or `None` for no mirror.
    """

    def __init__(
        self, folder: Path, resume_step: int | None = None, wandb: dict[str, Any] | None = None
    ) -> None:
        self._path = Path(folder) / FILE
        self._resume_step = resume_step
        self._wandb = wandb
        self._file: TextIO | None = None
        self._mirror: _Mirror | None = None

    def __enter__(self) -> "Metrics":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if self._resume_step is None else _lines(self._path)
        lines = [line for line in kept if json.loads(line)["step"] <= self._resume_step]
        write_atomic(self._path, "".join(lines))
        self._file = self._path.open("a", encoding="utf-8")
        if self._wandb is not None:
            self._mirror = _Mirror(self._wandb)
        return self

    def log(self, step: int, **values: float) -> None:
        """Write `{"step": step, **values}`. A value that is not finite becomes null: JSON has no NaN.

        Raises:
            RuntimeError: called outside of `with`.
        """
        if self._file is None:
            raise RuntimeError("Metrics.log was called outside of `with Metrics(...)`")
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": step} | {
            name: value if math.isfinite(value) else None for name, value in numbers.items()
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror is not None:
            self._mirror.log(step, numbers)

    def image(self, step: int, name: str, file: Path) -> None:
        """Shows an image file of the run in the mirror, where there is one, before the `log` of the same step."""
        if self._mirror is not None:
            self._mirror.image(step, name, file)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Shows rows in the mirror, where there is one, before the `log` of the same step: numbers, texts and images
        (PIL) by column. The run's own files have to hold them first. Rows without a column have None there.
        """
        if self._mirror is not None and rows:
            self._mirror.table(step, name, list(rows))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._mirror is not None:
            self._mirror.finish(failed=kind is not None)
            self._mirror = None


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log in order, null as NaN; a last line that a kill cut short is left out.

    Raises:
        FileNotFoundError: the folder has no log.
        ValueError: a line that is not the last one is damaged; names the file and the line.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such log")
    rows = [json.loads(line) for line in _lines(path)]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def _lines(path: Path) -> list[str]:
    """The complete lines of a log, each a JSON object with a step."""
    if not path.exists():
        return []
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
    for number, line in enumerate(lines, start=1):
        try:
            json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: step: not a JSON object with a step ({error})") from error
    return lines


class _Mirror:
    """Weights & Biases, in a thread of its own: whatever happens there neither stops the run nor delays its steps. The
    first failure is logged and ends the mirror.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._thread = ThreadPoolExecutor(1, "wandb")
        self._calls: deque[Future] = deque()
        self._on, self._failed = True, False
        self._call(lambda: self._start(redact(dict(options))))

    def _start(self, options: dict[str, Any]) -> None:
        import wandb  # only where it is wanted: it takes a second and is optional

        if options.get("id"):  # the name of a run may hold what an id may not, such as a slash
            options["id"] = re.sub(r"[:;,#?/']", "-", options["id"])
        # Neither the console nor the address of the repository is kept: they may hold secrets.
        settings = wandb.Settings(console="off", disable_git=True, disable_code=True, **WAITS)
        self._run = wandb.init(settings=settings, **options)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._call(lambda: self._run.log(values, step=step))

    def image(self, step: int, name: str, file: Path) -> None:
        def show() -> None:
            import wandb  # it has begun the run

            self._run.log({name: wandb.Image(str(file))}, step=step)

        self._call(show)

    def table(self, step: int, name: str, rows: list[Mapping[str, Any]]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row))

        def show() -> None:
            import wandb

            cells = [[row.get(column) for column in columns] for row in rows]
            data = [[wandb.Image(cell) if isinstance(cell, Image) else cell for cell in line] for line in cells]
            self._run.log({name: wandb.Table(columns=[*columns], data=data)}, step=step)

        self._call(show)

    def finish(self, failed: bool) -> None:
        self._call(lambda: self._run.finish(exit_code=int(failed)))
        self._look(wait=True)
        self._thread.shutdown()

    def _call(self, action: Callable[[], Any]) -> None:
        self._look()
        if self._on:
            self._calls.append(self._thread.submit(self._unless_failed, action))

    def _unless_failed(self, action: Callable[[], Any]) -> None:
        """In the mirror's thread: what waits behind a failure is not tried."""
        if not self._failed:
            self._failed = True
            action()
            self._failed = False

    def _look(self, wait: bool = False) -> None:
        """What has come of the calls so far; a future keeps any exception, and wandb raises many kinds."""
        while self._on and self._calls and (wait or self._calls[0].done()):
            error = self._calls.popleft().exception()
            if error is not None:
                self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())}")
        if len(self._calls) > MOST_WAITING:
            self._give_up(f"{len(self._calls)} lines wait for it")

    def _give_up(self, reason: str) -> None:
        self._on = False
        self._calls.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)
        logger.warning("wandb is off for the rest of this run (metrics.jsonl goes on): %s", redact(reason))
