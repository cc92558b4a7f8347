"""What the sentinel looks at: rollouts of an epoch, and a fixed probe of the policy (`pprl.sentinel` judges both)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from clvr_train.method.advantage import is_flat
from clvr_train.method.flow import inference_times, interpolate
from clvr_train.method.score import Generation, Score
from clvr_train.models.adapters import OLD, use
from clvr_train.models.conditioning import by_bucket, predict_velocity
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.rollout import Group, RewardFunction
from clvr_train.pprl.tasks import Task
from clvr_train.rewards.combine import score_all
from clvr_train.runtime.distributed import World

CUTOFF = 0.25  # cycles a pixel: above it there is what no eye asks for in a picture, grids and noise
PART = 8  # pictures of the probe that are drawn at a time: ranks share such parts, whatever their number


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


def rollout_signals(groups: Sequence[Group], world: World) -> dict[str, float]:
    """Means over the groups of an epoch, the same on all ranks and for any number of them.

    `flat` (share of groups whose rewards are all equal), `r_saturated` (share of the r that clipping has brought to 0
    or 1) and `diversity`. A rank looks at the groups whose tokens it has.
    """
    rows = []
    for group in groups:
        if group.x0 is not None:
            r = [float(value in (0.0, 1.0)) for value in group.r if value is not None]
            row = {
                "flat": float(is_flat([score.value for score in group.scores])),
                "diversity": group_diversity(group.x0),
            }
            rows.append(row | ({"r_saturated": _mean(r)} if r else {}))
    return mean_signals([row for rank in world.gather(rows) for row in rank])


def mean_signals(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every name over the rows that have it, whatever their order."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _mean([row[name] for row in rows if name in row]) for name in names}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@dataclass
class ProbePart:
    """Fixed inputs of one forward, with what the reference makes of them: its prediction (B, N, C), float32, and its
    pictures, with their scores once they are judged.
    """

    tasks: list[Task]
    x_t: Tensor
    t: Tensor
    v_ref: Tensor
    images: list[Image]
    scores: list[tuple[Score, Score | None]] = field(default_factory=list)


class Probe:
    """A small fixed set of contexts and noise on which the policy is compared with the reference, epoch after epoch.

    Pictures are drawn with the same noise by both, so that their scores differ by what was trained alone: rewards of
    rollouts go up and down with the tasks of an epoch by more than a policy may be let to lose. Velocities are compared
    at points between the reference's pictures and fixed noise, at times spread over the rollout's grid. All is a
    function of tasks, seed and reference: a resumed run has the same. Ranks share the work.

    Args:
        sampler: of the rollouts. tasks: say 32 of those that are trained on.

    Counter: `nfe`, network evaluations of this rank so far. With F = `sampler.nfe_per_image` they are F + 1 a task when
    it is made, 2 a task for `velocities` and F a task for `pictures`.
    """

    @torch.no_grad()
    def __init__(self, sampler: Sampler, tasks: Sequence[Task], seed: int, world: World) -> None:
        self._conditioner, self._world, self._seed = sampler.conditioner, world, seed
        self._sampler = Sampler(
            sampler.conditioner, steps=sampler.steps, cfg=sampler.cfg, batch=PART, solver=sampler.solver
        )
        transformer, device = self._conditioner.klein.transformer, self._conditioner.klein.device
        self._parts: list[ProbePart] = []
        parts = by_bucket(self._conditioner, [task.sample for task in tasks], PART)[world.rank :: world.size]
        with use(transformer, None):
            for indices in parts:
                chosen = [tasks[i] for i in indices]
                x0, images = self._draw(chosen)
                times = inference_times(x0.shape[1], sampler.steps)
                t = torch.stack([times[int((i + 0.5) / len(tasks) * sampler.steps)] for i in indices]).to(device)
                cond = self._conditioner.batch([task.sample for task in chosen])
                noise = [sampler.noise(("probe noise", seed, *task.sample.key), cond) for task in chosen]
                x_t = interpolate(x0.to(device), torch.stack(noise).to(device), t)
                v_ref = predict_velocity(transformer, x_t, t, cond).float()
                self._parts.append(ProbePart(chosen, x_t, t, v_ref, images))
        self._forwards = self._size = sum(len(part.tasks) for part in self._parts)

    @property
    def nfe(self) -> int:
        return self._sampler.nfe + self._forwards

    def _draw(self, tasks: Sequence[Task]) -> tuple[Tensor, list[Image]]:
        samples = [task.sample for task in tasks]
        x0 = self._sampler.latents(samples, [self._noise(task) for task in tasks])
        return x0, self._sampler.decode(x0, self._conditioner.grid(samples[0]))

    def _noise(self, task: Task) -> tuple:
        return "probe", self._seed, *task.sample.key

    @torch.no_grad()
    def velocities(self, old_decay: float = 0.0) -> dict[str, float]:
        """Ratios of root mean squares, means over the probe; to be asked after the optimiser's steps of an epoch and
        before `old` follows with `old_decay`.

        `velocity_ratio` |v| / |v_ref|, `velocity_drift` |v - v_ref| / |v_ref|, `off_policy` |v - v_old| / |v_old|, and
        `sampler_step` (1 - old_decay) off_policy: how far `old` is about to go, to first order.
        """
        transformer = self._conditioner.klein.transformer
        rows = []
        for part in self._parts:
            cond = self._conditioner.batch([task.sample for task in part.tasks])
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
        self._forwards += 2 * self._size
        return mean_signals([row for rank in self._world.gather(rows) for row in rank])

    @torch.no_grad()
    def pictures(
        self, reward: RewardFunction, held_out: RewardFunction | None = None, workers: tuple[int, int] = (0, 0)
    ) -> dict[str, float]:
        """What the policy draws now against what the reference drew with the same noise, over the pictures that have
        both scores.

        `probe_reward`, the mean change of the training reward; with a second judge `held_out`, that of its score, its
        standard error `held_out_error` and the share of `held_out_missing`; `saturation` and `high_frequency`: mean of
        the policy's pictures over that of the reference's.

        Args:
            workers: how many pictures each of the two judges at a time; 0 for one after the other.
        """
        rows: list[dict[str, float]] = []
        for part in self._parts:
            _, images = self._draw(part.tasks)
            if not part.scores or any(score and score.missing for pair in part.scores for score in pair):
                part.scores = self._judged(part.tasks, part.images, reward, held_out, workers)
            scores = self._judged(part.tasks, images, reward, held_out, workers)
            for before, now, image, first in zip(part.scores, scores, images, part.images, strict=True):
                row = {"now_saturation": saturation(image), "ref_saturation": saturation(first)}
                row |= {"now_high_frequency": high_frequency(image), "ref_high_frequency": high_frequency(first)}
                row |= _change("probe_reward", before[0], now[0]) | _change("held_out", before[1], now[1])
                rows.append(row)
        rows = [row for rank in self._world.gather(rows) for row in rank]
        found = mean_signals(rows)
        for name in ("saturation", "high_frequency"):
            now, ref = found.pop(f"now_{name}"), found.pop(f"ref_{name}")
            found |= {name: now / ref} if ref > 0 else {}
        if held_out is not None:
            changes = [row["held_out"] for row in rows if "held_out" in row]
            found["held_out_missing"] = 1 - len(changes) / len(rows)
            if len(changes) > 1:
                squares = math.fsum((change - found["held_out"]) ** 2 for change in changes)
                found["held_out_error"] = math.sqrt(squares / (len(changes) - 1) / len(changes))
        return found

    def _judged(
        self,
        tasks: Sequence[Task],
        images: Sequence[Image],
        reward: RewardFunction,
        held_out: RewardFunction | None,
        workers: tuple[int, int],
    ) -> list[tuple[Score, Score | None]]:
        drawn = [
            (Generation(task.sample, image, self._noise(task)), task)
            for task, image in zip(tasks, images, strict=True)
        ]  # fmt: skip
        first = score_all(lambda pair: reward(*pair), drawn, workers[0])
        if held_out is None:
            return [(score, None) for score in first]
        return list(zip(first, score_all(lambda pair: held_out(*pair), drawn, workers[1]), strict=True))


def _change(name: str, before: Score | None, now: Score | None) -> dict[str, float]:
    """By how much a score has changed; nothing where one is missing."""
    if before is None or now is None or before.missing or now.missing:
        return {}
    return {name: now.value - before.value}


def _rms(v: Tensor) -> Tensor:
    """Root mean square of every sample, (B,)."""
    return v.square().flatten(1).mean(1).sqrt()


def spread(tasks: Sequence[Task], number: int) -> list[Task]:
    """So many tasks spread evenly over the list, or all."""
    number = min(number, len(tasks))
    return [tasks[i * len(tasks) // number] for i in range(number)]
