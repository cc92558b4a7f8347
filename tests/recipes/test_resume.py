"""Kill a recipe at any moment, run the same command: the weights are those of a run that was never stopped, bit for
bit.
"""

import json
import os
import re
import signal
import subprocess
import time

import pytest
from safetensors.torch import load_file

from tests.logs import unmeasured
from tests.recipes.conftest import command

SFT = ["experiment=shapes_sft", "model.folder=base", "data.folder=runs/data", "train.steps=8", "train.save_every=2",
       "train.batch=4", "train.warmup_steps=2", "train.log_every=1"]  # fmt: skip
DISTILL = ["experiment=shapes_distill", "model.folder=base", "data.captions=12", "train.steps=6", "train.save_every=2",
           "train.batch=4", "train.substeps=1", "train.save_precision=fp32"]  # fmt: skip
PPRL = ["experiment=shapes_pprl", "model.folder=base", "data.folder=runs/data", "pprl.epochs=6", "pprl.save_every=2",
        "rollout.groups=2", "rollout.group_size=3", "rollout.steps=2", "pprl.grid_every=3", "pprl.t2i_share=0.5",
        "pprl.num_times=1", "pprl.time_range=[0,1]", "pprl.steps_per_epoch=2", "sentinel.probe=0"]  # fmt: skip


def stop_at(sign, number, folder, recipe, overrides, run, meanwhile=lambda: None):
    """Starts the recipe, waits for a file of its run, sends it a signal, and returns its exit status."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command(recipe, *overrides, f"run={run}"), cwd=folder, env=environment, stderr=subprocess.DEVNULL
    )
    sign = folder / "runs" / run / sign
    deadline = time.monotonic() + 200
    while not (sign.exists() and sign.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, f"ended before {sign}"
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    meanwhile()
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    process.wait()
    assert not (folder / "runs" / run / "model").exists(), "the signal came too late to prove anything"
    return process.returncode


@pytest.mark.parametrize(("recipe", "overrides"), [("train_dit", SFT), ("distill", DISTILL), ("train_pprl", PPRL)])
def test_killed_and_resumed_equals_uninterrupted(world, run_recipe, recipe, overrides):
    run_recipe(world, recipe, *overrides, f"run={recipe}_whole")
    stop_at("checkpoints/latest", signal.SIGKILL, world, recipe, overrides, f"{recipe}_killed")
    run_recipe(world, recipe, *overrides, f"run={recipe}_killed")
    assert_same_runs(world, recipe, "whole", "killed")


@pytest.mark.parametrize(("recipe", "overrides"), [("train_dit", SFT), ("train_pprl", PPRL)])
def test_terminated_run_has_saved_and_resumed_equals_uninterrupted(world, run_recipe, recipe, overrides):
    """Without a checkpoint of its own making; and while it runs, the same command is refused."""
    rare = [re.sub(r"save_every=\d+", "save_every=1000", key) for key in overrides]
    run_recipe(world, recipe, *rare, f"run={recipe}_rare")

    def again():
        second = run_recipe(world, recipe, *rare, f"run={recipe}_ended", check=False)
        assert second.returncode == 1 and re.search(r"in use by pid \d+ on ", second.stderr), second.stderr

    status = stop_at("metrics.jsonl", signal.SIGTERM, world, recipe, rare, f"{recipe}_ended", again)
    assert status == 143 and (world / "runs" / f"{recipe}_ended" / "checkpoints" / "latest").exists()
    run_recipe(world, recipe, *rare, f"run={recipe}_ended")
    assert_same_runs(world, recipe, "rare", "ended")


def assert_same_runs(world, recipe, *names):
    whole, killed = (world / "runs" / f"{recipe}_{name}" for name in names)
    weights = "model/transformer/diffusion_pytorch_model.safetensors"
    first, second = load_file(whole / weights), load_file(killed / weights)
    base = load_file(world / "base" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert first.keys() == second.keys() == base.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert any(not first[name].float().equal(base[name].float()) for name in first), "nothing was trained"
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, killed)]
    assert unmeasured(logs[0]) == unmeasured(logs[1])
    if recipe == "train_pprl":
        assert (whole / "rollouts.jsonl").read_text() == (killed / "rollouts.jsonl").read_text()
