"""The plan of PPRL: evaluations and forwards are those that a real epoch makes, bytes and FLOPs are what they say."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import ImageStat

from clvr_train.method.score import Score
from clvr_train.models.adapters import OLD, POLICY
from clvr_train.models.plan import network_evaluations
from clvr_train.shapes.judge import ShapesJudge
from recipes import train_pprl
from recipes.plan import main, table

MODELS = Path(__file__).resolve().parents[2] / "models/shapes"
SMALL = [
    "recipe=train_pprl", f"model.folder={MODELS}/base", "data.folder=null", "data.trajectories=16", "lora.rank=4",
    "lora.alpha=8", "rollout.groups=8", "rollout.group_size=2", "rollout.steps=2", "rollout.batch=3", "pprl.epochs=1",
    "pprl.micro_batch=3", "reward.screen=false", "sentinel.probe=0",
]  # fmt: skip


@pytest.fixture
def plan(capsys):
    def run(*overrides: str) -> dict:
        main(["format=json", *overrides])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def epoch(tmp_path, monkeypatch):
    """epoch(*overrides) -> network evaluations and forwards by kind, encodings, and the epoch's metrics, of a real
    training whose judge likes every picture a bit differently.
    """
    monkeypatch.chdir(tmp_path)
    evaluations, forwards, made = Counter(), Counter(), []

    def count(transformer, args, kwargs):
        layer = transformer.transformer_blocks[0].attn.to_q
        kind = "reference" if layer.disable_adapters else {OLD: OLD, POLICY: POLICY}[layer.active_adapter[0]]
        evaluations[kind] += len(kwargs["hidden_states"])
        forwards[kind] += 1

    def build(*args, **kwargs):
        conditioner = build_conditioner(*args, **kwargs)
        conditioner.klein.transformer.register_forward_pre_hook(count, with_kwargs=True)
        made.append(conditioner)
        return conditioner

    build_conditioner = train_pprl.build_conditioner
    monkeypatch.setattr(train_pprl, "build_conditioner", build)
    monkeypatch.setattr(ShapesJudge, "global_score", lambda self, image, prompt: likes(image))
    monkeypatch.setattr(ShapesJudge, "edit_score", lambda self, source, image, text: likes(image))

    def likes(image):
        return Score(sum(ImageStat.Stat(image).mean) / 3 / 255)

    def run(*overrides: str) -> dict:
        train_pprl.main([*SMALL[1:], *overrides, "run=counted"])
        metrics = json.loads((tmp_path / "runs/counted/metrics.jsonl").read_text().splitlines()[0])
        return {
            "evaluations": dict(evaluations),
            "forwards": dict(forwards),
            "encodings": {"text_encoder": made[0].text_calls, "vae": made[0].image_calls},
            "items": metrics["items"],
        }

    return run


def by_adapter(found):
    """Rollouts and the update's forwards of `old` go through the same adapter."""
    kinds = {OLD: found["rollout"] + found["old"], POLICY: found["policy"], "reference": found["reference"]}
    return {kind: number for kind, number in kinds.items() if number}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["rollout.cfg=1", "pprl.beta_kl=0", "pprl.num_times=1"],
        ["rollout.batched_cfg=true", "pprl.cfg=3", "engine.checkpointing=full"],
        ["pprl.anchor=1", "pprl.anchor_share=1", "pprl.beta_kl=0"],
        ["pprl.t2i_share=1", "pprl.num_times=2", "rollout.groups=3", "pprl.steps_per_epoch=2"],
    ],
    ids=["default", "no guidance, no KL", "batched guidance, guided training", "anchor", "two steps"],
)
def test_counts_are_those_of_a_real_epoch(plan, epoch, overrides):
    """To the last one: images and branches, and calls of the transformer; every context is encoded once."""
    planned, found = plan(*SMALL, *overrides), epoch(*overrides)
    assert found["items"] == planned["items_per_step"]
    assert found["evaluations"] == by_adapter(planned["evaluations_per_step"])
    assert found["forwards"] == by_adapter(planned["forwards"])
    assert planned["forwards_per_step"] == sum(found["forwards"].values())
    guided = "rollout.cfg=1" not in overrides
    texts = planned["encodings_per_step"]["uncached"]["text_encoder"] + guided  # and the empty one of a run
    assert found["encodings"]["text_encoder"] == texts
    assert found["encodings"]["vae"] <= planned["encodings_per_step"]["uncached"]["vae"]  # some share pictures


def test_the_probe_of_the_sentinel_is_counted_apart(plan, epoch):
    """Three tasks are drawn by the reference at the start, then by the policy, whose velocities are compared with
    those of old.
    """
    options = ["rollout.groups=4", "pprl.t2i_share=1", "sentinel.probe=3", "sentinel.every=1"]
    planned, found = plan(*SMALL, *options), epoch(*options)
    beside = sum(found["evaluations"].values()) - planned["evaluations_per_step"]["total"]
    assert beside == sum(planned["probe_evaluations"].values()) == 3 * (4 + 1) + 3 * (4 + 2)


def test_flat_groups_and_missing_scores_cost_nothing(epoch, monkeypatch):
    """One group is flat, one picture of another has no score."""
    seen = Counter()

    def judge(self, image, prompt):
        seen[prompt] += 1
        if prompt == min(seen):  # some prompt
            return Score(0.5)
        return Score(None, "no reply") if len(seen) == 2 and seen[prompt] == 1 else score(self, image, prompt)

    score = ShapesJudge.global_score
    monkeypatch.setattr(ShapesJudge, "global_score", judge)
    settings = {"steps": 2, "cfg": 4.0, "beta_kl": 1e-4}
    found = epoch("pprl.t2i_share=1", "rollout.groups=4", "rollout.group_size=3")
    assert found["items"] < 4 * 3 * 2
    assert found["evaluations"] == by_adapter(network_evaluations(12, int(found["items"]), **settings))


def test_the_formula():
    counts = network_evaluations(16, 32, steps=8, cfg=4.0, beta_kl=1e-4)
    assert counts == {"rollout": 256, "old": 32, "reference": 32, "policy": 32, "total": 352}
    counts = network_evaluations(16, 32, steps=8, cfg=1.0, beta_kl=0, training_cfg=2.0, anchored=5)
    assert counts == {"rollout": 128, "old": 64, "reference": 5, "policy": 69, "total": 266}


@pytest.mark.parametrize(("name", "base", "lora"), [("klein_4b", 3.876e9, 48.17e6), ("klein_9b", 9.079e9, 87.03e6)])
def test_the_papers_settings_are_planned_for_a_node(plan, name, base, lora):
    found = plan(f"experiment={name}_pprl")
    settings, held = found["settings"], found["bytes_per_gpu"]
    assert (settings["engine"], settings["gpus"], settings["precision"]) == ("ddp", 8, "bf16")
    assert (settings["groups"], settings["group_size"], settings["steps"], settings["cfg"]) == (8, 16, 8, 4.0)
    assert found["parameters"] == pytest.approx(base, rel=2e-4)
    assert found["trained_parameters"] == pytest.approx(lora, rel=2e-4)
    assert found["evaluations_per_step"]["rollout"] == 8 * 16 * 8 * 2
    weights = found["weights_per_gpu"]
    assert sum(weights.values()) == held["weights"] and weights["base"] == pytest.approx(2 * base, rel=2e-4)
    assert weights["policy"] == weights["old"] == weights["average"] == 4 * found["trained_parameters"]
    assert held["gradients"] == weights["policy"]
    assert held["optimizer"] == pytest.approx(2 * weights["policy"], rel=1e-4)
    assert held["activations"] == max(found["activations_per_gpu"].values())
    assert held["total"] == sum(held[kind] for kind in ("weights", "gradients", "optimizer", "activations"))
    assert found["fits"] and found["change"] == {}
    assert found["flops_per_step"] == sum(found["flops"].values())


def test_what_does_not_fit_comes_with_a_change(plan):
    tight = ["experiment=klein_4b_pprl", "references=4", "pprl.micro_batch=16", "engine.checkpointing=none"]
    found = plan(*tight)
    assert not found["fits"] and found["change"] == {"engine.checkpointing": "full"}
    assert plan(*tight, *(f"{key}={value}" for key, value in found["change"].items()))["fits"]


def test_flops_of_long_histories_follow_from_those_of_short_ones(plan):
    """They are a polynomial of degree 2 in the number of references."""
    mixed = plan(*SMALL, "pprl.t2i_share=0.2", "rollout.groups=5")
    alone = [plan(*SMALL, f"references={number}", "rollout.groups=1")["flops"] for number in range(5)]
    assert mixed["flops"] == {what: sum(flops[what] for flops in alone) for what in mixed["flops"]}


def test_gpus_share_the_groups_and_the_slowest_sets_the_time(plan):
    alone, four = plan(*SMALL), plan(*SMALL, "engine=ddp", "gpus=3")
    assert four["evaluations_per_step"] == alone["evaluations_per_step"]
    assert four["flops_per_step"] == alone["flops_per_step"]
    assert four["seconds_per_step"] == pytest.approx(alone["seconds_per_step"] * 3 / 8), "one has 3 groups of 8"
    replayed = plan(*SMALL, "replay=runs/other")
    kinds = ("evaluations_per_step", "forwards", "flops")
    assert [replayed[kind]["rollout"] for kind in kinds] == [0, 0, 0]
    assert four["forwards"]["policy"] > alone["forwards"]["policy"], "and the others draw blanks beside it"


def test_text_has_lines_of_its_own(plan):
    lines = table(plan(*SMALL)).splitlines()
    assert {"weights", "phases", "evaluations", "fits"} <= {line.split()[0] for line in lines}
    counts = "160 per step, an epoch of 16 images: 64 rollout, 32 old, 32 reference, 32 policy"
    assert [line.split(None, 1)[1] for line in lines if line.startswith("evaluations")] == [counts]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=zero3"], "engine=zero3, precision=fp32, offload=none: train_pprl has single, ddp, zero1 and zero2"),
        (["engine.precision=bf16_states"], "precision=bf16_states"),
        (["engine=zero1", "engine.offload=optimizer"], "offload=optimizer"),
        (["model.size_px=[90,96]"], "model.size_px=[90, 96]: both sides must be multiples of 32"),
        (["pprl.t2i_share=2"], "t2i_share=2 is not in [0, 1]"),
    ],
)
def test_bad_input_is_one_line(capsys, overrides, message):
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, *overrides])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and message in error and error.count("\n") == 1
