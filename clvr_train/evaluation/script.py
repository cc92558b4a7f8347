"""A benchmark's own scorer, run as a program: another interpreter, another environment, a log of what it says."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from clvr_train.evaluation.checkout import Asked, Benchmark, Script, Verdicts
from clvr_train.runtime.redaction import HIDDEN

# What torchrun tells its processes; a scorer is none of them.
_OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def score_by_script(
    benchmark: Benchmark,
    images: Path,
    out: Path,
    judge: Asked,
    *,
    python: str | None,
    args: Sequence[str] = (),
    env: Sequence[str] = (),
) -> tuple[Verdicts, str | None]:
    """What the benchmark's scorer says of the pictures, and the judge that it asks, if any.

    Its words go to `out`/scorer.log; it is run anew at every call, and goes on where it ended only if it can.

    Args:
        python: its interpreter, by default this one. args: further arguments. env: `NAME=value` of its environment,
            which is otherwise this one's.

    Raises:
        OSError: it cannot be run, ended with another status than 0, or left no results; names the log.
        ValueError: its results cannot be read, or `env` is no list of `NAME=value`.
    """
    out.mkdir(parents=True, exist_ok=True)
    script = benchmark.script(images, out, judge)
    environment = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
    for entry in env:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise ValueError(f"benchmark.env: NAME=value is needed, got {entry!r}")
        environment[name] = value
    log = out / "scorer.log"
    for run in script.runs:
        command = [python or sys.executable, *run, *args]
        _run(command, script, environment | dict(script.env), log, judge.key)
    try:
        return benchmark.results(out), script.judge
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename}: the scorer has left no results; see {log}") from None


def _run(command: list[str], script: Script, environment: dict[str, str], log: Path, key: str) -> None:
    shown = " ".join(HIDDEN if word == key and key else word for word in command)
    with log.open("ab") as file:
        file.write(f"$ {shown}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=script.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise OSError(f"benchmark.python={command[0]}: {error.strerror}") from None
        try:
            status = process.wait()
        finally:
            if process.poll() is None:  # this one was told to end: so is the scorer, with all that it has started
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if status:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise ChildProcessError(
            f"{Path(command[1]).name} ended with status {status} ({last[:200]}); see {log}. The pictures are kept:"
            " run the same command again to score them"
        )
