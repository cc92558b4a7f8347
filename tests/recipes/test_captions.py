"""Corpora of captions as a user trains on them: FLUX-Reason-6M and Fine-T2I in small, made of the shapes world."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from clvr_train.data.refusals import Refusals
from clvr_train.data.sharegpt import write_trajectories
from clvr_train.method.trajectory import Step, Trajectory
from clvr_train.runtime.distributed import World
from clvr_train.shapes.base import captions
from clvr_train.shapes.judge import ShapesJudge
from clvr_train.shapes.render import render
from recipes._data import read_batches, read_sources, sample_order
from recipes._rollouts import build_tasks
from recipes._services import Reward
from tests.data.corpora import fine_t2i_record, flux_reason_rows, picture, write_flux_reason, write_tar
from tests.recipes.conftest import ROOT

NUM = 8
REWARD = Reward(ShapesJudge(), 0, {}, ())
GOALS = list(captions(NUM, seed=5, weights={"description": 0, "goal": 1, "edit": 0}))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    render(GOALS[number].scene).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """`flux_reason/` and `fine_t2i/` of the same goals; record 6 of `bad.tar` has no JSON, record 7 no image."""
    folder = tmp_path_factory.mktemp("corpora")
    rows = flux_reason_rows(range(NUM), png)
    for row, goal in zip(rows, GOALS, strict=True):
        row["caption_detail"] = goal.text
    write_flux_reason(folder / "flux_reason" / "a.parquet", rows)
    records = [fine_t2i_record(str(n), png(n), enhanced_prompt=goal.text) for n, goal in enumerate(GOALS)]
    write_tar(folder / "fine_t2i" / "a.tar", sum(records, []))
    records[5] = [("5.jpg", png(5)), ("5.json", b'{"prompt":')]
    records[6][0] = ("6.jpg", picture(6)[:500])
    write_tar(folder / "bad.tar", sum(records, []))
    return folder


def config(recipe: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose(recipe, list(overrides))


def keys(folder: Path, form: str, **changed: object) -> list[str]:
    values = {"folder": folder, "format": form} | changed
    return [f"data.{key}={json.dumps(value) if value is None else value}" for key, value in values.items()]


def batches(cfg: DictConfig, steps: range, batch: int = 3) -> list[list]:
    sources, _ = read_sources(cfg.data)
    order, refusals = sample_order(sources, cfg.data, batch, seed=0), Refusals(cfg.data.folder, cfg.data.max_refused)
    return list(read_batches(sources, map(order.batch, steps), [tuple(cfg.model.size_px)], cfg.data.workers, refusals))


@pytest.mark.parametrize("form", ["flux_reason", "fine_t2i"])
def test_batches_of_a_corpus_are_its_pictures_in_order_for_any_number_of_workers(corpora: Path, form: str) -> None:
    overrides = keys(corpora / form, form)
    whole = batches(config("train_dit", *overrides), range(5))
    assert [index for batch in whole for (epoch, index), _ in batch if epoch == 0] != list(range(NUM))
    for (_, index), sample in (item for batch in whole for item in batch):
        assert sample.goal == GOALS[index].text
        assert np.array_equal(sample.target, render(GOALS[index].scene))
    tail = batches(config("train_dit", *overrides, "data.workers=2"), range(3, 5))
    assert [[drawn for drawn, _ in batch] for batch in tail] == [[drawn for drawn, _ in batch] for batch in whole[3:]]
    for ours, theirs in zip(sum(tail, []), sum(whole[3:], []), strict=True):
        assert ours[1].key == theirs[1].key and np.array_equal(ours[1].target, theirs[1].target)


def test_bad_records_are_left_out_up_to_a_share(corpora: Path) -> None:
    overrides = keys(corpora / "bad.tar", "fine_t2i")
    seen = batches(config("train_dit", *overrides, "data.max_refused=0.25"), range(3))
    assert sorted(index for batch in seen for (epoch, index), _ in batch if epoch == 0) == [0, 1, 2, 3, 4, 7]
    with pytest.raises(ValueError, match=r"bad.tar:[67]:"):
        batches(config("train_dit", *overrides), range(3))


def test_what_does_not_go_together_is_refused(corpora: Path) -> None:
    write_trajectories(corpora / "stops", [Trajectory(name, "goal", (Step("no", "stop"),)) for name in "ab"])
    draws = Trajectory("a", "goal", (Step("r", "generate", Image.new("RGB", (64, 64))),))
    for name in ("one", "two"):
        write_trajectories(corpora / name, [draws])
    for overrides, message in (
        (keys(corpora / "flux_reason", "parquet"), "format='parquet' is not one of flux_reason, fine_t2i"),
        (keys(corpora / "flux_reason", "flux_reason", direct=True), "data.direct=true: captions"),
        (keys(corpora / "flux_reason", "flux_reason", caption="poem"), "caption_poem: there is no such column"),
        (keys(None, "fine_t2i"), "data.folder: a folder or file of captions is needed"),
        ([f"data.mix=[{{folder: {corpora / 'stops'}}}]"], "stops: none of its 2 trajectories draws an image"),
        (
            [f"data.mix=[{{folder: {corpora / 'one'}}}, {{folder: {corpora / 'two'}}}]"],
            r"data.mix\[1\]: id 'a' stands in data.mix\[0\] too",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_sources(config("train_dit", *overrides).data)


def test_captions_are_prompts_for_rl(corpora: Path) -> None:
    for form in ("flux_reason", "fine_t2i"):
        prompts = [f"data.prompts.folder={corpora / form}", f"data.prompts.format={form}"]
        cfg = config("train_pprl", "data.folder=null", *prompts)
        tasks = build_tasks(cfg, REWARD, World())
        assert [task.sample.goal for task in tasks] == [task.prompt.p_t2i for task in tasks] == [g.text for g in GOALS]
        assert all(task.prompt.p_i2i is None and not task.sample.references for task in tasks)
    cfg.data.prompts.folder = str(corpora / "bad.tar")
    with pytest.raises(ValueError, match="bad.tar:6: json: not a line of JSON"):
        build_tasks(cfg, REWARD, World())
    cfg.data.max_refused = 0.25  # the damaged image too is found at the start
    assert len(build_tasks(cfg, REWARD, World())) == NUM - 2


def test_train_dit_trains_on_a_corpus(corpora: Path, run_recipe) -> None:
    """Through the model, in a process as a user starts it: bad records are logged, the rest is trained on."""
    (corpora / "base").symlink_to(ROOT / "models" / "shapes" / "base")
    result = run_recipe(
        corpora, "train_dit", *keys("bad.tar", "fine_t2i", max_refused=0.25), "model.folder=base", "run=fine",
        "train.steps=2", "train.batch=4", "train.log_every=1",
    )  # fmt: skip
    lines = [json.loads(line) for line in (corpora / "runs" / "fine" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["loss"] > 0 for line in lines)
    assert result.stderr.count("refused: bad.tar:") == 2
    assert 0 <= lines[0]["refused"] <= lines[1]["refused"] == 2
    assert OmegaConf.load(corpora / "runs" / "fine" / "config.yaml").data.format == "fine_t2i"
    result = run_recipe(
        corpora, "train_dit", *keys("bad.tar", "fine_t2i", max_refused=0.2), "model.folder=base", "run=finer",
        "train.steps=2", "train.batch=4", check=False,
    )  # fmt: skip
    assert "2 of 8 records refused, more than max_refused=0.2 allows" in result.stderr.splitlines()[-1]
    assert result.returncode == 1 and not (corpora / "runs" / "finer" / "model").exists()
