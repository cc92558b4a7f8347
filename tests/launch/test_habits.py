"""The workflow and the hooks run the commands of the Makefile, from pinned parts."""

import configparser
import re
from pathlib import Path

import yaml
from pre_commit.clientlib import load_config

ROOT = Path(__file__).resolve().parents[2]


def target(name: str) -> list[str]:
    """The commands of a target of the Makefile."""
    rule = re.search(rf"^{name}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in rule[1].splitlines()]


def test_the_workflow_runs_the_same_commands_with_pinned_actions():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make check", "make test"]
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]) for step in job["steps"] if "uses" in step)
    assert job["runs-on"].startswith("ubuntu-") and job["steps"][1]["with"]["python-version"] == "3.11"


def test_hooks_are_local_and_those_of_make_check():
    config = load_config(ROOT / ".pre-commit-config.yaml")
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook["entry"] for hook in config["repos"][0]["hooks"]}
    check = target("check")
    assert check == [".venv/bin/ruff check .", hooks["mypy"], hooks["floors"]]
    assert hooks["ruff"].startswith(".venv/bin/ruff check ")


def test_what_is_installed_is_pinned():
    """All but what others need: a version that nobody has tried is not taken without a change here."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    lines = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    names = [name for line in lines for name in line.split("\n") if name]
    assert names and all(re.fullmatch(r"[\w.-]+==[\w.]+", name) for name in names)


def test_the_typed_rooms_are_there():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    files = [name.strip() for name in parser["mypy"]["files"].split(",")]
    assert {"clvr_train/method", "clvr_train/services", "clvr_train/runtime"} <= set(files)
    assert all((ROOT / name).exists() for name in files)
