"""Rollouts of an epoch: groups drawn by the `old` policy, judged, and turned into advantages and r (CLVR 3.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from clvr_train.method.advantage import group_advantages, is_flat
from clvr_train.method.nft import advantage_to_r
from clvr_train.method.score import Generation, Score
from clvr_train.models.adapters import OLD, use
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.tasks import Task

RewardFunction = Callable[[Generation, Task], Score]


@dataclass
class Group:
    """The rollouts of one task: tokens `x0` (G, N, C), images, scores; advantages and r once the epoch is judged."""

    task: Task
    x0: Tensor
    images: list[Image]
    scores: list[Score]
    advantages: list[float | None]
    r: list[float | None]


def roll_out(
    sampler: Sampler, tasks: Sequence[Task], reward: RewardFunction, *, group_size: int, run_seed: int, epoch: int
) -> list[Group]:
    """Draws and judges one group a task; the noise of rollout k depends on (run seed, epoch, group, key of the task,
    k).
    """
    samples = [task.sample for task in tasks for _ in range(group_size)]
    seeds = [
        ("rollout", run_seed, epoch, place, *task.sample.key, k)
        for place, task in enumerate(tasks)
        for k in range(group_size)
    ]
    with use(sampler.conditioner.klein.transformer, OLD):
        x0 = sampler.latents(samples, seeds)
    images = sampler.decode(x0)
    groups = []
    for place, task in enumerate(tasks):
        part = slice(place * group_size, (place + 1) * group_size)
        drawn = zip(images[part], seeds[part], strict=True)
        scores = [reward(Generation(task.sample, image, seed), task) for image, seed in drawn]
        empty: list[float | None] = [None] * group_size
        groups.append(Group(task, x0[part], images[part], scores, empty, list(empty)))
    return groups


def set_advantages(groups: Sequence[Group], *, std: str, adv_clip_max: float, min_valid: int) -> None:
    """Fills in `advantages` and `r` of every group of an epoch; they stay None for missing scores and dropped
    groups.
    """
    rewards = [[score.value for score in group.scores] for group in groups]
    for group, advantages in zip(groups, group_advantages(rewards, std=std, min_valid=min_valid), strict=True):
        group.advantages = advantages
        group.r = [None if a is None else advantage_to_r(torch.tensor(a), adv_clip_max).item() for a in advantages]


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Mean reward (all, text-to-image, editing), spread within groups, shares of flat groups and of missing scores."""
    by_kind: dict[str, list[float]] = {"reward": [], "reward_t2i": [], "reward_edit": []}
    spreads, flat, missing, total = [], 0, 0, 0
    for group in groups:
        values = [score.value for score in group.scores if score.value is not None]
        total += len(group.scores)
        missing += len(group.scores) - len(values)
        flat += is_flat([score.value for score in group.scores])
        by_kind["reward"] += values
        by_kind["reward_edit" if group.task.sample.references else "reward_t2i"] += values
        if values:
            mean = sum(values) / len(values)
            spreads.append((sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5)
    metrics = {name: sum(values) / len(values) for name, values in by_kind.items() if values}
    if spreads:
        metrics["reward_std_in_group"] = sum(spreads) / len(spreads)
    return metrics | {"flat_groups": flat / len(groups), "missing_scores": missing / total}
