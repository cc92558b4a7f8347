"""Validation: the losses are their definition, the images those of a sampler, the same for any number of ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from clvr_train.data.buckets import sizes_of_area
from clvr_train.method.flow import flow_matching_loss, interpolate
from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner, predict_velocity
from clvr_train.models.sampler import Sampler
from clvr_train.runtime.distributed import World
from clvr_train.runtime.seeding import generator
from clvr_train.sft.validation import validation_grid, validation_images, validation_losses
from tests.runtime.forks import fork_ranks

RED, BLUE = Image.new("RGB", (96, 96), "red"), Image.new("RGB", (96, 96), "blue")
SAMPLES = [
    Sample("a", 1, "a red circle", ("draw",), (), RED),
    Sample("b", 2, "a blue square", ("draw", "edit"), (RED,), BLUE),
    Sample("c", 1, "two circles", ("draw",), (), BLUE),
    Sample("d", 3, "one circle", ("draw",), (RED, BLUE), RED),
    Sample("e", 1, "three circles", ("draw",), (), RED),
]
LOSSES = {"num_times": 2, "seed": 3, "micro_batch": 2}
IMAGES = {"steps": 2, "cfg": 4.0, "seed": 3, "micro_batch": 2}


@pytest.fixture
def conditioner(tiny_klein):
    return Conditioner(tiny_klein(), (96, 96))


def test_losses_are_their_definition(conditioner):
    transformer = conditioner.klein.transformer
    found = validation_losses(transformer, conditioner, SAMPLES, World(), **LOSSES)
    expected = {}
    for sample in SAMPLES:
        e = torch.randn(9, 32, generator=generator("validation", 3, *sample.key))[None]
        x0 = conditioner.target(sample)[None]
        for time in (0.25, 0.75):
            t = torch.tensor([time])
            with torch.no_grad():
                v = predict_velocity(transformer, interpolate(x0, e, t), t, conditioner.batch([sample]))
            loss = flow_matching_loss(v, x0, e).item()
            for name in ("", f"_t{time}", f"_{len(sample.references)}_references"):
                expected.setdefault(f"validation_loss{name}", []).append(loss)
    assert found.keys() == expected.keys() and len(found) == 6
    for name, losses in expected.items():
        assert found[name] == pytest.approx(sum(losses) / len(losses), rel=1e-5), name


def test_nothing_of_the_training_is_touched(conditioner):
    transformer = conditioner.klein.transformer.requires_grad_(True).train()
    state = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    first = validation_losses(transformer, conditioner, SAMPLES, World(), **LOSSES)
    validation_images(transformer, conditioner, SAMPLES, World(), **IMAGES)
    assert torch.get_rng_state().equal(state) and transformer.training
    assert all(p.grad is None for p in transformer.parameters())
    assert all(weights[name].equal(tensor) for name, tensor in transformer.state_dict().items())
    torch.manual_seed(5)
    assert validation_losses(transformer, conditioner, SAMPLES, World(), **LOSSES) == first


def test_images_are_those_of_a_sampler_and_the_grid_shows_all(conditioner):
    images = validation_images(conditioner.klein.transformer, conditioner, SAMPLES, World(), **IMAGES)
    sampler = Sampler(conditioner, steps=2, cfg=4.0, batch=2)
    expected = sampler.draw(SAMPLES, [("validation", 3, *sample.key) for sample in SAMPLES])
    for image, other in zip(images, expected, strict=True):  # decoded in other company: rounding
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
    assert len({image.tobytes() for image in images}) == len(SAMPLES)
    grid = np.asarray(validation_grid(SAMPLES, images))
    assert grid.shape == (5 * 98, 4 * 98, 3)
    assert (grid[98 : 98 + 96, :96] == np.asarray(images[1])).all()
    assert (grid[98 : 98 + 96, 98 : 98 + 96] == np.asarray(BLUE)).all(), "the target"
    assert (grid[98 : 98 + 96, 2 * 98 : 2 * 98 + 96] == np.asarray(RED)).all(), "the reference"
    assert (grid[98 : 98 + 96, 3 * 98 :] == 255).all(), "a row with fewer references"


def test_targets_of_other_aspects_are_drawn_in_them(tiny_klein):
    conditioner = Conditioner(tiny_klein(), (96, 96), target_sizes=sizes_of_area(96, 32))
    wide = Sample("w", 1, "goal", ("draw",), (), Image.new("RGB", (128, 64), "red"))
    images = validation_images(conditioner.klein.transformer, conditioner, [wide, SAMPLES[0]], World(), **IMAGES)
    assert [image.size for image in images] == [(128, 64), (96, 96)]


def test_ranks_share_the_forwards_and_give_the_same(conditioner):
    """Four micro-batches at two times are eight forwards, nine with one that does not count."""
    torch.set_num_threads(1)  # what is forked has no other threads
    transformer = conditioner.klein.transformer
    alone = validation_losses(transformer, conditioner, SAMPLES, World(), **LOSSES)
    drawn = validation_images(transformer, conditioner, SAMPLES, World(), **IMAGES)

    def work(rank):
        world = World(rank, 3, group=dist.group.WORLD)
        forwards = []
        handle = transformer.register_forward_hook(lambda *_: forwards.append(1))
        losses = validation_losses(transformer, conditioner, SAMPLES, world, **LOSSES)
        images = validation_images(transformer, conditioner, SAMPLES, world, **IMAGES)
        handle.remove()
        return [len(forwards), losses, [image.tobytes().hex() for image in images]]

    results = fork_ranks(3, work)
    assert [status for status, _ in results] == [0, 0, 0]
    assert [result[0] for _, result in results] == [3 + 2 * 2 * 2] * 3, "8 parts and 4, by three ranks"
    assert all(result[1] == alone for _, result in results)
    assert [result[2] for _, result in results] == [[image.tobytes().hex() for image in drawn], [], []]
