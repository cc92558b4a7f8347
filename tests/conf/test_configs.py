"""Every shipped config composes, declares its keys, and refuses each of them misspelt."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from recipes._config import ConfigError, all_keys, check_job, compare, declare, experiments

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
RECIPES = sorted(path.stem for path in CONF.glob("*.yaml"))
PAIRS = [(name, option) for name in RECIPES for option in experiments(name, CONF)]
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))


def misspelt(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, the config with one more letter in that key), for each leaf."""
    for key, value in node.items():
        inner = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            for name, changed in misspelt(value, inner):
                yield name, node | {key: changed}
        else:
            changed = copy.copy(node)
            changed[f"{key}x"] = changed.pop(key)
            yield f"{inner}x", changed


def test_each_recipe_has_a_config_and_each_config_a_recipe() -> None:
    scripts = {path.stem for path in (ROOT / "recipes").glob("*.py") if not path.stem.startswith("_")}
    assert scripts == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composes_alone_and_declares_run(name: str) -> None:
    cfg = check_job(name, CONF, [])
    assert isinstance(cfg.run, str) and cfg.run
    on_shapes = any(option.startswith(("shapes", "bench")) for option in experiments(name, CONF))
    assert on_shapes or name == "doctor", (  # which looks at the machine
        "no experiment runs it on shapes, or on files of its own"
    )


@pytest.mark.parametrize(("name", "option"), PAIRS, ids="-".join)
def test_an_experiment_composes(name: str, option: str) -> None:
    cfg = check_job(name, CONF, [f"experiment={option}"])
    assert "_target_" not in OmegaConf.to_yaml(cfg)


@pytest.mark.parametrize(("name", "option"), [(name, None) for name in RECIPES] + PAIRS)
def test_each_key_misspelt_is_refused_with_the_right_one(name: str, option: str | None) -> None:
    choices = [f"experiment={option}"] if option else []
    declared, _ = declare(name, CONF, choices)
    cfg = OmegaConf.to_container(check_job(name, CONF, choices), resolve=False)
    keys, count = all_keys(declared), 0
    for key, changed in misspelt(cfg):
        with pytest.raises(ConfigError, match=re.escape(f"unknown key '{key}'")) as refusal:
            compare(changed, declared)
        assert refusal.value.args[0].split("'")[3] in keys
        count += 1
    assert count


@pytest.mark.parametrize("name", RECIPES)
def test_a_misspelt_override_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown key 'runn': did you mean 'run'"):
        check_job(name, CONF, ["+runn=x"])


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix()
)
def test_no_config_names_code(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "_target_" not in text and "!!python" not in text


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_opens_with_purpose_command_hardware_and_result(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    body = next(
        (number for number, line in enumerate(lines) if line and not line.startswith("#")), len(lines)
    )
    header = "\n".join(lines[:body])
    assert re.search(r"^# @package _global_$", header, re.MULTILINE)
    for word in ("purpose", "command", "hardware", "expected"):
        assert re.search(rf"^#.*\b{word}\b", header, re.MULTILINE | re.IGNORECASE), f"no line on {word}"
    commands = re.findall(r"recipes/(\w+)\.py\b.*\bexperiment=([\w/]+)", header)
    assert commands, "no command of the form recipes/<name>.py ... experiment=<this file>"
    assert all(name in RECIPES and option == path.stem for name, option in commands), commands
