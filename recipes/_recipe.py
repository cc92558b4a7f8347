"""How a recipe meets Hydra: checked keys, errors in one line, runs that have a name and can be resumed."""

import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from clvr_train.runtime.distributed import World
from clvr_train.runtime.files import write_atomic
from clvr_train.runtime.process import LOCK, own_folder
from clvr_train.runtime.redaction import redact
from recipes._config import NPROC, ConfigError, check_command, help_text, take_nproc
from recipes._sweep import MULTIRUN, Sweep

CONF = Path(__file__).resolve().parent.parent / "conf"
# the user's to mend; anything else is ours, with a traceback
EXPECTED = (ValueError, OSError, FloatingPointError, MissingMandatoryValue)
RESUME = "run the same command again to go on"

# Runs are named by `run`, so Hydra makes no folders, changes no directory and configures no log of its own.
HYDRA = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra.sweep.dir='runs/${run}'",
    "hydra.sweep.subdir=.",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def recipe(name: str, conf: Path = CONF) -> Callable[[Callable[[DictConfig], None]], Callable[..., None]]:
    """Turn `fn(cfg)` into a command whose root config is `<conf>/<name>.yaml`.

    The command is called without arguments by `python recipes/<name>.py`, or with a list of command-line
    arguments. It returns when all jobs are done; what ends it early is a `SystemExit`: 1 after a one-line
    `error: ...` (in a sweep, once the other jobs are done), 130 after Ctrl-C, 143 after SIGTERM. With
    `CLVR_TRACEBACK=1` an expected error shows its traceback too.
    """

    def decorate(fn: Callable[[DictConfig], None]) -> Callable[..., None]:
        @functools.wraps(fn)
        def command(argv: list[str] | None = None) -> None:
            arguments = sys.argv[1:] if argv is None else list(argv)
            handler = logging.StreamHandler()
            handler.setFormatter(_Redacting("%(message)s"))
            logging.basicConfig(level=logging.INFO, handlers=[handler])
            if argv is None:
                sys.excepthook = _show_bug
            before = signal.signal(signal.SIGTERM, _terminate)
            try:
                args = get_args_parser().parse_intermixed_args(arguments)
                for flag in ("config_name", "config_path", "config_dir", "experimental_rerun"):
                    if getattr(args, flag):
                        raise ConfigError(f"--{flag.replace('_', '-')}: a recipe reads conf/{name}.yaml only")
                overrides, nproc = take_nproc(args.overrides, args.multirun)
                jobs = check_command(name, conf, overrides, args.multirun)
                if args.help:
                    doc = sys.modules[fn.__module__].__doc__ or fn.__doc__ or ""
                    sys.stdout.write(redact(help_text(name, conf, doc, jobs[0])))
                else:
                    missing = sorted({key for job in jobs for key in OmegaConf.missing_keys(job)})
                    if missing and not (args.cfg or args.info):
                        raise ConfigError(f"{name} needs {', '.join(f'{key}=...' for key in missing)}")
                    # Hydra wants overrides in one piece; here they may stand on both sides of a flag.
                    flags = [argument for argument in arguments if argument not in args.overrides]
                    ours = [*HYDRA, f"hydra.job.name={name}"]
                    sweep = None
                    if args.multirun and not (args.cfg or args.info):
                        if len(jobs) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
                            raise ConfigError(f"-m: torchrun runs one job; give its processes as {NPROC}=N instead")
                        script = str(sys.modules[fn.__module__].__file__)
                        sweep = Sweep.of(overrides, jobs, script, nproc)
                    _run(fn, name, conf, [*ours, *overrides, *flags], sweep)
            except KeyboardInterrupt:
                sys.stderr.write(f"\ninterrupted; {RESUME}\n")
                raise SystemExit(130) from None
            except (*EXPECTED, HydraException) as error:
                _report(error)
                raise SystemExit(1) from None
            finally:
                signal.signal(signal.SIGTERM, before)

        return command

    return decorate


def run_folder(cfg: DictConfig, may_change: tuple[str, ...] = (), world: World | None = None) -> Path:
    """`runs/<cfg.run>/`, made if missing, with the run's `config.yaml` (interpolations kept, secrets left out).

    Args:
        may_change: dotted keys to which a later command on the same run may give another value, say
            `train.steps`; not once the run has its `model/`, which the config would no longer describe.
        world: several processes that are at this run together; its first rank owns the folder, the others wait for it.

    Raises:
        ConfigError: the name is empty or leaves `runs/`, or the run has begun with another config. A run of which
            nothing but the config was written has not begun: a command that failed can be put right and repeated.
        BlockingIOError: another process is at this run.
    """
    if not cfg.run or ".." in Path(cfg.run).parts or Path(cfg.run).is_absolute():
        raise ConfigError(f"run: {cfg.run!r} is not a name for a folder under runs/")
    folder = Path("runs") / cfg.run
    if world is not None and not world.first:
        world.barrier()
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    own_folder(folder)
    file = folder / "config.yaml"
    text = OmegaConf.to_yaml(redact(OmegaConf.to_container(cfg, resolve=False)))
    if file.exists():
        old, new = dict(_leaves(OmegaConf.load(file))), dict(_leaves(OmegaConf.create(text)))
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        changed = [key for key in changed if key not in may_change or (folder / "model").exists()]
        if changed and _has_begun(folder):
            key = changed[0]
            raise ConfigError(
                f"{file}: this run was made with {key}={old.get(key)} and is now asked for {new.get(key)}"
                f" (keys that differ: {', '.join(changed)}); choose another run=... or remove the folder"
            )
    write_atomic(file, text)
    if world is not None:
        world.barrier()
    return folder


def _has_begun(folder: Path) -> bool:
    written = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("config.yaml", LOCK))
    return any(path.stat().st_size > 0 for path in written)


def _run(
    fn: Callable[[DictConfig], None], name: str, conf: Path, arguments: list[str], sweep: Sweep | None
) -> None:
    failed: list[str] = []
    bugs: list[Exception] = []

    @functools.wraps(fn)
    def job(cfg: DictConfig) -> None:
        sys.argv[1:] = redact(sys.argv[1:])  # wandb keeps it
        if sweep is not None:
            return _run_job(fn, cfg, sweep)
        # What is raised is kept from Hydra, which would write more lines and the overrides as they are.
        try:
            fn(cfg)
        except EXPECTED as error:
            _report(error)
            failed.append(cfg.run)
        except Exception as error:
            bugs.append(error)

    task = sweep.job if sweep is not None and sweep.command else job
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors to us instead of printing them
    try:
        hydra.main(version_base=None, config_path=str(conf.resolve()), config_name=name)(task)()
    except Exception as error:
        if sweep is None or not sweep.elsewhere:
            raise
        _report(error)  # a job that the launcher lost; the others have ended or go on without us
    finally:
        sys.argv = argv
        del os.environ["HYDRA_FULL_ERROR"]
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
    if bugs:
        raise bugs[0]
    if failed or (sweep is not None and not sweep.finish()):
        raise SystemExit(1)


def _run_job(fn: Callable[[DictConfig], None], cfg: DictConfig, sweep: Sweep) -> None:
    """One job of a sweep. What ends it is noted and does not stop the others; what it held goes with it."""
    number = HydraConfig.get().job.num
    Path(HydraConfig.get().sweep.dir, MULTIRUN).unlink(missing_ok=True)
    cfg.run = sweep.runs[number]
    try:
        fn(cfg)
    except EXPECTED as error:
        _report(error, prefix=" ".join(sweep.swept[number]))
        sweep.note(number, str(error) or type(error).__name__)
    except SystemExit as end:
        if end.code in (130, 143):  # the whole command was asked to end
            raise
        sweep.note(number, f"exit status {end.code}" if end.code else "")
    except Exception as error:
        _show_bug(type(error), error, error.__traceback__)
        sweep.note(number, f"{type(error).__name__}: {error}")
    else:
        sweep.note(number, "")


def _report(error: BaseException, prefix: str = "") -> None:
    if os.environ.get("CLVR_TRACEBACK") == "1":
        sys.stderr.write(redact("".join(traceback.format_exception(error))))
    message = redact(" ".join(str(error).split())) or type(error).__name__
    sys.stderr.write(f"error: {f'[{redact(prefix)}] ' if prefix else ''}{message}\n")


def _show_bug(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, where))))


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _terminate(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_IGN)  # it may come again, and has been heard
    sys.stderr.write(f"terminated; {RESUME}\n")
    raise SystemExit(128 + signum)


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    plain: Any = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    if isinstance(plain, dict) and plain:
        for key, value in plain.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, plain
