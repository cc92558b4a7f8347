"""Rollouts of an epoch: groups drawn by the `old` policy, judged, and turned into advantages and r (CLVR 3.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from clvr_train.method.advantage import group_advantages, is_flat, normalised_mix
from clvr_train.method.nft import advantage_to_r
from clvr_train.method.score import Generation, Score
from clvr_train.models.adapters import OLD, use
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.tasks import Task
from clvr_train.rewards.combine import score_all

MIXES = ("weighted", "normalised")
RewardFunction = Callable[[Generation, Task], Score]


@dataclass
class Group:
    """The rollouts of one task: tokens `x0` (G, N, C), images, the seeds of their noise, scores; advantages and r once
    the epoch is judged.
    """

    task: Task
    x0: Tensor
    images: list[Image]
    seeds: list[tuple]
    scores: list[Score]
    advantages: list[float | None]
    r: list[float | None]


def roll_out(
    sampler: Sampler,
    tasks: Sequence[Task],
    reward: RewardFunction,
    *,
    group_size: int,
    run_seed: int,
    epoch: int,
    workers: int = 0,
) -> list[Group]:
    """Draws and judges one group a task; the noise of rollout k depends on (run seed, epoch, group, key of the task,
    k). All rollouts of the epoch are judged side by side, `workers` at a time (0: one after the other).
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
        scores = [Score(None, "not judged yet")] * group_size
        empty: list[float | None] = [None] * group_size
        groups.append(Group(task, x0[part], images[part], seeds[part], scores, empty, list(empty)))
    judge_missing(groups, reward, workers)
    return groups


def judge_missing(groups: Sequence[Group], reward: RewardFunction, workers: int = 0) -> None:
    """Judges all rollouts without a score, `workers` at a time."""
    places = [(group, k) for group in groups for k, score in enumerate(group.scores) if score.missing]

    def score(place: tuple[Group, int]) -> Score:
        group, k = place
        return reward(Generation(group.task.sample, group.images[k], group.seeds[k]), group.task)

    for (group, k), found in zip(places, score_all(score, places, workers), strict=True):
        group.scores[k] = found


def missing_share(groups: Sequence[Group]) -> float:
    """Share of the rollouts that have no score."""
    scores = [score for group in groups for score in group.scores]
    return sum(score.missing for score in scores) / len(scores)


def set_advantages(
    groups: Sequence[Group], *, std: str, adv_clip_max: float, min_valid: int, mix: str = "weighted"
) -> None:
    """Fills in `advantages` and `r` of every group of an epoch; they stay None for missing scores and dropped
    groups.

    `mix`: `weighted` takes the values of the scores, which are weighted means of their dimensions; `normalised` first
    normalises every dimension within its group (`method.advantage.normalised_mix`).
    """
    if mix not in MIXES:
        raise ValueError(f"mix={mix!r} is not one of {', '.join(MIXES)}")
    if mix == "normalised":
        rewards = normalised_mix([[s.dimensions for s in group.scores] for group in groups], min_valid=min_valid)
    else:
        rewards = [[score.value for score in group.scores] for group in groups]
    for group, advantages in zip(groups, group_advantages(rewards, std=std, min_valid=min_valid), strict=True):
        group.advantages = advantages
        group.r = [None if a is None else advantage_to_r(torch.tensor(a), adv_clip_max).item() for a in advantages]


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Mean reward (all, text-to-image, editing, and of every dimension as `part_<name>`), spread within groups, shares
    of flat and dropped groups and of missing scores.
    """
    by_kind: dict[str, list[float]] = {"reward": [], "reward_t2i": [], "reward_edit": []}
    spreads, flat = [], 0
    for group in groups:
        values = [score.value for score in group.scores if score.value is not None]
        flat += is_flat([score.value for score in group.scores])
        by_kind["reward"] += values
        by_kind["reward_edit" if group.task.sample.references else "reward_t2i"] += values
        for score in group.scores:
            for name in score.weights:
                by_kind.setdefault(f"part_{name}", []).append(score.parts[name])
        if values:
            mean = sum(values) / len(values)
            spreads.append((sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5)
    metrics = {name: sum(values) / len(values) for name, values in by_kind.items() if values}
    if spreads:
        metrics["reward_std_in_group"] = sum(spreads) / len(spreads)
    dropped = sum(all(a is None for a in group.advantages) for group in groups) / len(groups)
    shares = {"flat_groups": flat / len(groups), "dropped_groups": dropped}
    return metrics | shares | {"missing_scores": missing_share(groups)}
