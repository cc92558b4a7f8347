"""Our layout of Klein's forward equals the upstream pipeline's: same seeds, float32, 0, 1 and 3 references."""

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.sampler import Sampler

SIZE = (96, 96)
# Measured worst case over the cases below, torch 2.13 on CPU: 0 (bit-identical) for tokens.
TOLERANCE = 1e-5


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("sizes", [[], [(96, 96)], [(96, 96), (64, 128), (96, 64)]])
def test_sampler_equals_upstream_pipeline(tiny_klein, sizes, cfg):
    klein = tiny_klein()
    references = tuple(picture(10 + i, size) for i, size in enumerate(sizes))
    sample = Sample("t", len(references) + 1, "a red circle", ("draw it",), references)
    sampler = Sampler(Conditioner(klein, SIZE), steps=4, cfg=cfg)
    cond = sampler.conditioner.batch([sample])
    noise = sampler.noise((7,), cond)[None]
    ours = sampler.denoise(noise, cond)

    pipe = Flux2KleinPipeline.from_pretrained(klein.folder)
    pipe.set_progress_bar_config(disable=True)
    grid = klein.grid(SIZE)
    latents = {}
    upstream = pipe(
        prompt="a red circle\ndraw it",
        image=list(references) or None,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=4,
        guidance_scale=cfg,
        latents=noise.transpose(1, 2).reshape(1, -1, *grid),
        callback_on_step_end=lambda pipe, i, t, tensors: latents.update(tensors) or {},
        max_sequence_length=klein.window,
        text_encoder_out_layers=klein.layers,
    ).images[0]
    assert sampler.nfe == 4 * (2 if cfg > 1 else 1)
    assert (latents["latents"] - ours).abs().max().item() <= TOLERANCE
    difference = np.asarray(sampler.decode(ours)[0], dtype=int) - np.asarray(upstream, dtype=int)
    assert np.abs(difference).max() <= 1, "pixel values differ by more than rounding"
    assert torch.isfinite(ours).all()
