"""Guidance in one forward or in two: the same images, the same network evaluations, half the forwards."""

import pytest
import torch
from PIL import Image

from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.sampler import Sampler

RED, BLUE = (Image.new("RGB", (96, 96), color) for color in ("red", "blue"))
SAMPLES = [
    Sample("a", 1, "a red circle", ("draw it",)),
    Sample("b", 2, "a red circle", ("draw it", "edit"), (RED,)),
    Sample("c", 2, "a green triangle", ("draw it", "edit"), (BLUE,)),
    Sample("d", 1, "a blue square", ("draw it",)),
]
SEEDS = [("seed", n) for n in range(len(SAMPLES))]


def draw(klein, **options):
    """Tokens of the samples, network evaluations, and the sizes of the forwards."""
    sizes = []
    handle = klein.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    sampler = Sampler(Conditioner(klein, (96, 96)), steps=3, **options)
    tokens = sampler.latents(SAMPLES, SEEDS)
    handle.remove()
    return tokens, sampler.nfe, sizes


@pytest.mark.parametrize("cfg", [4.0, 1.0])
def test_batched_guidance_draws_the_same(tiny_klein, cfg):
    """With and without references; 2e-6 measured, of tokens of size 1."""
    klein = tiny_klein()
    tokens, nfe, sizes = draw(klein, cfg=cfg)
    together, nfe_together, sizes_together = draw(klein, cfg=cfg, batched_cfg=True)
    assert torch.allclose(together, tokens, atol=1e-4)
    branches = 2 if cfg > 1 else 1
    assert nfe == nfe_together == sum(sizes) == sum(sizes_together) == 3 * branches * len(SAMPLES)
    assert len(sizes) == branches * len(sizes_together) == 3 * branches * 2, "two buckets"
