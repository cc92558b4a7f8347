"""The experiments of PPRL at full size, on a CPU by one override."""

import json

import pytest
import torch
from diffusers import Flux2KleinPipeline
from omegaconf import OmegaConf

from recipes._config import check_job
from recipes._recipe import CONF
from recipes.train_pprl import main
from tests.recipes.conftest import ROOT


@pytest.mark.parametrize("name", ["klein_4b", "klein_9b"])
def test_the_papers_settings_run_on_a_cpu_with_one_override(tmp_path, monkeypatch, name):
    """Model, data, teacher and judge are those of the shapes world; the rest is the experiment's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    main([f"experiment={name}_pprl", "tiny=shapes_pprl"])
    run = tmp_path / "runs" / f"{name}_pprl" / "shapes"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["missing_scores"] == 0 for line in lines)
    config = OmegaConf.load(run / "config.yaml")
    assert (config.rollout.steps, config.rollout.cfg, config.engine.precision) == (8, 4.0, "bf16")
    assert (config.pprl.num_times, config.pprl.beta_kl, config.lora.rank) == (2, 1e-4, 32)
    pipe = Flux2KleinPipeline.from_pretrained(run / "model")
    state = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    base = Flux2KleinPipeline.from_pretrained(ROOT / "models/shapes/base").transformer.state_dict()
    assert any(not torch.equal(state[name].float(), base[name].float()) for name in state)
    base = Flux2KleinPipeline.from_pretrained(ROOT / "models/shapes/base")
    base.load_lora_weights(run / "lora")


@pytest.mark.parametrize(("name", "model"), [("klein_4b", "klein_4b"), ("klein_9b", "klein_9b")])
def test_they_are_for_eight_gpus_and_a_judge_behind_a_server(name, model):
    config = check_job("train_pprl", CONF, [f"experiment={name}_pprl"])
    assert (config.model.name, config.engine.name, config.rollout.groups) == (model, "ddp", 8)
    assert config.rollout.group_size == 16 and config.reward.of_images.unified_reward == 1.0
    assert OmegaConf.is_missing(config.data, "folder") and config.data.trajectories == 0


def test_trajectories_are_made_or_read_and_not_both(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["pprl.epochs=1", f"model.folder={ROOT / 'models/shapes/base'}"]
    with pytest.raises(SystemExit):
        main(["data.folder=runs/data", "data.trajectories=4", *options])
    assert "data.trajectories=4: instead of a folder; set data.folder=null" in capsys.readouterr().err
