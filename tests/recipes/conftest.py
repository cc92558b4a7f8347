"""A small world on disk, made by the recipes themselves, and a way to run a recipe as a user does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["model.window=48"]


def command(recipe: str, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *overrides]


@pytest.fixture(scope="session")
def run_recipe():
    """run_recipe(folder, name, *overrides) -> CompletedProcess, in a process of its own with `folder` as working
    folder.
    """

    def run(folder, recipe, *overrides, check=True):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        result = subprocess.run(
            command(recipe, *overrides), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        if check and result.returncode != 0:
            raise AssertionError(f"{recipe} failed:\n{result.stderr[-3000:]}")
        return result

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory, run_recipe):
    folder = tmp_path_factory.mktemp("made")
    run_recipe(folder, "make_shapes", "run=data", "num=24")
    run_recipe(folder, "make_proxy_prompts", "data.folder=runs/data")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory, made):
    """A folder of one file of tests: trajectories, their proxy prompts, and the base model that ships as `base`."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "base").symlink_to(ROOT / "models" / "shapes" / "base")
    shutil.copytree(made / "runs", folder / "runs")
    return folder
