"""Sampling of Klein with classifier-free guidance, for rollouts, closed loops and evaluation."""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import torch
from PIL import Image
from torch import Tensor

from clvr_train.data.images import to_image
from clvr_train.method.flow import guided, inference_times, num_velocities
from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import (
    Conditioner,
    Conditioning,
    by_beginning,
    by_bucket,
    joined,
    mixed,
    predict_velocity,
)
from clvr_train.models.klein import decode_tokens
from clvr_train.runtime.seeding import generator


class Sampler:
    """Draws the images of samples; each image depends on its sample and its seed, not on the batch.

    Args:
        steps, solver: of the integration, see `method.flow.num_velocities`.
        cfg: guidance scale, 1 for none (a distilled model takes only 1).
        batch: most images in one forward.
        module: what forwards go through, if not the transformer itself: an engine's wrapper of it.
        batched_cfg: both branches of guidance in one forward of twice the batch, not in two. Last bits then differ.
        share: samples with few references join those with more, filled up and masked (`models.conditioning.mixed`),
            where little has to be filled up. Last bits then differ.

    Counter: `nfe`, network evaluations so far, an image and a branch of guidance counting as one each.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        *,
        steps: int,
        cfg: float,
        batch: int = 32,
        module: torch.nn.Module | None = None,
        batched_cfg: bool = False,
        share: bool = False,
        solver: str = "euler",
    ) -> None:
        if conditioner.klein.distilled and cfg > 1:
            raise ValueError(f"cfg={cfg}: a distilled model takes no guidance, use cfg=1")
        self.conditioner = conditioner
        self.steps, self.cfg, self.batch, self.batched_cfg = steps, cfg, batch, batched_cfg
        self.module = module or conditioner.klein.transformer
        self.share, self.solver = share, solver
        self.nfe_per_image = num_velocities(steps, solver) * (2 if cfg > 1 else 1)
        self.nfe = 0

    def latents(self, samples: Sequence[Sample], seeds: Sequence[tuple]) -> Tensor:
        """The tokens `x0` of every sample, (len(samples), N, C), float32, in the order given."""
        drawn: dict[int, Tensor] = {}
        for indices, tokens in self.batches(samples, seeds):
            drawn |= zip(indices, tokens, strict=True)
        return torch.stack([drawn[i] for i in range(len(samples))])

    def batches(self, samples: Sequence[Sample], seeds: Sequence[tuple]) -> Iterator[tuple[list[int], Tensor]]:
        """The same as they are drawn: the indices of some samples that share forwards, and their tokens (B, N, C)."""
        if len(samples) != len(seeds):
            raise ValueError(f"{len(samples)} samples and {len(seeds)} seeds")
        group = by_beginning if self.share else by_bucket
        for indices in group(self.conditioner, samples, self.batch):
            cond = self._conditions([samples[i] for i in indices])
            noise = torch.stack([self.noise(seeds[i], cond) for i in indices])
            yield indices, self.denoise(noise, cond)

    def _conditions(self, samples: Sequence[Sample]) -> Conditioning:
        """Of one bucket, or of several that lie one after the other."""
        parts = [list(same) for _, same in groupby(samples, self.conditioner.bucket)]
        conds = [self.conditioner.batch(part) for part in parts]
        return conds[0] if len(conds) == 1 else mixed(conds)

    def noise(self, seed: tuple, cond: Conditioning) -> Tensor:
        """Initial noise (N, C) of one image, a function of its seed alone."""
        channels = self.conditioner.klein.transformer.config.in_channels
        return torch.randn(cond.num_target, channels, generator=generator("noise", *seed))

    @torch.no_grad()
    def denoise(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """Integrates from noise (B, N, C) at t = 1 to t = 0."""
        device = self.conditioner.klein.device
        times = inference_times(cond.num_target, self.steps).to(device)
        without = self.conditioner.without_text(cond) if self.cfg > 1 else None
        both = joined(cond, without) if without is not None and self.batched_cfg else None

        def velocity(x: Tensor, now: Tensor) -> Tensor:
            t = now.expand(x.shape[0])
            if both is not None:
                return guided(*predict_velocity(self.module, x.repeat(2, 1, 1), t.repeat(2), both).chunk(2), self.cfg)
            v = predict_velocity(self.module, x, t, cond)
            return v if without is None else guided(v, predict_velocity(self.module, x, t, without), self.cfg)

        x = noise.to(device)
        for now, after in pairwise(times):
            v = velocity(x, now).float()
            if self.solver == "heun":  # the mean with the velocity where an Euler step would lead
                v = (v + velocity((x.float() + (after - now) * v).to(x.dtype), after).float()) / 2
            x = (x.float() + (after - now) * v).to(x.dtype)
        self.nfe += x.shape[0] * self.nfe_per_image
        return x

    def decode(self, x0: Tensor, grid: tuple[int, int] | None = None) -> list[Image.Image]:
        """Images of tokens (B, N, C) of a grid, by default that of the conditioner's size."""
        grid = grid or self.conditioner.klein.grid(self.conditioner.size_px)
        return [
            to_image(pixels)
            for chunk in x0.split(self.batch)
            for pixels in decode_tokens(self.conditioner.klein, chunk, grid).float().cpu()
        ]

    def draw(self, samples: Sequence[Sample], seeds: Sequence[tuple]) -> list[Image.Image]:
        """The images of the samples, in the order given."""
        return self.decode(self.latents(samples, seeds)) if samples else []
