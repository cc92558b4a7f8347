"""train_pprl on two processes, from the middle of an epoch, and from the ledger of another run."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from clvr_train.models.sampler import Sampler
from recipes import train_pprl
from tests.logs import unmeasured
from tests.recipes.conftest import ROOT

COMMON = ["experiment=shapes_pprl", "model.folder=base", "data.folder=runs/data", "pprl.epochs=3", "rollout.steps=2",
          "rollout.groups=3", "rollout.group_size=3", "pprl.t2i_share=0.5", "pprl.num_times=1", "pprl.beta_kl=0.01",
          "pprl.time_range=[0,1]", "pprl.steps_per_epoch=2", "pprl.micro_batch=2", "pprl.old_schedule=on_policy",
          "pprl.save_every=1", "pprl.grid_every=1", "rollout.batch=4", "sentinel.probe=0"]  # fmt: skip
ATOL = 2e-5  # of a LoRA whose factors move by about 1e-3 a step


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world / "runs"


def lora(run):
    return load_file(run / "lora" / "pytorch_lora_weights.safetensors")


def apart(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def lines(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture
def whole(here):
    """A run of one process, made once."""
    train_pprl.main([*COMMON, "run=whole"])
    return here / "whole"


def on_two_ranks(folder, *overrides):
    """Runs train_pprl on two processes and returns the exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "recipes" / "train_pprl.py"), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    sys.stderr.write(result.stderr[-3000:])
    return result.returncode


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_processes_train_what_one_does(whole, world, engine):
    """Three groups: one rank has two of them."""
    run = world / "runs" / engine
    assert on_two_ranks(world, *COMMON, f"run={engine}", f"engine={engine}") == 0
    moved = max(tensor.abs().max().item() for name, tensor in lora(whole).items() if "lora_B" in name)
    assert apart(lora(whole), lora(run)) < ATOL < 0.05 * moved
    for ours, theirs in zip(unmeasured(lines(whole)), unmeasured(lines(run)), strict=True):
        assert theirs == pytest.approx(ours, rel=2e-2, abs=1e-6)
    rows = lines(run, "rollouts.jsonl")
    assert [row["k"] for row in rows] == [0, 1, 2] * 9 and all(row["reward"] is not None for row in rows)
    assert len(list((run / "ledger" / "epoch-00002").glob("*.json"))) == 3


def test_an_epoch_that_ends_between_rollouts_and_update_goes_on_there(whole, here, monkeypatch):
    command = [*COMMON, "run=halved"]
    update, calls = train_pprl.backward_nft, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:  # the first one of the second epoch
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(train_pprl, "backward_nft", interrupted)
    with pytest.raises(SystemExit) as end:
        train_pprl.main(command)
    assert end.value.code == 130
    monkeypatch.setattr(train_pprl, "backward_nft", update)
    drawn = count_images(monkeypatch)
    train_pprl.main(command)
    assert sum(drawn) == 9, "the second epoch's rollouts are those from before, the third is drawn"
    assert apart(lora(whole), lora(here / "halved")) == 0
    assert unmeasured(lines(whole)) == unmeasured(lines(here / "halved"))
    assert lines(whole, "rollouts.jsonl") == lines(here / "halved", "rollouts.jsonl")


def count_images(monkeypatch):
    denoise, drawn = Sampler.denoise, []

    def counted(self, noise, cond):
        drawn.append(len(noise))
        return denoise(self, noise, cond)

    monkeypatch.setattr(Sampler, "denoise", counted)
    return drawn


def test_a_run_is_trained_again_from_its_ledger_without_a_rollout(whole, here, monkeypatch, capsys):
    drawn = count_images(monkeypatch)
    train_pprl.main([*COMMON, "run=replayed", "replay=runs/whole"])
    train_pprl.main([*COMMON, "run=rejudged", "replay=runs/whole/ledger", "rejudge=true"])
    train_pprl.main([*COMMON, "run=other_judge", "replay=runs/whole", "rejudge=true", "pprl.weight_edit=0"])
    assert not drawn
    assert apart(lora(whole), lora(here / "replayed")) == 0
    assert apart(lora(whole), lora(here / "rejudged")) == 0
    assert apart(lora(whole), lora(here / "other_judge")) > 0
    for command, message in (
        (["run=long", "replay=runs/whole", "pprl.epochs=9"], "its ledger has 3 whole epochs, and pprl.epochs=9"),
        (["run=none", "replay=runs/data"], "replay=runs/data: neither a run with a ledger nor a ledger"),
        (["run=alone", "rejudge=true"], "rejudge=true: needs replay=..."),
    ):
        with pytest.raises(SystemExit) as end:
            train_pprl.main([*COMMON, *command])
        assert end.value.code == 1 and message in capsys.readouterr().err


def test_engines_that_a_lora_has_no_use_for(here, capsys):
    for key in ("engine=zero3", "engine.precision=bf16_states", "engine.offload=optimizer", "engine.compile=true"):
        with pytest.raises(SystemExit) as end:
            train_pprl.main([*COMMON, "run=refused", key])
        assert end.value.code == 1 and "train_pprl keeps whole base weights" in capsys.readouterr().err


GUARDED = [*COMMON, "pprl.epochs=8", "sentinel.probe=2", "sentinel.action=roll_back", "sentinel.every=1",
           "sentinel.dead_for=3", "sentinel.patience=2", "sentinel.max_rollbacks=1", "sentinel.limits.flat=0",
           "merged.every=2", "merged.base=base", "merged.num=4"]  # fmt: skip


def test_a_signal_beyond_its_limit_warns_then_rolls_back_then_stops(here, capsys, caplog):
    """With a limit of 0 the contrast counts as dead from the first epoch on: three in a row warn."""
    guarded = [*GUARDED, f"merged.distilled={ROOT / 'models' / 'shapes' / 'distilled'}"]
    with pytest.raises(SystemExit) as end:
        train_pprl.main([*guarded, "run=guarded"])
    run, said = here / "guarded", capsys.readouterr().err
    assert end.value.code == 1 and not (run / "model").exists()
    assert "epoch 8: the sentinel ends the run: contrast dead" in said and "the state after epoch 6, the last" in said
    assert "epoch 4: rolled back to the state after epoch 2" in caplog.text
    rows = lines(run)
    assert [row["sentinel"] for row in rows] == [0, 0, 1, 2, 0, 0, 1, 2]
    assert ["merged_score" in row for row in rows] == [False, True] * 4
    assert all("velocity_ratio" in row and "probe_reward" in row for row in rows)
    assert (run / "samples" / "merged-00002.png").exists()
    noted = lines(run, "sentinel.jsonl")
    assert [(row["epoch"], row["state"], row["action"]) for row in noted] == [
        (3, "warned", None), (4, "act", "roll_back"), (7, "warned", None), (8, "act", "stop")
    ]  # fmt: skip


def test_what_plays_no_part_in_the_training_is_held_back(here):
    """Trajectories of the merge's evaluation give no rollouts; a healthy run ends with its model."""
    distilled = f"merged.distilled={ROOT / 'models' / 'shapes' / 'distilled'}"
    train_pprl.main([*GUARDED, distilled, "run=healthy", "sentinel.limits.flat=null", "pprl.epochs=3"])
    run = here / "healthy"
    assert [row["sentinel"] for row in lines(run)] == [0, 0, 0] and (run / "model").exists()
    assert (run / "healthy" / "latest").exists() and not (run / "sentinel.jsonl").exists()


def test_two_ranks_in_bfloat16_roll_back_together(here, world):
    """With guidance and the anchor in training, the probe, and the evaluation of the merge."""
    distilled = f"merged.distilled={ROOT / 'models' / 'shapes' / 'distilled'}"
    command = [*GUARDED, distilled, "run=guarded_zero2", "engine.precision=bf16", "pprl.cfg=2.0", "pprl.anchor=1.0"]
    run = here / "guarded_zero2"
    assert on_two_ranks(world, *command, "engine=zero2", "sentinel.max_rollbacks=2", "pprl.epochs=6") == 0
    rows = lines(run)
    assert [row["sentinel"] for row in rows] == [0, 0, 1, 2, 0, 0]
    assert [row["epoch"] for row in lines(run, "sentinel.jsonl")] == [3, 4]
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows) and (run / "model").exists()
    assert len(list((run / "ledger" / "epoch-00005").glob("*.json"))) == 3
