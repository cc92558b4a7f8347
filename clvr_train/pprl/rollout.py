"""Rollouts of an epoch: groups drawn by the `old` policy, judged, and turned into advantages and r (CLVR 3.2).

On several ranks each draws and judges its share of the groups; scores are gathered, so that every rank has all groups,
of which only its own hold tokens and images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

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
from clvr_train.runtime.distributed import World

MIXES = ("weighted", "normalised")
NOT_JUDGED = Score(None, "not judged yet")
RewardFunction = Callable[[Generation, Task], Score]


@dataclass
class Group:
    """The rollouts of one task, the `place`-th of its epoch: the seeds of their noise and their scores; advantages and
    r once the epoch is judged. `x0` (G, N, C) and images are there on the rank that has drawn them. `nfe` counts
    the network evaluations that they took; `stored` names the tokens in the ledger, once they are there.
    """

    place: int
    task: Task
    seeds: list[tuple]
    x0: Tensor | None = None
    images: list[Image] | None = None
    scores: list[Score] = field(default_factory=list)
    advantages: list[float | None] = field(default_factory=list)
    r: list[float | None] = field(default_factory=list)
    nfe: int = 0
    stored: str = ""

    @property
    def size(self) -> int:
        return len(self.seeds)


def new_groups(tasks: Sequence[Task], *, group_size: int, run_seed: int, epoch: int) -> list[Group]:
    """The groups of an epoch, of which nothing is drawn yet. The noise of rollout k depends on (run seed, epoch, place,
    key of the task, k), and so not on the rank that draws it.
    """
    return [
        Group(place, task, [("rollout", run_seed, epoch, place, *task.sample.key, k) for k in range(group_size)])
        for place, task in enumerate(tasks)
    ]


def roll_out(sampler: Sampler, groups: Sequence[Group], reward: RewardFunction, workers: int = 0) -> None:
    """Draws and judges the groups. A rollout is judged while the next ones are drawn, `workers` at a time (0: one after
    the other, in this thread).
    """
    places = [(group, k) for group in groups for k in range(group.size)]
    samples = [group.task.sample for group, _ in places]
    for group in groups:
        group.scores, group.stored = [NOT_JUDGED] * group.size, ""
        group.images = [None] * group.size
        group.nfe = sampler.nfe_per_image * group.size
    x0: dict[int, Tensor] = {}

    def drawn() -> Iterator[tuple[Group, int]]:
        for indices, tokens in sampler.batches(samples, [group.seeds[k] for group, k in places]):
            for i, one, image in zip(indices, tokens, sampler.decode(tokens), strict=True):
                group, k = places[i]
                x0[i], group.images[k] = one, image
                yield places[i]

    with use(sampler.conditioner.klein.transformer, OLD):
        score_all(_scoring(reward), drawn(), workers)
    first = 0
    for group in groups:
        group.x0 = torch.stack([x0[i] for i in range(first, first + group.size)]).cpu()
        first += group.size


def show(sampler: Sampler, groups: Sequence[Group]) -> None:
    """Gives groups that were drawn before their images."""
    for group in groups:
        group.images = group.images or sampler.decode(group.x0.to(sampler.conditioner.klein.device))


def judge_missing(groups: Sequence[Group], reward: RewardFunction, workers: int = 0) -> None:
    """Judges all rollouts without a score, `workers` at a time."""
    places = [(group, k) for group in groups for k, score in enumerate(group.scores) if score.missing]
    score_all(_scoring(reward), places, workers)


def _scoring(reward: RewardFunction) -> Callable[[tuple[Group, int]], Score]:
    """Gives a rollout its score."""

    def score(place: tuple[Group, int]) -> Score:
        group, k = place
        group.scores[k] = reward(Generation(group.task.sample, group.images[k], group.seeds[k]), group.task)
        return group.scores[k]

    return score


def missing_share(groups: Sequence[Group], world: World | None = None) -> float:
    """Share of the rollouts of all ranks that have no score."""
    scores = [score for group in groups for score in group.scores]
    counts = (world or World()).gather([sum(score.missing for score in scores), len(scores)])
    return sum(missing for missing, _ in counts) / sum(total for _, total in counts)


def gather_scores(groups: Sequence[Group], own: Sequence[Group], world: World) -> None:
    """Gives every rank the scores of all groups; `own` are those that this rank has judged."""
    told = world.gather(
        [[group.place, group.task.sample.key, group.nfe, [asdict(score) for score in group.scores]] for group in own]
    )
    by_place = {place: rest for rank in told for place, *rest in rank}
    for group in groups:
        key, group.nfe, scores = by_place[group.place]
        if tuple(key) != group.task.sample.key:
            raise RuntimeError(f"group {group.place}: ranks have different tasks, {key} and {group.task.sample.key}")
        group.scores = [Score(**score) for score in scores]


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
    """Mean reward of text to image and of editing, spread within groups, shares of flat and dropped groups and of
    missing scores, and the network evaluations; `pprl.reward_stats` has more of the rewards.
    """
    by_kind: dict[str, list[float]] = {"reward_t2i": [], "reward_edit": []}
    spreads, flat = [], 0
    for group in groups:
        values = [score.value for score in group.scores if score.value is not None]
        flat += is_flat([score.value for score in group.scores])
        by_kind["reward_edit" if group.task.sample.references else "reward_t2i"] += values
        if values:
            mean = sum(values) / len(values)
            spreads.append((sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5)
    metrics = {name: sum(values) / len(values) for name, values in by_kind.items() if values}
    if spreads:
        metrics["reward_std_in_group"] = sum(spreads) / len(spreads)
    dropped = sum(all(a is None for a in group.advantages) for group in groups) / len(groups)
    shares = {"flat_groups": flat / len(groups), "dropped_groups": dropped, "missing_scores": missing_share(groups)}
    return metrics | shares | {"nfe": sum(group.nfe for group in groups)}
