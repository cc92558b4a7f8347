"""Intervals that benchmark numbers are reported with (CLVR A.2)."""

import math
from collections.abc import Callable, Sequence

import numpy as np


def wald_se(proportion: float, n: int) -> float:
    """Standard error of a proportion, `sqrt(p (1 - p) / n)`."""
    _check_n(n)
    return math.sqrt(proportion * (1 - proportion) / n)


def wilson(passes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion, inside [0, 1] for any counts."""
    _check_n(n)
    if not 0 <= passes <= n:
        raise ValueError(f"passes={passes} of n={n}")
    p = passes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (ddof 1; 0 for a single value)."""
    _check_n(len(values))
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def crossed_bootstrap(
    statistic: Callable[..., np.ndarray], *tables: np.ndarray, seed: int = 0, resamples: int = 4000
) -> tuple[float, float, float]:
    """A statistic of means over training seeds and prompts, with its 95 % percentile interval: (value, lo, hi).

    Seeds and prompts are resampled together and alike for all tables, so the interval holds both spreads and systems
    are compared on the same draws. With one seed only prompts vary.

    Args:
        statistic: of the mean of each table (arrays of one mean a resample), e.g. `np.subtract`.
        tables: (seeds, prompts) each, all of one shape.
    """
    if not tables or len({table.shape for table in tables}) != 1 or tables[0].ndim != 2:
        raise ValueError(f"tables of shapes {[table.shape for table in tables]}: all must be (seeds, prompts)")
    num_seeds, num_prompts = tables[0].shape
    _check_n(num_seeds * num_prompts)
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), resamples) / num_seeds
    prompts = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), resamples) / num_prompts
    draws = statistic(*(np.einsum("rs,sp,rp->r", seeds, table, prompts, optimize=True) for table in tables))
    lo, hi = np.quantile(draws, (0.025, 0.975))
    return float(statistic(*(table.mean() for table in tables))), float(lo), float(hi)


def _check_n(n: int) -> None:
    if n < 1:
        raise ValueError(f"n={n}: no samples")
