"""train_dit as people start it on two processes, and what it leaves when values are not finite any more."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from recipes.train_dit import main
from tests.logs import unmeasured
from tests.recipes.conftest import ROOT

COMMON = ["experiment=shapes_sft", "model.folder=base", "data.folder=runs/data", "train.steps=4", "train.batch=5"]
COMMON += ["train.micro_batch=2", "train.log_every=1", "train.save_every=2", "train.ema_decay=0.8", "train.clip=0.1"]
COMMON += ["train.warmup_steps=1"]
# Three orders of magnitude below what four steps at 1e-4 change; the largest seen is 4e-7.
ATOL = 2e-6


def weights(run, name="model"):
    return load_file(run / name / "transformer" / "diffusion_pytorch_model.safetensors")


def apart(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world / "runs"


def test_two_processes_train_what_one_does(here, world):
    """The batch is 3 + 2 samples, in micro-batches of one bucket that only the ranks together know the number of."""
    main([*COMMON, "run=one"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "recipes" / "train_dit.py"), *COMMON, "run=two", "engine=ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = here / "one", here / "two"
    for name in ("model", "model_ema"):
        assert apart(weights(one, name), weights(two, name)) < ATOL
    assert apart(weights(one), load_file(world / "base/transformer/diffusion_pytorch_model.safetensors")) > 100 * ATOL
    assert apart(weights(one), weights(one, "model_ema")) > 10 * ATOL
    logs = [unmeasured(map(json.loads, (run / "metrics.jsonl").read_text().splitlines())) for run in (one, two)]
    blanks = [row.pop("blank_share") for row in logs[1]]
    assert any(blanks), "no rank has drawn a blank, which this test is for"
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        same = ours.keys() - {"short_share"}
        assert {key: ours[key] for key in same} == pytest.approx({key: theirs[key] for key in same}, rel=1e-4)
    assert sorted(path.name for path in (two / "checkpoints" / "step-2").glob("tensors-*")) == [
        "tensors-0.safetensors", "tensors-1.safetensors"
    ]  # fmt: skip


def test_one_process_has_the_engine_of_one(here, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main([*COMMON, "run=offload", "engine.offload=optimizer"])
    assert "engine.offload=optimizer, engine=single: only zero1, zero2, zero3 can" in capsys.readouterr().err


def test_what_is_not_finite_ends_a_run_with_what_repeats_it(here, capsys, caplog):
    command = [*COMMON, "run=hot", "train.lr=1e30"]
    with pytest.raises(SystemExit) as end:
        main([*command, "replay=true"])
    assert end.value.code == 1 and "replay=true: runs/hot/nonfinite is not there" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(command)
    said = capsys.readouterr().err
    assert end.value.code == 1 and "4 gradients in a row are not finite after optimiser step 1;" in said
    failed = json.loads((here / "hot" / "nonfinite" / "batches.json").read_text())
    assert [entry["batch"] for entry in failed] == [1, 2, 3, 4]
    assert all(len(entry["ranks"][0]["samples"]) == 5 for entry in failed) and not (here / "hot" / "model").exists()
    before = {path: path.stat().st_mtime_ns for path in (here / "hot").rglob("*") if path.name != "config.yaml"}
    caplog.clear()
    with pytest.raises(SystemExit) as end:
        main([*command, "replay=true"])
    assert end.value.code == 1 and "4 gradients in a row" in capsys.readouterr().err
    prefix = "rank 0, batch "
    repeated = [record.getMessage().removeprefix(prefix) for record in caplog.records if prefix in record.getMessage()]
    for text, entry in zip(repeated, failed, strict=True):
        number, _, kept = text.partition(": ")
        assert int(number) == entry["batch"] and json.loads(kept) == entry["ranks"][0]
    after = {path: path.stat().st_mtime_ns for path in (here / "hot").rglob("*") if path.name != "config.yaml"}
    assert {path for path in before if before[path] != after.get(path)} <= {here / "hot" / ".lock"}
    weights = load_file(here / "hot" / "nonfinite" / "step-1" / "tensors-0.safetensors")
    assert all(tensor.isfinite().all() for name, tensor in weights.items() if name.startswith("model."))
    assert torch.stack([t.abs().max() for name, t in weights.items() if name.startswith("model.")]).max() > 1e20
