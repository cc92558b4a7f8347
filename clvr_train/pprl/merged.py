"""Merged evaluation during training: what the policy is worth after the weight merge, in a few steps without guidance.

`W = W_base + a_d (W_distill - W_base) + a_a (W_policy - W_base)` (CLVR 3.4), where `W_policy` are the weights that are
trained on with an adapter folded in: what `recipes/merge_weights.py` would make of the run's model. The transformer in
training is read and otherwise left alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image

from clvr_train.method.merge import merge_tensor
from clvr_train.method.score import Generation, Score
from clvr_train.models.adapters import AVERAGE, policy_weights
from clvr_train.models.conditioning import Conditioner, by_bucket
from clvr_train.models.klein import check_kind, transformer_from
from clvr_train.models.merge import Weights, open_sources
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.rollout import RewardFunction
from clvr_train.pprl.tasks import Task
from clvr_train.rewards.combine import score_all
from clvr_train.runtime.distributed import World
from clvr_train.runtime.seeding import seed as position_seed


@torch.no_grad()
def merged_transformer(
    transformer: torch.nn.Module,
    base: Weights,
    distilled: Weights,
    *,
    adapter: str = AVERAGE,
    alpha_distill: float = 1.0,
    alpha_align: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """A plain transformer of its own with the merged weights, on the device and in the precision of the one in
    training.

    Added up in float32, a layer at a time; base and distilled are read from disk a few rows at a time.

    Args:
        dtype: what the merged weights are rounded to, as `merge_weights` writes them; None: that of the base's files.
    """
    state = {}
    for name, aligned in policy_weights(transformer, adapter):
        merged = torch.empty_like(aligned)
        for rows in base.chunks(name):
            w, d = (weights.read(name, rows).to(aligned.device) for weights in (base, distilled))
            a = aligned[rows] if aligned.ndim else aligned
            part = merge_tensor(w, d, a, alpha_distill, alpha_align).to(dtype or w.dtype)
            merged[rows if aligned.ndim else ...] = part.to(merged.dtype)
        state[name] = merged
    return transformer_from(transformer.config, state).requires_grad_(False).eval()


@dataclass(frozen=True)
class Merged:
    """What one evaluation gives: `metrics` are the same on all ranks; images and scores by the place of their task are
    this rank's.
    """

    metrics: dict[str, float]
    images: dict[int, Image]
    scores: dict[int, Score]


class MergedEvaluation:
    """Draws a validation set with merged weights and fixed noise, and has it judged.

    Args:
        conditioner: of the transformer in training; its encodings are used.
        base: folder of the model that both deltas start from. distilled: of the distilled one.
        tasks: the validation set: contexts, and the prompts by which their images are judged.
        steps: Euler steps; there is no guidance. seed: of the noise. batch: most images in one forward.
        alpha_distill, alpha_align, dtype, adapter: as in `merged_transformer`.

    Counter: `nfe`, network evaluations of this rank so far, `steps` an image.

    Raises:
        FileNotFoundError, ValueError: the folders are not of these kinds, or differ from the model in training in more
            than the values of the transformer; there are no tasks.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        base: Path,
        distilled: Path,
        tasks: Sequence[Task],
        world: World,
        *,
        steps: int = 4,
        seed: int = 0,
        batch: int = 32,
        alpha_distill: float = 1.0,
        alpha_align: float = 1.0,
        dtype: torch.dtype | None = None,
        adapter: str = AVERAGE,
    ) -> None:
        if not tasks:
            raise ValueError("merged evaluation: there are no validation tasks")
        check_kind(base, "base")
        check_kind(distilled, "distilled")
        sources = open_sources(base, distilled, conditioner.klein.folder)
        self._base, self._distilled = sources.base, sources.distilled
        self._conditioner, self._tasks, self._world = conditioner, list(tasks), world
        self._steps, self._seed, self._batch = steps, seed, batch
        self._options = {
            "alpha_distill": alpha_distill, "alpha_align": alpha_align, "dtype": dtype, "adapter": adapter
        }  # fmt: skip
        self.nfe = 0

    @torch.no_grad()
    def __call__(self, reward: RewardFunction, workers: int = 0) -> Merged:
        """Merges what the policy is now, draws, and judges `workers` images at a time (0: one after the other).

        Metrics: `merged_score`, the mean over the images that have a score (left out if none has), `merged_missing`,
        the share that has none, and `merged_nfe`, of all ranks.
        """
        transformer = self._conditioner.klein.transformer
        merged = merged_transformer(transformer, self._base, self._distilled, **self._options)
        sampler = Sampler(self._conditioner, steps=self._steps, cfg=1.0, batch=self._batch, module=merged)
        samples = [task.sample for task in self._tasks]
        images: dict[int, Image] = {}
        for indices in by_bucket(self._conditioner, samples, self._batch)[self._world.rank :: self._world.size]:
            seeds = [self._noise(samples[i].key) for i in indices]
            x0 = sampler.latents([samples[i] for i in indices], seeds)
            images |= zip(indices, sampler.decode(x0, self._conditioner.grid(samples[indices[0]])), strict=True)
        places = sorted(images)

        def judge(place: int) -> Score:
            task = self._tasks[place]
            return reward(Generation(task.sample, images[place], self._noise(task.sample.key)), task)

        scores = dict(zip(places, score_all(judge, places, workers), strict=True))
        found = [[place, scores[place].value] for place in places]
        values = [value for rank in self._world.gather(found) for _, value in rank if value is not None]
        metrics = {"merged_score": math.fsum(values) / len(values)} if values else {}
        metrics["merged_missing"] = 1 - len(values) / len(self._tasks)
        metrics["merged_nfe"] = float(sum(self._world.gather(sampler.nfe)))
        self.nfe += sampler.nfe
        return Merged(metrics, images, scores)

    def _noise(self, key: tuple[str, int]) -> tuple:
        return "merged", self._seed, *key


def hold_back(tasks: Sequence[Task], number: int, seed: int) -> tuple[list[Task], list[Task]]:
    """The tasks to train on and about `number` to validate with: those of whole trajectories, in the order of a hash of
    (seed, id), so that nothing of a validated one is trained on.

    Raises:
        ValueError: nothing would be left to train on.
    """
    by_trajectory: dict[str, list[Task]] = {}
    for task in tasks:
        by_trajectory.setdefault(task.sample.trajectory_id, []).append(task)
    held: set[str] = set()
    count = 0
    for name in sorted(by_trajectory, key=lambda name: position_seed("validation", seed, name)):
        if count >= number:
            break
        held.add(name)
        count += len(by_trajectory[name])
    training, validation = (
        [task for task in tasks if (task.sample.trajectory_id in held) is kept] for kept in (False, True)
    )
    if number > 0 and not training:
        raise ValueError(f"{number} tasks for validation: none of the {len(tasks)} would be left to train on")
    return training, validation
