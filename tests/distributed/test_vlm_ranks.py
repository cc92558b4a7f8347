"""train_vlm on two processes, as torchrun starts it: what they make is what one makes, whatever the engine.

One trajectory in four has no image. Micro-batches hold one, so at some steps one rank has an image to look at and the
other has none: without the blank image of `sft.chats` the ranks would wait for each other for ever.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clvr_train.data.sharegpt import write_trajectories
from clvr_train.method.trajectory import Step, Trajectory
from clvr_train.runtime.metrics import read_metrics
from clvr_train.sft.chats import chat_of
from clvr_train.sft.vlm import chat_size, training_order
from clvr_train.shapes.controller import make_trajectories
from tests.logs import unmeasured
from tests.recipes.conftest import ROOT, command

pytestmark = pytest.mark.slow
STEPS = 4
ARGUMENTS = ["controller.folder=untrained", "controller.width=64", "controller.layers=2", "data.folder=data", "seed=3",
             f"train.steps={STEPS}", "train.batch=4", "train.micro_batch=1", "train.lr=2e-3", "train.log_every=1",
             "train.save_every=2", "engine.checkpointing=full", "validation.folder=held", "validation.every=4",
             "validation.num=3", "validation.max_new_tokens=4"]  # fmt: skip


def started(folder: Path, name: str, ranks: int, *overrides: str) -> subprocess.Popen:
    start = [sys.executable]
    if ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    arguments = [*start, *command("train_vlm", f"run={name}", *ARGUMENTS, *overrides)[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(arguments, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def run(folder: Path, name: str, ranks: int, *overrides: str) -> None:
    with started(folder, name, ranks, *overrides) as process:
        _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        pytest.skip("DeepSpeed compiles its collectives for CPUs with g++ and ninja, which are not here")
    folder = tmp_path_factory.mktemp("ranks")
    blind = [Trajectory(f"blind-{n}", f"a goal {n}", (Step("hm" * n, "verify"), Step("no", "stop"))) for n in (1, 2, 3)]
    trajectories = [*make_trajectories(9, 0, "train"), *blind]
    order = training_order([chat_size(chat_of(t)) for t in trajectories], STEPS, 4, 3)
    pairs = zip(order[::2], order[1::2], strict=True)  # what the two ranks see at the same time
    assert sum((first < 9) != (second < 9) for first, second in pairs) > 0
    write_trajectories(folder / "data", trajectories)
    write_trajectories(folder / "held", [*make_trajectories(2, 1, "train"), blind[0]])
    run(folder, "one", 1)
    return folder


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / name / "model/model.safetensors")


@pytest.mark.parametrize("engine", ["ddp", "zero3"])  # zero2 is below
def test_two_ranks_equal_one(folder: Path, engine: str) -> None:
    run(folder, engine, 2, f"engine={engine}")
    rows, expected = read_metrics(folder / "runs" / engine), read_metrics(folder / "runs/one")
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [1, 2, 3, 4, 4]
    for row, other in zip(rows, expected, strict=True):
        for key in unmeasured([other])[0]:
            if key != "mean_token_accuracy":  # TRL's mean over micro-batches
                assert row[key] == pytest.approx(other[key], rel=2e-4, abs=1e-6), key
    found, one = weights(folder, engine), weights(folder, "one")
    assert found.keys() == one.keys()
    # Adam's first steps are of the size of the learning rate, 2e-3, whatever the size of a gradient.
    assert max((found[name] - one[name]).abs().max().item() for name in one) < 2e-4


def test_one_rank_is_asked_to_end_and_one_process_goes_on(folder: Path) -> None:
    place = folder / "runs/asked"
    with started(folder, "asked", 2, "engine=zero2") as process:
        deadline = time.monotonic() + 200
        while not (place / "checkpoints/latest").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        first = int((place / ".lock").read_text().split()[1])
        os.kill(first, signal.SIGTERM)
        _, errors = process.communicate(timeout=200)
    # Of both, the one that ends later may be struck by torchrun's own signal on its way out.
    assert "exitcode: 143" in errors and errors.count("run the same command again") == 2, errors[-3000:]
    assert not (place / "model").exists()
    run(folder, "asked", 1, "engine=single")
    found, one = weights(folder, "asked"), weights(folder, "one")
    assert max((found[name] - one[name]).abs().max().item() for name in one) < 2e-4
    rows, expected = read_metrics(place), read_metrics(folder / "runs/one")
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(
        [row["loss"] for row in expected if "loss" in row], rel=2e-4
    )
