"""The order in which train_dit sees its samples, and the batches that it makes of them."""

import json
import math
from collections import Counter
from fractions import Fraction
from itertools import chain

import pytest
from omegaconf import OmegaConf
from PIL import Image

from clvr_train.data.buckets import sizes_of_area
from clvr_train.data.mixing import step_class
from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner
from clvr_train.sft.dit import backward_flow_matching
from recipes._data import full_batches, sample_order
from tests.recipes.conftest import TINY

# 70 first images, and edits with 1, 2, 3 and 5 images of history: 20, 6, 3 and 1 of them.
COUNTS = {0: 70, 1: 20, 2: 6, 3: 3, 5: 1}
SAMPLES = [
    Sample(f"{k}-{i}", k + 1, "goal", ("r",), tuple("x" * k)) for k, count in COUNTS.items() for i in range(count)
]
CORPUS = tuple(Sample(f"c{i}", 1, "caption", ()) for i in range(40))  # no list: like a corpus that is read when asked
ONE = Fraction(1)


def data(**keys: object):
    return OmegaConf.create({"t2i_share": None, "window": 1, **keys})


def drawn(order, steps: int) -> list[int]:
    return [index for step in range(steps) for _, index in order.batch(step)]


def test_shares_of_steps_are_exact():
    order = sample_order([(SAMPLES, ONE)], data(t2i_share=0.5), 8, seed=0)
    assert Counter(step_class(SAMPLES[i]) for i in drawn(order, 10)) == {0: 40, 1: 10, 2: 10, 3: 10, 4: 10}


def test_without_shares_every_sample_comes_once_an_epoch():
    assert sorted(drawn(sample_order([(SAMPLES, ONE)], data(), 10, seed=0), 10)) == list(range(100))


def test_sources_are_mixed_by_weight_exactly():
    order = sample_order([(SAMPLES, ONE), (CORPUS, Fraction(3)), (SAMPLES[:5], Fraction(0))], data(), 8, seed=0)
    indices = drawn(order, 20)
    assert Counter(0 if i < 100 else 1 if i < 140 else 2 for i in indices) == {0: 40, 1: 120}
    assert Counter(i for i in indices if i >= 100) == dict.fromkeys(range(100, 140), 3), "three epochs of the corpus"


def test_sources_share_the_steps_that_they_have():
    """Half text to image, of which the corpus of captions gives three quarters; all edits are of the trajectories."""
    order = sample_order([(SAMPLES, ONE), (CORPUS, Fraction(3))], data(t2i_share=0.5), 8, seed=0)
    every = SAMPLES + list(CORPUS)
    counts = Counter((step_class(every[i]), i >= 100) for i in drawn(order, 20))
    edits = {(kind, False): 20 for kind in (1, 2, 3, 4)}
    assert counts == {(0, False): 20, (0, True): 60, **edits}


def test_a_corpus_of_captions_has_no_edits():
    with pytest.raises(ValueError, match="t2i_share=0.5, but no sample has images of history"):
        sample_order([(CORPUS, ONE)], data(t2i_share=0.5), 8, seed=0)
    with pytest.raises(ValueError, match="data.weight: one of the sources"):
        sample_order([(CORPUS, 0 * ONE), (SAMPLES, 0 * ONE)], data(), 8, seed=0)


def picture(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), (height % 256, width % 256, 0))


def test_full_batches_share_all_sizes_and_no_sample_is_lost(tiny_klein):
    klein = tiny_klein()
    sizes = sizes_of_area(96, klein.token_px)
    conditioner = Conditioner(klein, (96, 96), target_sizes=sizes)
    samples = []
    for i, size_px in enumerate([(64, 128), (96, 96), (128, 64), (100, 100)] * 6):
        references = tuple(picture(96, 64 + 32 * (i % 2)) for _ in range(i % 3))
        samples.append(Sample(f"{i}", 1 + len(references), "goal", ("r",), references, picture(*size_px)))
    cfg = OmegaConf.create({"seed": 0, "data": data(), "train": {"batch": 4, "micro_batch": 2}})
    draw = full_batches([(samples, ONE)], conditioner, cfg)
    buckets = Counter(map(conditioner.bucket, samples))
    micro_batches = sum(-(-count // 2) for count in buckets.values())
    assert len(buckets) > 6 and micro_batches % 2 == 0, "an epoch of whole batches, so that it can be counted"
    epoch = [draw(step) for step in range(micro_batches // 2)]
    assert sorted(index for _, index in chain(*epoch)) == list(range(len(samples)))
    for batch in epoch:
        assert len({conditioner.bucket(samples[index]) for _, index in batch}) <= 2
    with pytest.raises(ValueError, match="batch=5 is no multiple of 2"):
        full_batches([(samples, ONE)], conditioner, OmegaConf.merge(cfg, {"train": {"batch": 5}}))
    with pytest.raises(ValueError, match="only for trajectories of one source"):
        full_batches([(CORPUS, ONE)], conditioner, cfg)


def test_train_dit_on_several_sources_with_aspects(run_recipe, world) -> None:
    """As a user starts it: two sources of trajectories, targets of several aspects; and whole micro-batches."""
    run_recipe(world, "make_shapes", "run=other", "num=6", "seed=1")
    mix = "data.mix=[{folder: runs/data}, {folder: runs/other, direct: true, weight: 2}]"
    common = ["model.folder=base", *TINY, "train.steps=2", "train.batch=4", "train.micro_batch=2", "train.log_every=1"]
    run_recipe(world, "train_dit", mix, "data.aspects=true", "run=mixed", *common)
    run_recipe(world, "train_dit", "data.folder=runs/data", "train.full_batches=true", "run=full", *common)
    for run in ("mixed", "full"):
        lines = [json.loads(line) for line in (world / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2] and all(0 <= line["short_share"] <= 1 for line in lines)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.mix=[{folder: a}]", "data.folder=b"], "data.mix: every source is an entry of it"),
        (["data.mix=[{weight: 2}]"], "data.mix[0].folder: an entry needs a folder"),
        (["data.mix=[{folder: a, capton: detail}]"], "unknown key 'data.mix[0].capton': did you mean 'data.mix[0].cap"),
        (["data.mix=[{folder: a, workers: 2}]"], "unknown key 'data.mix[0].workers'"),
        (["data.mix=[{folder: a, weight: much}]"], "data.mix[0].weight: expected a number, got 'much'"),
        ([], "data.folder: a folder of trajectories is needed"),
    ],
)
def test_bad_sources_are_one_line(run_recipe, world, overrides: list[str], message: str) -> None:
    result = run_recipe(world, "train_dit", "model.folder=base", "run=bad", "train.steps=1", *overrides, check=False)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    assert not (world / "runs" / "bad" / "model").exists()


def test_a_batch_may_be_refused_as_a_whole(tiny_klein) -> None:
    klein = tiny_klein()
    klein.transformer.requires_grad_(True)
    out = backward_flow_matching(Conditioner(klein, (96, 96)), [], [])
    assert math.isnan(out.loss) and out.metrics == {}
