"""Rewards of groups of rollouts -> advantages. A missing reward leaves its group; it is never a number."""

import math
from collections.abc import Sequence

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


def is_flat(group: Sequence[float | None], tolerance: float = 1e-6) -> bool:
    """Whether the valid rewards of a group are all equal: it then has no gradient."""
    valid = [r for r in group if r is not None]
    return not valid or max(valid) - min(valid) <= tolerance


def _std(values: Sequence[float]) -> float:
    if not values:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
