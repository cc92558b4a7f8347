"""Validation during training: the loss of fixed samples at fixed times, and their images, drawn with fixed noise.

All of it depends on the weights alone: not on the step, the order of the training, or the number of ranks, which share
the forwards. Nothing of the training is touched.
"""

import base64
import io
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from PIL import Image

from clvr_train.data.images import open_image
from clvr_train.method.flow import flow_matching_loss, interpolate
from clvr_train.method.trajectory import ImageLike, Sample
from clvr_train.models.conditioning import Conditioner, by_bucket, predict_velocity
from clvr_train.models.sampler import Sampler
from clvr_train.runtime.distributed import World
from clvr_train.runtime.seeding import generator

THUMBNAIL_PX, GAP_PX = 256, 2
T = TypeVar("T")


def validation_times(number: int) -> list[float]:
    """The middles of so many equal parts of [0, 1]."""
    return [(i + 0.5) / number for i in range(number)]


@torch.no_grad()
def validation_losses(
    module: torch.nn.Module,
    conditioner: Conditioner,
    samples: Sequence[Sample],
    world: World,
    *,
    num_times: int,
    seed: int,
    micro_batch: int,
) -> dict[str, float]:
    """Mean flow-matching loss of all samples at all times, of every time, and of every number of references.

    A sample has the same noise at all times. The ranks share the micro-batches, which are the same for any number of
    ranks, and so are the losses, bit for bit.

    Args:
        module: what forwards go through, the transformer or an engine's module. seed: of the noise.
    """
    device = conditioner.klein.device
    channels = conditioner.klein.transformer.config.in_channels
    times = validation_times(num_times)
    turns = [(part, i) for part in by_bucket(conditioner, samples, micro_batch) for i in range(num_times)]
    found: list[tuple[int, int, float]] = []  # sample, time, loss
    for (indices, i), counts in _shared(turns, world):
        chosen = [samples[index] for index in indices]
        cond = conditioner.batch(chosen)
        x0 = torch.stack([conditioner.target(sample) for sample in chosen])
        sources = [generator("validation", seed, *sample.key) for sample in chosen]
        e = torch.stack([torch.randn(cond.num_target, channels, generator=source) for source in sources]).to(device)
        t = torch.full((len(chosen),), times[i], device=device)
        v = predict_velocity(module, interpolate(x0, e, t), t, cond)
        losses = flow_matching_loss(v, x0, e).tolist()
        found += [(index, i, loss) for index, loss in zip(indices, losses, strict=True)] if counts else []
    every = sorted(tuple(entry) for rank in world.gather(found) for entry in rank)
    groups: dict[str, list[float]] = {}
    for index, i, loss in every:
        count = min(len(samples[index].references), 3)
        for name in ("", f"_t{times[i]:.3g}", f"_{count}_references"):
            groups.setdefault(f"validation_loss{name}", []).append(loss)
    return {name: math.fsum(losses) / len(losses) for name, losses in groups.items()}


def validation_images(
    module: torch.nn.Module,
    conditioner: Conditioner,
    samples: Sequence[Sample],
    world: World,
    *,
    steps: int,
    cfg: float,
    seed: int,
    micro_batch: int,
) -> list[Image.Image]:
    """The images that the samples' contexts lead to, in order, for rank 0; none for the others.

    Args:
        steps, cfg: see `models.sampler.Sampler`. The rest as in `validation_losses`.
    """
    sampler = Sampler(conditioner, steps=steps, cfg=cfg, batch=micro_batch, module=module)
    drawn: list[tuple[int, str]] = []
    for indices, counts in _shared(by_bucket(conditioner, samples, micro_batch), world):
        chosen = [samples[index] for index in indices]
        x0 = sampler.latents(chosen, [("validation", seed, *sample.key) for sample in chosen])
        if counts:
            images = sampler.decode(x0, conditioner.grid(chosen[0]))
            drawn += [(index, _packed(image)) for index, image in zip(indices, images, strict=True)]
    every = sorted(tuple(entry) for rank in world.gather(drawn) for entry in rank)
    return [_unpacked(text) for _, text in every] if world.first else []


def validation_grid(samples: Sequence[Sample], images: Sequence[Image.Image]) -> Image.Image:
    """A row a sample: what was drawn, the target, and the references in order; all made smaller to THUMBNAIL_PX."""
    rows = [
        [_thumbnail(image), *map(_thumbnail, [sample.target] if sample.target else []),
         *map(_thumbnail, sample.references)]
        for sample, image in zip(samples, images, strict=True)
    ]  # fmt: skip
    widths = [sum(image.width + GAP_PX for image in row) for row in rows]
    heights = [max(image.height for image in row) + GAP_PX for row in rows]
    grid = Image.new("RGB", (max(widths), sum(heights)), "white")
    for number, row in enumerate(rows):
        left = 0
        for image in row:
            grid.paste(image, (left, sum(heights[:number])))
            left += image.width + GAP_PX
    return grid


def _shared(parts: Sequence[T], world: World) -> list[tuple[T, bool]]:
    """This rank's parts. A collective forward waits for all ranks, so those that have fewer do one again, which then
    does not count.
    """
    mine = [(part, True) for part in parts[world.rank :: world.size]]
    return mine + [(parts[0], False)] * (math.ceil(len(parts) / world.size) - len(mine))


def _thumbnail(image: ImageLike) -> Image.Image:
    small = open_image(image)
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return small


def _packed(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _unpacked(text: str) -> Image.Image:
    return open_image(Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]))
