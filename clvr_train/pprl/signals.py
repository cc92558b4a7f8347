"""What the sentinel looks at: rollouts of an epoch, and velocities on a fixed probe (`pprl.sentinel` judges them)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from clvr_train.method.advantage import is_flat
from clvr_train.method.flow import inference_times, interpolate
from clvr_train.method.score import Generation, Score
from clvr_train.method.trajectory import Sample
from clvr_train.models.adapters import OLD, use
from clvr_train.models.conditioning import by_bucket, predict_velocity
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.rollout import Group, RewardFunction
from clvr_train.rewards.combine import score_all
from clvr_train.runtime.distributed import World

CUTOFF = 0.25  # cycles a pixel: above it there is what no eye asks for in a picture, grids and noise
MOST_IMAGES = 4  # of a group of which pixels are looked at


def group_diversity(x0: Tensor) -> float:
    """Mean distance of two rollouts of a group, over the length of one: 0 for copies, about 1.4 for independent noise.

    `sqrt(mean over pairs of mean (x_i - x_j)^2) / sqrt(mean x^2)`. `x0`: (G, N, C). 0 for a group of one.
    """
    x = x0.detach().flatten(1).double().cpu()
    number = x.shape[0]
    if number < 2:
        return 0.0
    # The sum over ordered pairs of |x_i - x_j|^2 is 2 G sum |x_i - mean|^2.
    pairs = 2 * number * (x - x.mean(0)).square().sum() / (number * (number - 1) * x.shape[1])
    return math.sqrt(pairs / x.square().mean().clamp_min(1e-12))


def high_frequency(image: Image, cutoff: float = CUTOFF) -> float:
    """Share of the energy of an image's brightness, its mean left out, above `cutoff` cycles a pixel."""
    brightness = np.asarray(image.convert("L"), dtype=np.float64)
    energy = np.abs(np.fft.rfft2(brightness - brightness.mean())) ** 2
    energy[:, 1 : (brightness.shape[1] + 1) // 2] *= 2  # rfft2 leaves out the columns that mirror these
    rows, columns = np.fft.fftfreq(brightness.shape[0])[:, None], np.fft.rfftfreq(brightness.shape[1])[None]
    high = np.hypot(rows, columns) > cutoff
    return float(energy[high].sum() / energy.sum()) if energy.sum() > 1e-6 else 0.0


def saturation(image: Image) -> float:
    """Mean over the pixels of (largest - smallest channel) / 255: 0 for grey, 1 for pure colours."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    return float((pixels.max(-1) - pixels.min(-1)).mean() / 255)


def agreement(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Correlation of two judges over the rollouts of a group that both have scored; None where one of them is flat."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(pairs) < 2 or is_flat([a for a, _ in pairs]) or is_flat([b for _, b in pairs]):
        return None
    return float(np.corrcoef(np.asarray(pairs).T)[0, 1])


def rollout_signals(
    groups: Sequence[Group], world: World, held_out: RewardFunction | None = None, workers: int = 0
) -> dict[str, float]:
    """Means over the groups of an epoch, the same on all ranks and for any number of them.

    `reward`; `flat` (share of groups whose rewards are all equal); `r_saturated` (share of the r that clipping has
    brought to 0 or 1); `diversity`; and, where there are images, `high_frequency` and `saturation`. With a second
    judge, also its mean `held_out`, its `agreement` with the first and the share of `held_out_missing`. A rank looks at
    the groups whose tokens it has.

    Args:
        held_out: judges the same rollouts; a failure of it is missing, and its mean is that of the others.
        workers: how many rollouts it judges at a time; 0 for one after the other.
    """
    own = [group for group in groups if group.x0 is not None]
    places = [(g, k) for g, group in enumerate(own) if group.images for k in range(len(group.images))]
    second: dict[tuple[int, int], Score] = {}
    if held_out is not None:

        def judge(place: tuple[int, int]) -> Score:
            group, k = own[place[0]], place[1]
            return held_out(Generation(group.task.sample, group.images[k], group.seeds[k]), group.task)

        second = dict(zip(places, score_all(judge, places, workers), strict=True))
    rows = []
    for g, group in enumerate(own):
        scores = [second.get((g, k)) for k in range(len(group.seeds))]
        row = _group_signals(group, [score.value if score else None for score in scores])
        missing = {} if held_out is None else {"held_out_missing": _mean([float(not s or s.missing) for s in scores])}
        rows.append(row | missing)
    return mean_signals([row for rank in world.gather(rows) for row in rank])


def _group_signals(group: Group, held_out: Sequence[float | None]) -> dict[str, float]:
    rewards = [score.value for score in group.scores]
    valid, second = ([value for value in values if value is not None] for values in (rewards, held_out))
    r = [value for value in group.r if value is not None]
    images = [image for image in (group.images or ()) if image is not None][:MOST_IMAGES]
    found = {
        "reward": _mean(valid),
        "flat": float(is_flat(rewards)),
        "r_saturated": _mean([float(value in (0.0, 1.0)) for value in r]),
        "diversity": group_diversity(group.x0),
        "high_frequency": _mean([high_frequency(image) for image in images]),
        "saturation": _mean([saturation(image) for image in images]),
        "held_out": _mean(second),
        "agreement": agreement(rewards, held_out),
    }
    return {name: value for name, value in found.items() if value is not None}


def mean_signals(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every name over the rows that have it, whatever their order."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _mean([row[name] for row in rows if name in row]) for name in names}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


@dataclass(frozen=True)
class ProbePart:
    """Fixed inputs of one forward, with the prediction of the reference there, (B, N, C) float32."""

    samples: list[Sample]
    x_t: Tensor
    t: Tensor
    v_ref: Tensor


class Probe:
    """A small fixed batch of (sample, x_t, t) on which the policies are compared, epoch after epoch.

    Its points lie between pictures that the reference draws and fixed noise, at times spread over the rollout's grid:
    a function of samples, seed and reference, so that a resumed run has the same. Ranks share the forwards.

    Args:
        sampler: of the rollouts. samples: say 8 of those that are trained on.

    Counter: `nfe`, network evaluations of this rank so far: `sampler.nfe_per_image + 1` a sample when it is made, then
    2 a sample at every look.
    """

    @torch.no_grad()
    def __init__(self, sampler: Sampler, samples: Sequence[Sample], seed: int, world: World) -> None:
        self._conditioner, self._world = sampler.conditioner, world
        transformer, device = self._conditioner.klein.transformer, self._conditioner.klein.device
        drawn = sampler.nfe
        self._parts: list[ProbePart] = []
        parts = by_bucket(self._conditioner, samples, sampler.batch)[world.rank :: world.size]
        with use(transformer, None):
            for indices in parts:
                chosen = [samples[i] for i in indices]
                x0 = sampler.latents(chosen, [("probe", seed, *sample.key) for sample in chosen])
                grid = inference_times(x0.shape[1], sampler.steps)
                t = torch.stack([grid[int((i + 0.5) / len(samples) * sampler.steps)] for i in indices]).to(device)
                cond = self._conditioner.batch(chosen)
                noise = [sampler.noise(("probe noise", seed, *sample.key), cond) for sample in chosen]
                x_t = interpolate(x0.to(device), torch.stack(noise).to(device), t)
                v_ref = predict_velocity(transformer, x_t, t, cond).float()
                self._parts.append(ProbePart(chosen, x_t, t, v_ref))
        self.samples = sum(len(part.samples) for part in self._parts)
        self.nfe = sampler.nfe - drawn + self.samples

    @torch.no_grad()
    def signals(self, old_decay: float = 0.0) -> dict[str, float]:
        """Ratios of root mean squares, means over the probe; to be asked after the optimiser's steps of an epoch and
        before `old` follows with `old_decay`.

        `velocity_ratio` |v| / |v_ref|, `velocity_drift` |v - v_ref| / |v_ref|, `off_policy` |v - v_old| / |v_old|, and
        `sampler_step` (1 - old_decay) off_policy: how far `old` is about to go, to first order.
        """
        transformer = self._conditioner.klein.transformer
        rows = []
        for part in self._parts:
            cond = self._conditioner.batch(part.samples)
            v = predict_velocity(transformer, part.x_t, part.t, cond).float()
            with use(transformer, OLD):
                v_old = predict_velocity(transformer, part.x_t, part.t, cond).float()
            norm_ref, norm_old = _rms(part.v_ref).clamp_min(1e-12), _rms(v_old).clamp_min(1e-12)
            ratios = _rms(v) / norm_ref, _rms(v - part.v_ref) / norm_ref, _rms(v - v_old) / norm_old
            rows += [
                {
                    "velocity_ratio": ratio,
                    "velocity_drift": drift,
                    "off_policy": off,
                    "sampler_step": (1 - old_decay) * off,
                }
                for ratio, drift, off in zip(*(ratio.tolist() for ratio in ratios), strict=True)
            ]
        self.nfe += 2 * self.samples
        return mean_signals([row for rank in self._world.gather(rows) for row in rank])


def _rms(v: Tensor) -> Tensor:
    """Root mean square of every sample, (B,)."""
    return v.square().flatten(1).mean(1).sqrt()


def probe_samples(samples: Sequence[Sample], number: int) -> list[Sample]:
    """So many samples spread evenly over the list."""
    number = min(number, len(samples))
    return [samples[i * len(samples) // number] for i in range(number)]
