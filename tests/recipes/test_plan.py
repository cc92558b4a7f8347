"""plan: what it prints, that it speaks of the training as composed, and that its counts are those of the loss."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner
from clvr_train.sft.dit import backward_flow_matching
from recipes._config import all_keys, check_job
from recipes._recipe import CONF
from recipes.plan import OWN, RECIPES, main, table

MODELS = Path(__file__).resolve().parents[2] / "models/shapes"
KEYS_IN_ORDER = ("weights", "gradients", "optimizer", "activations", "total")
KEYS = set(KEYS_IN_ORDER)


@pytest.fixture
def plan(capsys, tmp_path, monkeypatch):
    """plan(*overrides) -> what `format=json` prints. Nothing is written."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> dict:
        main(["format=json", *overrides])
        assert not list(tmp_path.iterdir())
        return json.loads(capsys.readouterr().out)

    return run


def dit(folder, *overrides: str) -> list[str]:
    return [f"model.folder={folder}", "model.window=48", "train.batch=8", "train.micro_batch=8", *overrides]


def test_it_prints_what_a_program_reads(plan, tiny_folder):
    found = plan(*dit(tiny_folder))
    assert set(found) >= {"parameters", "bytes_per_gpu", "flops_per_step", "forwards_per_step", "fits"}
    held = found["bytes_per_gpu"]
    assert set(held) == KEYS and held["total"] == sum(held[kind] for kind in KEYS - {"total"})
    assert found["parameters"] == found["trained_parameters"] and found["frozen_parameters"] > 0
    assert (found["fits"], found["change"], found["forwards_per_step"]) == (True, {}, 1)
    seconds = found["flops_per_step"] / (67e12 * 0.45)
    assert found["seconds_per_step"] == pytest.approx(seconds)


def test_counts_are_those_of_the_loss(plan, tiny_folder, tiny_klein):
    """Forwards of the transformer, and what encoders are asked for with nothing remembered and with all of it."""
    klein = tiny_klein()
    klein.transformer.requires_grad_(True)
    samples = [
        Sample(str(i), 3, f"goal {i}", ("draw", "edit"), tuple(Image.new("RGB", (96, 96)) for _ in "ab"),
               Image.new("RGB", (96, 96)))
        for i in range(7)
    ]  # fmt: skip
    found = plan(*dit(tiny_folder, "references=2", "train.batch=7", "train.micro_batch=3"))
    forwards = []
    klein.transformer.register_forward_hook(lambda *_: forwards.append(1))
    for memory_gb, kind in ((0, "uncached"), (1, "cached")):
        conditioner = Conditioner(klein, (96, 96), memory_gb=memory_gb)
        if kind == "cached":
            conditioner.prime(samples)
        before, done = len(forwards), (conditioner.text_calls, conditioner.image_calls)
        seeds = [(0, i) for i in range(7)]
        backward_flow_matching(conditioner, samples, seeds, text_dropout=0.0, micro_batch=3)
        assert len(forwards) - before == found["forwards_per_step"] == 3
        called = conditioner.text_calls - done[0], conditioner.image_calls - done[1]
        assert called == tuple(found["encodings_per_step"][kind].values()), kind


def test_text_is_the_default(capsys, tiny_folder):
    main(dit(tiny_folder))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][:7] == ["setting", "parameters", *KEYS_IN_ORDER]


def test_gpus_share_the_batch(plan, tiny_folder):
    alone = plan(*dit(tiny_folder, "train.micro_batch=2", "engine.precision=bf16"))
    four = plan(*dit(tiny_folder, "train.micro_batch=2", "engine.precision=bf16", "gpus=4", "engine=zero2"))
    assert four["flops_per_step"] == alone["flops_per_step"] and four["forwards_per_step"] == 4
    assert four["seconds_per_step"] == pytest.approx(alone["seconds_per_step"] / 4)
    assert four["bytes_per_gpu"]["activations"] == alone["bytes_per_gpu"]["activations"]
    assert four["bytes_per_gpu"]["optimizer"] == pytest.approx(alone["bytes_per_gpu"]["optimizer"] / 4, abs=1)


def test_encoders_cost_time_without_a_cache_and_recomputation_is_apart(plan, tiny_folder):
    plain = plan(*dit(tiny_folder))
    more = plan(*dit(tiny_folder, "cached=false", "engine.checkpointing=full"))
    assert more["flops_per_step"] == plain["flops_per_step"]
    assert plain["encoder_flops_per_step"] == plain["recomputed_flops_per_step"] == 0
    assert 0 < more["recomputed_flops_per_step"] < more["flops_per_step"] / 3 and more["encoder_flops_per_step"] > 0
    assert more["seconds_per_step"] > plain["seconds_per_step"]
    assert more["bytes_per_gpu"]["activations"] < plain["bytes_per_gpu"]["activations"]


@pytest.mark.parametrize(("name", "parameters"), [("klein_4b", 3.876e9), ("klein_9b", 9.079e9)])
def test_the_papers_settings_are_planned_for_a_node(plan, name, parameters):
    """Bytes of 16 a parameter, of which ZeRO-2 splits 14 over eight GPUs, one sample on each; it fits."""
    found = plan(f"experiment={name}_sft")
    assert found["parameters"] == pytest.approx(parameters, rel=2e-4)
    settings = found["settings"]
    assert (settings["engine"], settings["gpus"], settings["batch"], settings["micro_batch"]) == ("zero2", 8, 8, 1)
    assert found["forwards_per_step"] == 8 and found["fits"] and found["change"] == {}
    assert settings["precision"] == "bf16" and settings["optimizer"] == "adamw"
    held = found["bytes_per_gpu"]
    assert held["gradients"] + held["optimizer"] == pytest.approx(14 * parameters / 8, rel=1e-3)
    tiny = plan(f"experiment={name}_sft", "tiny=shapes", f"model.folder={MODELS}/base")
    assert tiny["parameters"] < 10e6 and tiny["settings"]["gpus"] == 1


def test_9b_fits_one_gpu_with_8_bit_moments(plan):
    alone = ["experiment=klein_9b_sft", "engine=single", "engine.precision=bf16", "gpu=h200", "train.batch=1"]
    assert not plan(*alone)["fits"]
    assert plan(*alone, "engine.optimizer=adamw8bit")["fits"]


def test_it_speaks_of_the_experiment_as_its_recipe_composes_it(plan):
    found = plan("experiment=shapes_sft", f"model.folder={MODELS}/base", "train.batch=4")
    assert found["recipe"] == "train_dit" and found["settings"]["batch"] == found["settings"]["micro_batch"] == 4
    folder = f"controller.folder={MODELS}/controller"
    found = plan("experiment=shapes_train_vlm", folder, "tokens=300", "images=1", "engine.checkpointing=full")
    assert (found["recipe"], found["settings"]["batch"]) == ("train_vlm", 16)
    assert found["settings"]["checkpointing"] == "full" and found["parameters"] == found["trained_parameters"]
    frozen = plan("experiment=shapes_train_vlm", folder, "tokens=300", "images=1", "train.vision=false")
    assert frozen["parameters"] - frozen["trained_parameters"] == frozen["frozen_parameters"] > 0


def test_what_does_not_fit_comes_with_a_change(plan, tiny_folder):
    """All of the GPU but 3 MB is reserved."""
    options = [f"reserve_gb={(78 * 2**30 - 3e6) / 1e9}", "train.micro_batch=2", "engine=zero1", "gpus=1"]
    tight = dit(tiny_folder, *options, "engine.offload=optimizer")
    found = plan(*tight)
    assert not found["fits"] and found["change"]
    changed = plan(*tight, *(f"{key}={value}" for key, value in found["change"].items()))
    assert changed["fits"]
    text = table(found)
    assert "\nfits        no: 83.8 GB" in text and "\nchange      " in text
    assert "change      none helps" in table(found | {"change": None}) and "change" not in table(changed)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=xml"], "format='xml' is not one of text, json"),
        (["gpu=h300"], "gpu='h300' is not one of h100, h200, h20, a100"),
        (["recipe=evaluate"], "recipe='evaluate' is not one of train_dit, train_vlm, train_pprl"),
        (["engine=zero9"], "unknown engine 'zero9': did you mean 'zero"),
        (["engine.precision=fp8"], "precision='fp8' is not one of fp32, bf16, bf16_states"),
        (["gpus=3", "engine=ddp"], "train.batch=32: must be a multiple of gpus=3"),
        (["gpus=2"], "gpus=2: engine=single has one"),
        (["model.window=2000"], "model.window=2000: "),
        (["gpus=0"], "gpus=0, mfu=0.45: both must be above 0"),
        (["model.folder=nowhere"], "nowhere/model_index.json: not found"),
        (["model.size_px=[90,96]"], "model.size_px=[90, 96]: both sides must be multiples of 32"),
        (["recipe=train_vlm", "controller.folder=untrained"], "its size is not known yet; give a folder"),
        (["recipe=train_dit", "train.max_length=2"], "unknown key 'train.max_length'"),
        (["recipe=train_dit", "experiment=shapes_train_vlm"], "is for plan, train_vlm, not train_dit"),
        (["experiment=shapes_data"], "'shapes_data' is for make_shapes, not plan"),
        (["gpuss=2"], "unknown key 'gpuss': did you mean 'gpus'"),
    ],
)
def test_bad_input_is_one_line(capsys, overrides, message):
    if "train_vlm" not in str(overrides):
        overrides = [f"model.folder={MODELS}/base", *overrides]  # the last of a key counts
    with pytest.raises(SystemExit) as stop:
        main(overrides)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and message in error and error.count("\n") == 1


def test_every_key_of_a_training_can_be_given():
    def keys(name: str) -> frozenset[str]:
        return all_keys(OmegaConf.to_container(check_job(name, CONF, []), resolve=False))

    trainings = frozenset().union(*map(keys, RECIPES))
    assert trainings <= keys("plan")
    assert {key for key in keys("plan") - trainings if "." not in key} == set(OWN)
