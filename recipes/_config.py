"""Checks a recipe's config before anything starts: the root file declares every key; others are refused."""

import difflib
import re
from pathlib import Path
from typing import Any, cast

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

NPROC = "sweep.nproc"  # the one key of a sweep; no job has it
# Keys that count things: every recipe means the same by them, and none can do with less than one.
COUNTS = frozenset(
    ("batch", "epochs", "group_size", "groups", "limit", "max_rounds", "micro_batch", "num", "num_times", "rank")
    + ("steps", "steps_per_epoch", "student_steps", "substeps", "window")
)
# In an experiment's header: the command that runs it, which also says for which recipe it is.
_COMMAND = re.compile(r"^#.*\brecipes/(\w+)\.py\b.*\bexperiment=([\w/]+)", re.MULTILINE)


class ConfigError(ValueError):
    """The command line or an experiment file asks for something that the recipe does not have."""


def parse(overrides: list[str]) -> list[Override]:
    """The overrides of a command line.

    Raises:
        ConfigError: one of them cannot be read, or removes a key.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(str(error)) from error
    for override in parsed:
        if override.is_delete():
            raise ConfigError(f"{override.input_line}: a key cannot be removed; set it to null")
    return parsed


def pinned(override: Override) -> str:
    """An override as Hydra's sweeper hands it to each job."""
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def take_nproc(overrides: list[str], multirun: bool) -> tuple[list[str], int | None]:
    """The overrides without `sweep.nproc=N`, and N: the processes that torchrun starts for every job.

    Raises:
        ConfigError: another key of `sweep`, no whole number above 0, or no `-m`.
    """
    nproc, others = None, []
    for text in overrides:
        key, _, value = text.partition("=")
        if not key.lstrip("+").startswith("sweep."):
            others.append(text)
        elif key != NPROC:
            raise ConfigError(f"unknown key {key!r}: did you mean {NPROC!r}?")
        elif not re.fullmatch("[1-9][0-9]*", value):
            raise ConfigError(f"{text}: a whole number of at least 1 is needed")
        elif not multirun:
            raise ConfigError(f"{text}: is of sweeps (-m); one job of several processes: launch/torchrun.sh")
        else:
            nproc = int(value)
    return others, nproc


def check_command(name: str, conf: Path, overrides: list[str], multirun: bool = False) -> list[DictConfig]:
    """Compose and check the config of every job that a command asks for, before the first one starts.

    Raises:
        ConfigError: an unknown key, experiment or kind of value, with the nearest valid name.
        FileNotFoundError: there is no root config of this name.
    """
    overrides, _ = take_nproc(overrides, multirun)
    parsed = parse(overrides)
    if not multirun:
        swept = [override.input_line for override in parsed if override.is_sweep_override()]
        if swept:
            raise ConfigError(f"{swept[0]}: several values need -m (a list is written key=[a,b])")
        return [check_job(name, conf, overrides)]
    return [check_job(name, conf, job) for job in job_overrides(overrides)]


def job_overrides(overrides: list[str]) -> list[list[str]]:
    """The overrides of every job of a sweep, as Hydra's sweeper writes them.

    Raises:
        ConfigError: they cannot be read.
    """
    parsed = parse(overrides)
    try:
        return BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException as error:
        raise ConfigError(str(error)) from error


def check_job(name: str, conf: Path, overrides: list[str]) -> DictConfig:
    """Compose one job's config and hold it against what the root file (and its groups) declare.

    Raises:
        ConfigError, FileNotFoundError: see `check_command`.
    """
    if not (conf / f"{name}.yaml").is_file():
        raise FileNotFoundError(f"{conf / name}.yaml: no such config")
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    parsed = [item for item in parse(overrides) if not re.match(r"hydra[./]|hydra$", item.key_or_group)]
    choices = [item for item in parsed if item.key_or_group in groups]
    for item in choices:
        _check_choice(conf, name, item.key_or_group, item.value())
    declared, experiment = declare(name, conf, [str(item.input_line) for item in choices])
    keys = all_keys(declared)
    for item in parsed:
        given = set() if item in choices else all_keys(item.value(), item.key_or_group)
        if given - keys:
            raise _unknown(min(given - keys), keys)
    config = _plain(_compose(name, conf, overrides))
    from_file = _plain(_compose(name, conf, [str(item.input_line) for item in choices]))
    if experiment:
        try:
            compare(from_file, declared)
        except ConfigError as error:
            raise ConfigError(f"{conf / 'experiment' / experiment}.yaml: {error}") from None
    compare(config, declared)
    result = OmegaConf.create(config)
    OmegaConf.set_struct(result, True)
    try:
        OmegaConf.to_container(result, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    return result


def declare(name: str, conf: Path, choices: list[str]) -> tuple[dict[str, Any], str | None]:
    """The config that declares a job's keys: root file and groups as chosen, without the experiment.

    Returns it with the experiment's name.
    """
    runtime = _compose(name, conf, choices, return_hydra_config=True).hydra.runtime.choices
    chosen = {group: choice for group, choice in runtime.items() if not group.startswith("hydra/")}
    experiment = chosen.get("experiment")
    groups = [f"{group}={choice}" for group, choice in chosen.items() if choice and group != "experiment"]
    return _plain(_compose(name, conf, groups + ["~experiment"] * bool(experiment))), experiment


def compare(config: Any, declared: Any, path: str = "", keys: frozenset[str] | None = None) -> None:
    """Refuse a config that has a key which is not declared, or a value of another kind.

    Raises:
        ConfigError: naming the first such key and the nearest declared one.
    """
    keys = all_keys(declared) if keys is None else keys
    if isinstance(config, dict):
        if not isinstance(declared, dict):
            raise ConfigError(
                f"{path}: expected {_kind(declared)}, got a mapping with {', '.join(map(str, config))}"
            )
        for key, value in config.items():
            inner = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                raise ConfigError(f"{inner}: a config cannot name code to run")
            if key not in declared:
                raise _unknown(inner, keys)
            compare(value, declared[key] if declared[key] != [] else _entries(key, declared), inner, keys)
    elif isinstance(config, list) and (declared is None or isinstance(declared, list)):
        for number, value in enumerate(config):
            if isinstance(value, dict):  # the entries of a list are declared together
                known = {
                    key: item
                    for entry in declared or ()
                    if isinstance(entry, dict)
                    for key, item in entry.items()
                }
                compare(value, known, f"{path}[{number}]", all_keys(known, f"{path}[{number}]"))
    elif not _fits(config, declared):
        raise ConfigError(f"{path}: expected {_kind(declared)}, got {config!r}")
    elif _is_count(path) and not (config in (None, "???") or "${" in str(config) or _is_whole(config)):
        raise ConfigError(f"{path}={config!r}: a whole number of at least 1 is needed")


def _entries(key: str, declared: dict[str, Any]) -> list[dict[str, Any]]:
    """What the entries of an empty list may hold, if they are mappings: the keys that stand above the list. An entry
    sets them for itself.
    """
    names = list(declared)
    return [{name: declared[name] for name in names[: names.index(key)]}]


def all_keys(node: Any, path: str = "") -> frozenset[str]:
    """Every dotted key of a config, inner ones included."""
    found = {path} if path else set()
    if isinstance(node, dict):
        for key, value in node.items():
            found |= all_keys(value, f"{path}.{key}" if path else str(key))
    return frozenset(found)


def experiments(name: str, conf: Path) -> dict[str, str]:
    """The experiments whose header holds a command of this recipe, as name -> first line of the header."""
    found = {}
    for option in _options(conf, "experiment"):
        text = (conf / "experiment" / f"{option}.yaml").read_text(encoding="utf-8")
        if (name, option) in _COMMAND.findall(text):
            lines = [line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")]
            found[option] = next((line for line in lines if line and not line.startswith("@package")), "")
    return found


def help_text(name: str, conf: Path, purpose: str, cfg: DictConfig) -> str:
    """What `--help` prints: purpose, keys with their values, and the experiments that fit."""
    fitting = [f"  {option:24} {line}" for option, line in experiments(name, conf).items()]
    parts = [
        purpose.strip(),
        f"Usage: python recipes/{name}.py [experiment=NAME] [key=value ...] [--cfg job] [-m key=a,b]",
        "Experiments:\n" + ("\n".join(fitting) or "  none"),
        f"Keys (conf/{name}.yaml):\n"
        + "".join(f"  {line}\n" for line in OmegaConf.to_yaml(cfg).splitlines()),
    ]
    return "\n\n".join(parts)


def _compose(name: str, conf: Path, overrides: list[str], return_hydra_config: bool = False) -> DictConfig:
    try:
        with hydra.initialize_config_dir(str(conf.resolve()), version_base=None):
            return hydra.compose(name, overrides=overrides, return_hydra_config=return_hydra_config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{error} {error.__cause__ or ''}".strip()) from error


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))


def _options(conf: Path, group: str) -> list[str]:
    folder = conf / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _check_choice(conf: Path, name: str, group: str, value: Any) -> None:
    options = list(experiments(name, conf)) if group == "experiment" else _options(conf, group)
    if value is None or value in options:
        return
    if group == "experiment" and value in _options(conf, group):
        header = (conf / group / f"{value}.yaml").read_text(encoding="utf-8")
        owners = sorted({owner for owner, option in _COMMAND.findall(header) if option == value})
        owner = ", ".join(owners) or "no recipe (its header has no command)"
        reason = f"experiment {value!r} is for {owner}, not {name}"
    else:
        near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.0)
        reason = f"unknown {group} {value!r}" + (f": did you mean {near[0]!r}?" if near else "")
    raise ConfigError(f"{reason}; choose one of: {', '.join(options) or 'none'}")


def _unknown(key: str, keys: frozenset[str]) -> ConfigError:
    near = difflib.get_close_matches(key, sorted(keys), n=1, cutoff=0.0)
    return ConfigError(f"unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else ""))


def _fits(value: Any, declared: Any) -> bool:
    """Numbers are one kind; null and interpolations (known only later) fit everywhere."""
    open_ended = (None, "???")
    if value in open_ended or declared in open_ended or "${" in f"{value}{declared}":
        return not isinstance(value, dict)
    return _kind(value) == _kind(declared)


def _is_count(path: str) -> bool:
    """Whether a key counts things of which there must be one: their names are the same in all recipes."""
    name = path.rpartition(".")[2]
    return name in COUNTS or name.endswith("_every")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _kind(value: Any) -> str:
    kinds = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "a single value",
    }
    return kinds.get(type(value), "a number")
