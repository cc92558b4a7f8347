"""Bad input: one line that names what is wrong, exit status 1, nothing half-written."""

import json
import shutil

import pytest

SFT = ["experiment=shapes_sft", "model.folder=base", "data.folder=runs/data", "train.steps=1"]


def refused(result, *parts):
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert all(part in lines[0] for part in parts), lines[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lrr=1", ("train.lrr", "train.lr")),
        ("model.folder=nowhere", ("nowhere/model_index.json", "not found")),
        ("data.folder=nowhere", ("nowhere/trajectories.jsonl",)),
        ("train.shift=linear", ("shift='linear'", "flux_linear")),
        ("train.batch=0", ("train.batch=0", "whole number of at least 1")),
        ("train.save_every=0", ("train.save_every=0", "whole number of at least 1")),
        ("train.steps=1.5", ("train.steps=1.5", "whole number of at least 1")),
    ],
)
def test_train_dit_refuses(world, run_recipe, override, parts):
    refused(run_recipe(world, "train_dit", *SFT, "run=refused", override, check=False), *parts)
    assert not (world / "runs" / "refused" / "model").exists()
    # All of these were asked of one run: what failed before it began does not stand in the way of the next command.


def test_distilled_model_is_no_training_base(world, run_recipe, distilled_folder):
    result = run_recipe(world, "train_dit", *SFT, f"model.folder={distilled_folder}", "run=distilled", check=False)
    refused(result, str(distilled_folder), "is_distilled", "merge the distillation delta afterwards")


def test_malformed_trajectory_names_file_record_and_field(world, run_recipe, tmp_path):
    lines = (world / "runs" / "data" / "trajectories.jsonl").read_text().splitlines()
    record = json.loads(lines[2])
    record["conversations"][1]["value"] = record["conversations"][1]["value"].replace("<IMG_GEN_1>", "<IMG_GEN_7>")
    lines[2] = json.dumps(record)
    shutil.copytree(world / "runs" / "data", tmp_path / "data")
    (tmp_path / "data" / "trajectories.jsonl").write_text("\n".join(lines) + "\n")
    result = run_recipe(world, "train_dit", *SFT, f"data.folder={tmp_path}/data", "run=malformed", check=False)
    refused(result, "trajectories.jsonl:3: ")


def test_proxy_prompts_are_asked_for_by_name(world, run_recipe, tmp_path):
    shutil.copytree(world / "runs" / "data", tmp_path / "data", ignore=shutil.ignore_patterns("proxy*"))
    pprl = ["experiment=shapes_pprl", "model.folder=base", f"data.folder={tmp_path}/data", "run=x"]
    refused(run_recipe(world, "train_pprl", *pprl, check=False), "proxy_prompts.jsonl", "make_proxy_prompts.py")


def test_benchmark_goals_are_not_for_training(world, run_recipe):
    refused(run_recipe(world, "make_shapes", "run=y", "split=eval", check=False), "split='eval'", "train, rl")
