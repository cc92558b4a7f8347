"""The whole story end to end, every recipe in its turn, on untrained models: what each leaves is what the next
reads.
"""

import importlib
import json

import pytest
from diffusers import Flux2KleinPipeline

from clvr_train.data.readers import read_trajectories
from clvr_train.method.truncation import truncate
from clvr_train.proxy.prompts import read_proxy_prompts
from clvr_train.runtime.metrics import read_metrics
from tests.recipes.conftest import TINY

EVAL = ["experiment=shapes_eval", "num=6", "steps=1", "cfg=1", *TINY]


@pytest.fixture(scope="module")
def story(tmp_path_factory, tiny_folder, distilled_folder):
    """A folder in which the story has run as launch/quickstart.sh tells it, with small numbers."""
    folder = tmp_path_factory.mktemp("story")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def run(recipe, *overrides):
            importlib.import_module(f"recipes.{recipe}").main(list(overrides))

        run("make_shapes", "experiment=shapes_data", "run=s/data", "num=16")
        run("make_shapes", "experiment=shapes_rl_data", "run=s/rl_data", "num=16")
        run("train_dit", "experiment=shapes_sft", "run=s/sft", "data.folder=runs/s/data", f"model.folder={tiny_folder}",
            "train.steps=2", "train.batch=4", *TINY)  # fmt: skip
        run("train_vlm", "experiment=shapes_train_vlm", "run=s/controller", "data.folder=runs/s/data",
            "controller.folder=untrained", "train.steps=2", "train.batch=4", "train.micro_batch=4")  # fmt: skip
        run("make_proxy_prompts", "experiment=shapes_proxy", "data.folder=runs/s/rl_data")
        for reward in ("proxy", "simple"):
            run("train_pprl", "experiment=shapes_pprl", f"run=s/{reward}", f"reward={reward}",
                "data.folder=runs/s/rl_data",
                "model.folder=runs/s/sft/model", "pprl.epochs=2", "rollout.groups=2", "rollout.group_size=2",
                "rollout.steps=2", "pprl.grid_every=1", "pprl.t2i_share=0.5", "pprl.num_times=1",
                "pprl.time_range=[0,1]", *TINY)  # fmt: skip
        run("merge_weights", "experiment=shapes_merge", "run=s/merge", f"base={tiny_folder}",
            f"distilled={distilled_folder}", "aligned=runs/s/sft/model", "lora=runs/s/proxy/lora",
            "alphas=[[1.0,1.0],[0.5,1.0]]", "validation.num=2", "validation.steps=1", *TINY)  # fmt: skip
        for seed in (0, 1):
            run("evaluate", *EVAL, f"run=s/seed{seed}/eval/base", f"model.folder={tiny_folder}", f"seed={seed}")
            run("evaluate", *EVAL, f"run=s/seed{seed}/eval/merged", "model.folder=runs/s/merge/model", f"seed={seed}")
        run("evaluate", *EVAL, "run=s/eval/merged", "model.folder=runs/s/merge/model")
        run("evaluate", *EVAL, "run=s/eval/merged_closed_loop", "model.folder=runs/s/merge/model", "mode=closed_loop",
            "controller=runs/s/controller/model", "max_rounds=2")  # fmt: skip
        run("run_closed_loop", "experiment=shapes_closed_loop", "run=s/loop", "goals=[a red circle]", "max_rounds=1",
            "model.folder=runs/s/merge/model", "steps=1", "controller.folder=runs/s/controller/model",
            *TINY)  # fmt: skip
        run("report", "run=s")
        (folder / "runs" / "s" / "seed0.log").write_text("what launch/ablation.sh leaves beside the folders")
        run("compare", "run=s")
    return folder / "runs" / "s"


def test_every_model_folder_loads_in_diffusers(story):
    for name, distilled in (("sft", False), ("proxy", False), ("merge", True)):
        pipe = Flux2KleinPipeline.from_pretrained(story / name / "model")
        assert pipe.config.is_distilled is distilled


def test_training_leaves_its_logs(story):
    assert [row["step"] for row in read_metrics(story / "sft")] == [2]
    assert [row["step"] for row in read_metrics(story / "proxy")] == [1, 2]
    rows = [json.loads(line) for line in (story / "proxy" / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2 and all(0 <= row["reward"] <= 1 for row in rows)
    grids = sorted(path.name for path in (story / "proxy" / "samples").iterdir())
    assert grids == ["epoch-00001.png", "epoch-00002.png"]
    assert (story / "proxy" / "lora" / "pytorch_lora_weights.safetensors").exists()


def test_proxy_prompts_cover_the_steps(story):
    samples = [s for t in read_trajectories(story / "rl_data") for s in truncate(t)]
    assert read_proxy_prompts(story / "rl_data", samples).keys() == {s.key for s in samples}


def test_merge_reports_shifts_cosine_and_sources(story):
    report = json.loads((story / "merge" / "merge.json").read_text())
    assert report["total"]["shift_distill"] == 0  # this distilled model has the base's weights
    assert report["total"]["shift_align"] > 0
    assert "sha256" in (story / "merge" / "model" / "README.md").read_text()
    assert report["sources"].keys() == {"base", "distilled", "aligned", "lora"}
    tried = json.loads((story / "merge" / "sweep.json").read_text())
    assert [(row["alpha_distill"], row["alpha_align"]) for row in tried] == [(1.0, 1.0), (0.5, 1.0)]
    best = max(tried, key=lambda row: row["mean_score"])
    assert report["alpha_distill"] == best["alpha_distill"] and report["alpha_align"] == best["alpha_align"]
    assert "transformer_blocks: shift of the alignment" in (story / "merge" / "merge.html").read_text()


def test_summary_has_the_promised_form(story):
    summary = json.loads((story / "summary.json").read_text())
    assert set(summary) == {"seconds", "systems"} and "total" in summary["seconds"]
    for name, mode in (("merged", "single_step"), ("merged_closed_loop", "closed_loop")):
        row = summary["systems"][name]
        assert {"pass_rate", "mean_score", "ci95", "n", "steps", "cfg", "mode", "tags"} <= set(row)
        assert row["mode"] == mode and row["n"] == 6 and len(row["tags"]) == 6
        assert row["ci95"][0] <= row["pass_rate"] <= row["ci95"][1]
    page = (story / "report.html").read_text()
    assert "merged_closed_loop" in page and "<svg" in page and "http" not in page.replace("http-equiv", "")


def test_closed_loop_leaves_a_reason_for_every_goal(story):
    rows = json.loads((story / "loop" / "closed_loop.json").read_text())
    assert len(rows) == 1 and rows[0]["stop_reason"]


def test_comparison_pairs_seeds(story):
    result = json.loads((story / "comparison.json").read_text())
    assert set(result) == {"all goals", "three or more objects"}
    assert set(result["all goals"]["systems"]) == {"base", "merged"}
    assert len(result["all goals"]["systems"]["base"]["by_seed"]) == 2
