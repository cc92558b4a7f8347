"""Rewards of groups of rollouts -> advantages. A missing reward leaves its group; it is never a number."""

import math
from collections.abc import Mapping, Sequence

STDS = ("global", "group")


def group_advantages(
    rewards: Sequence[Sequence[float | None]], *, std: str = "global", eps: float = 1e-4, min_valid: int = 2
) -> list[list[float | None]]:
    """`A = (R - mean of its group) / (std + eps)` for every rollout of every group.

    Args:
        rewards: one list a group, of any length; `None` is a missing reward.
        std: `global` divides by the standard deviation (ddof 0) of all valid rewards of all groups that count, as
            the official DiffusionNFT code does; `group` by that of the group.
        min_valid: groups with fewer valid rewards are dropped whole.

    Returns:
        The same shape; `None` where a rollout takes no part. The others' advantages are those of the groups without it.
    """
    if std not in STDS:
        raise ValueError(f"std={std!r} is not one of {', '.join(STDS)}")
    valid = [[r for r in group if r is not None] for group in rewards]
    if any(not math.isfinite(r) for group in valid for r in group):
        raise ValueError("a reward is not finite; a judge that failed must give a missing score")
    counted = [group if len(group) >= min_valid else [] for group in valid]
    spread = _std([r for group in counted for r in group])
    result: list[list[float | None]] = []
    for group, kept in zip(rewards, counted, strict=True):
        mean = sum(kept) / len(kept) if kept else 0.0
        scale = (spread if std == "global" else _std(kept)) + eps
        result.append([(r - mean) / scale if r is not None and kept else None for r in group])
    return result


def normalised_mix(
    groups: Sequence[Sequence[Mapping[str, tuple[float, float]]]], *, eps: float = 1e-4, min_valid: int = 2
) -> list[list[float | None]]:
    """Rewards of several dimensions as one: each is normalised within its group, then they are weighted.

    `sum of w_d (R_d - mean of its group) / (std of its group + eps)`, with the weights of a group summing to 1. A
    dimension whose scores lie close together so counts as much as one whose scores lie far apart, as weighted; one that
    is flat counts for nothing. `group_advantages` of the result gives the scale of the batch, as in GDPO.

    Args:
        groups: for every rollout its dimensions, name -> (value, weight); empty for a missing reward.

    Returns:
        The same shape; `None` for missing rewards and in groups with fewer than `min_valid` others.

    Raises:
        ValueError: the rollouts of a group differ in their dimensions.
    """
    result: list[list[float | None]] = []
    for group in groups:
        valid = [dimensions for dimensions in group if dimensions]
        if len(valid) < max(1, min_valid):
            result.append([None] * len(group))
            continue
        mixed = [0.0] * len(valid)
        total = sum(weight for _, weight in valid[0].values())
        for name, (_, weight) in valid[0].items():
            if any(dimensions.keys() != valid[0].keys() for dimensions in valid):
                raise ValueError("the rewards of a group have different dimensions")
            values = [dimensions[name][0] for dimensions in valid]
            mean, std = sum(values) / len(values), _std(values)
            mixed = [m + weight / total * (v - mean) / (std + eps) for m, v in zip(mixed, values, strict=True)]
        left = iter(mixed)
        result.append([next(left) if dimensions else None for dimensions in group])
    return result


def is_flat(group: Sequence[float | None], tolerance: float = 1e-6) -> bool:
    """Whether the valid rewards of a group are all equal: it then has no gradient."""
    valid = [r for r in group if r is not None]
    return not valid or max(valid) - min(valid) <= tolerance


def _std(values: Sequence[float]) -> float:
    if not values:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
