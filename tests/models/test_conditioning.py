"""What is encoded, how often, and that a sample's picture does not depend on its batch."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner, by_beginning, by_bucket, rows
from clvr_train.models.sampler import Sampler

RED, BLUE = Image.new("RGB", (96, 96), "red"), Image.new("RGB", (96, 96), "blue")


def sample(name, references=(), text="a red circle", reasonings=("draw it",)):
    return Sample(name, len(references) + 1, text, reasonings, references, RED)


def test_group_shares_one_text_encoding_and_references_are_encoded_once(tiny_klein):
    conditioner = Conditioner(tiny_klein(), (96, 96))
    group = [sample("a", (RED, BLUE))] * 16
    cond = conditioner.batch(group)
    assert (conditioner.text_calls, conditioner.image_calls) == (1, 2)
    conditioner.without_text(cond)
    conditioner.without_text(conditioner.batch(group))
    assert (conditioner.text_calls, conditioner.image_calls) == (2, 2)
    assert cond.references.shape == (16, 18, 32) and cond.image_ids.shape == (27, 4)
    assert cond.image_ids[9:18, 0].unique().tolist() == [10] and cond.image_ids[18:, 0].unique().tolist() == [20]


def test_another_picture_under_the_same_name_is_encoded_anew(tiny_klein):
    conditioner = Conditioner(tiny_klein(), (96, 96))
    first, again, other = (conditioner.batch([sample("goal-1", (image,))]).references for image in (RED, RED, BLUE))
    assert conditioner.image_calls == 2 and again.equal(first)
    assert torch.equal(other, conditioner.batch([sample("x", (BLUE,))]).references) and not other.equal(first)


def test_buckets_hold_equal_reference_grids(tiny_klein):
    conditioner = Conditioner(tiny_klein(), (96, 96))
    wide = Image.new("RGB", (128, 64))
    samples = [sample("a"), sample("b", (RED,)), sample("c"), sample("d", (wide,)), sample("e", (BLUE,))]
    assert by_bucket(conditioner, samples, 8) == [[0, 2], [1, 4], [3]]
    assert by_bucket(conditioner, samples, 1) == [[0], [2], [1], [4], [3]]
    with pytest.raises(ValueError, match="2 buckets"):
        conditioner.batch(samples[:2])


def test_overflow_is_counted_once_a_sample_and_keeps_goal_and_newest(tiny_klein):
    klein = tiny_klein()
    conditioner = Conditioner(klein, (96, 96))
    long = sample("long", reasonings=("old " * 30, "the newest words"))
    for _ in range(3):
        text = conditioner.fitted_text(long)
    assert text == "a red circle\nthe newest words"
    assert conditioner.texts_cut == 1 and conditioner.tokens_cut > 30


def test_overflow_is_an_error_where_that_is_asked_for(tiny_klein):
    conditioner = Conditioner(tiny_klein(), (96, 96), overflow="error")
    assert conditioner.fitted_text(sample("short")) == "a red circle\ndraw it"
    long = sample("long", reasonings=("old " * 30, "the newest words"))
    with pytest.raises(ValueError, match=r"long: step 1: its text of \d+ tokens exceeds model.window=48; give a long"):
        conditioner.prime([sample("short"), long])
    with pytest.raises(ValueError, match="model.overflow='keep' is not one of cut, error"):
        Conditioner(tiny_klein(), (96, 96), overflow="keep")


def test_dropped_text_keeps_references(tiny_klein):
    conditioner = Conditioner(tiny_klein(), (96, 96))
    kept, dropped = sample("a", (RED,)), sample("b", (BLUE,))
    cond = conditioner.batch([kept, dropped], drop_text=[False, True])
    assert torch.equal(cond.text[1], conditioner.text([""])[0]) and not torch.equal(cond.text[0], cond.text[1])
    assert torch.equal(cond.references[1], conditioner.batch([dropped]).references[0])


def test_sizes_that_no_token_fits_are_refused(tiny_klein):
    with pytest.raises(ValueError, match="multiples of 32"):
        Conditioner(tiny_klein(), (100, 96))
    with pytest.raises(ValueError, match="has no target"):
        Conditioner(tiny_klein(), (96, 96)).target(Sample("a", 1, "goal", ("r",)))


def test_priming_and_a_picture_do_not_depend_on_the_batch(tiny_klein):
    samples = [sample("a"), sample("b", (RED,)), sample("c", text="a blue square"), sample("d", (BLUE, RED))]
    seeds = [(0, s.trajectory_id) for s in samples]
    sampler = Sampler(Conditioner(tiny_klein(), (96, 96)), steps=3, cfg=3.0, batch=4)
    together = sampler.latents(samples, seeds)
    assert sampler.nfe == 4 * 3 * 2
    primed = Sampler(Conditioner(tiny_klein(), (96, 96)), steps=3, cfg=3.0, batch=1)
    primed.conditioner.prime(samples)
    before = primed.conditioner.text_calls, primed.conditioner.image_calls
    alone = torch.cat([primed.latents([s], [seed]) for s, seed in zip(samples, seeds, strict=True)])
    assert (primed.conditioner.text_calls, primed.conditioner.image_calls) == before
    # Measured worst difference 2e-6 (float32 sums of other batch sizes).
    assert (together - alone).abs().max() < 1e-4
    assert not torch.equal(together[0], sampler.latents([samples[0]], [(1, "a")])[0])


@pytest.mark.parametrize("options", [{"cfg": 1.0}, {"cfg": 4.0}, {"cfg": 4.0, "batched_cfg": True}])
def test_samples_with_other_numbers_of_references_share_forwards(tiny_klein, options):
    """What fills up a batch is seen by nobody: the images are those of batches of their own."""
    klein = replace(tiny_klein(), window=64)
    conditioner, forwards = Conditioner(klein, (96, 96)), []
    klein.transformer.register_forward_pre_hook(lambda module, args, inputs: forwards.append(inputs), with_kwargs=True)
    samples = [sample("a"), sample("b", (RED, BLUE), "two squares"), sample("c", (BLUE,)), sample("d", (RED, BLUE))]
    seeds = [("x", i) for i in range(4)]
    found = []
    for share in (False, True):
        forwards.clear()
        sampler = Sampler(conditioner, steps=2, share=share, **options)
        found.append(sampler.latents(samples, seeds))
        branches = 2 if options["cfg"] > 1 and "batched_cfg" not in options else 1
        assert len(forwards) == 2 * branches * (1 if share else 3)
        assert sampler.nfe == 4 * sampler.nfe_per_image
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-4)
    seen = forwards[0]["joint_attention_kwargs"]["attention_mask"][:4, 0, 0].sum(1).tolist()
    assert seen == [64 + 9 * k for k in (3, 3, 2, 1)]


def test_only_beginnings_share_and_only_where_little_is_filled_up(tiny_klein):
    wide = Image.new("RGB", (128, 64))
    samples = [sample("a"), sample("b", (wide,)), sample("c", (RED,)), sample("d", (RED, BLUE)), sample("e", (BLUE,))]
    roomy, narrow = (Conditioner(replace(tiny_klein(), window=window), (96, 96)) for window in (64, 12))
    assert by_beginning(roomy, samples, 8) == [[3, 2, 4, 0], [1]]
    assert by_beginning(roomy, samples, 2) == [[3, 2], [1, 0], [4]]
    assert by_beginning(narrow, samples, 8) == [[3, 2, 4], [1], [0]], "9 of 39 tokens are few, 18 are not"
    sampler = Sampler(roomy, steps=1, cfg=1.0, share=True)
    cond = sampler._conditions([samples[i] for i in (3, 2)])
    part = rows(cond, [1])
    assert part.mask.sum().item() == 64 + 9 + 9 and part.references.shape[1] == 18


def test_heun_is_of_second_order_and_counted(tiny_klein):
    """Eight steps of two velocities are nearer to the integral than fifteen of one: measured .010 against .021."""
    conditioner = Conditioner(tiny_klein(), (96, 96))
    sample = Sample("a", 1, "a goal", ("r",))

    def drawn(steps, solver):
        sampler = Sampler(conditioner, steps=steps, cfg=2.0, solver=solver)
        x0 = sampler.latents([sample], [("x", 0)])
        assert sampler.nfe == sampler.nfe_per_image == steps * (2 if solver == "euler" else 4)
        return x0

    exact = drawn(200, "euler")
    heun, euler = ((drawn(*options) - exact).abs().mean() for options in ((8, "heun"), (15, "euler")))
    assert heun < 0.7 * euler
    with pytest.raises(ValueError, match="solver='rk4' is not one of euler, heun"):
        Sampler(conditioner, steps=2, cfg=1.0, solver="rk4")
