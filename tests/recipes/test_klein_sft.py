"""The experiments of full size with the tiny model swapped in, validation within a training, and how long one is."""

import json
import os
import subprocess
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from omegaconf import OmegaConf
from PIL import Image

from clvr_train.method.trajectory import Sample
from recipes._data import number_of_steps
from recipes.train_dit import main
from tests.logs import unmeasured
from tests.recipes.conftest import TINY, command

ONE = Fraction(1)


@pytest.fixture
def inside(world, monkeypatch):
    """The world's folder, as working folder of this process, with the models where experiments look for them."""
    monkeypatch.chdir(world)
    base = world / "models/shapes/base"
    if not base.exists():
        base.parent.mkdir(parents=True)
        base.symlink_to((world / "base").resolve())
    return world


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["klein_4b", "klein_9b"])
def test_the_papers_settings_run_on_a_cpu_with_one_override(inside, name):
    """The folder that comes out is one that the upstream pipeline loads and draws from."""
    main([f"experiment={name}_sft", "tiny=shapes"])
    run = inside / "runs" / f"{name}_sft" / "shapes"
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4]
    assert {"validation_loss_t0.1", "validation_loss_t0.9", "validation_loss_1_references"} <= lines[1].keys()
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    config = OmegaConf.load(run / "config.yaml")
    assert config.engine.precision == "bf16" and config.train.batch == 8 and config.train.epochs == 3
    pipe = Flux2KleinPipeline.from_pretrained(run / "model")
    pipe.set_progress_bar_config(disable=True)
    assert not pipe.config.is_distilled
    options = {"num_inference_steps": 2, "max_sequence_length": 96, "text_encoder_out_layers": (1, 2, 3)}
    source = torch.Generator().manual_seed(0)
    drawn = pipe(prompt="a red circle", height=96, width=96, guidance_scale=4.0, generator=source, **options).images[0]
    assert drawn.size == (96, 96) and np.asarray(drawn).std() > 1


COMMON = ["model.folder=base", *TINY, "data.folder=runs/data", "train.steps=3", "train.batch=4", "train.log_every=1"]
VALIDATION = ["validation.folder=runs/data", "validation.num=2", "validation.every=2", "validation.steps=2"]


def weights_of(run):
    return (run / "model/transformer/diffusion_pytorch_model.safetensors").read_bytes()


def test_neither_validation_nor_checkpointing_changes_a_bit_of_the_training(inside):
    """Nor does memory that validation fills, so that samples of the training are encoded again."""
    main([*COMMON, "run=plain"])
    main([*COMMON, *VALIDATION, "run=validated", "cache.memory_gb=0.0001", "engine.checkpointing=selective"])
    runs = inside / "runs"
    assert weights_of(runs / "plain") == weights_of(runs / "validated")
    plain, validated = (unmeasured(metrics_of(runs / name)) for name in ("plain", "validated"))
    assert [line["step"] for line in validated if "validation_loss" in line] == [2, 3]
    for line, other in zip(plain, validated, strict=True):
        assert line == {key: value for key, value in other.items() if not key.startswith("validation_")}
    with Image.open(runs / "validated/samples/step-000002.png") as grid:
        assert grid.width >= 2 * 98 and grid.height % 98 == 0


def test_validation_is_the_same_on_two_ranks(inside, world):
    main([*COMMON, *VALIDATION, "run=alone"])
    torchrun = [command("train_dit")[0], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*torchrun, *command("train_dit", *COMMON, *VALIDATION, "run=two", "engine=ddp")[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(words, cwd=world, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    for line, other in zip(metrics_of(world / "runs/alone"), metrics_of(world / "runs/two"), strict=True):
        losses = {key: value for key, value in line.items() if key.startswith("validation_")}
        # gradients of two ranks are summed in another order
        assert {key: other.get(key) for key in losses} == pytest.approx(losses, rel=1e-4)
    for step in (2, 3):
        images = []
        for run in ("alone", "two"):
            with Image.open(world / "runs" / run / f"samples/step-{step:06d}.png") as grid:
                images.append(np.asarray(grid, dtype=int))
        assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["validation.folder=nowhere"], "nowhere"),
        (["validation.folder=runs/data", "validation.captions=4"], "validation.captions=4, validation.folder="),
        (["model.overflow=error", "model.window=20"], "exceeds model.window=20; give a longer window"),
        (["model.window=2000"], "model.window=2000: base/text_encoder takes at most 1024 tokens"),
        (["engine.checkpointing=some"], "checkpointing='some' is not one of none, selective, full"),
        (["train.steps=null"], "train.steps: how long? give it, or train.epochs"),
    ],
)
def test_bad_choices_are_one_line(inside, capsys, overrides, message):
    with pytest.raises(SystemExit) as stop:
        main([*COMMON, *overrides, "run=refused"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and message in error.splitlines()[-1] and "Traceback" not in error


def test_epochs_are_passes_over_the_samples():
    samples = [Sample(str(n), 1, "goal", ("r",)) for n in range(10)]
    cfg = OmegaConf.create({"train": {"steps": None, "epochs": 3, "batch": 8}, "data": {"t2i_share": None}})
    assert number_of_steps(cfg, [(samples, ONE)]) == 4
    cfg.train.steps = 7
    assert number_of_steps(cfg, [(samples, ONE)]) == 7
    cfg.train.steps = None
    with pytest.raises(ValueError, match="train.epochs: only for one source"):
        number_of_steps(cfg, [(samples, ONE), (samples, ONE)])
    cfg.data.t2i_share = 0.5
    with pytest.raises(ValueError, match="train.epochs: only for one source"):
        number_of_steps(cfg, [(samples, ONE)])
