"""The rewards of an epoch in numbers: of the whole reward and of every dimension it is made of."""

from collections.abc import Sequence

import numpy as np

from clvr_train.pprl.rollout import Group

QUANTILES = (5, 25, 50, 75, 95)  # in %
BEST = (10, 25, 50)  # shares of the rollouts, best first, in %


def reward_statistics(groups: Sequence[Group]) -> dict[str, float]:
    """Mean, spread, quantiles and means of the best of the rewards of all groups; missing scores are left out.

    Returns:
        For `reward`, and for every dimension `part_<name>` of the scores: `<it>` (mean), `<it>_std` (population),
        `<it>_q05` .. `<it>_q95` (quantiles, linear), and `<it>_top10`, `_top25`, `_top50`: the mean of that share of
        the rollouts, at least one, that this number rates best. A number that no rollout has is left out.
    """
    numbers: dict[str, list[float]] = {"reward": []}
    for group in groups:
        for score in group.scores:
            if not score.missing:
                numbers["reward"].append(score.value)
                for name in score.weights:
                    numbers.setdefault(f"part_{name}", []).append(score.parts[name])
    result = {}
    for name, values in numbers.items():
        if values:
            result |= {f"{name}{suffix}": value for suffix, value in _statistics(values).items()}
    return result


def _statistics(values: Sequence[float]) -> dict[str, float]:
    ordered = np.sort(np.asarray(values, np.float64))[::-1]
    result = {"": float(ordered.mean()), "_std": float(ordered.std())}
    quantiles = np.quantile(ordered, [q / 100 for q in QUANTILES])
    result |= {f"_q{q:02d}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
    best = {f"_top{share}": ordered[: max(1, round(len(ordered) * share / 100))] for share in BEST}
    return result | {name: float(part.mean()) for name, part in best.items()}
