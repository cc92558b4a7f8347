"""Intervals that benchmark numbers are reported with (CLVR A.2)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 2**22  # values drawn at a time by the bootstrap


def wald_se(proportion: float, n: int) -> float:
    """Standard error of a proportion, `sqrt(p (1 - p) / n)`."""
    _check_n(n)
    if not 0 <= proportion <= 1:
        raise ValueError(f"proportion={proportion}: must lie in [0, 1]")
    return math.sqrt(proportion * (1 - proportion) / n)


def wilson(passes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion, inside [0, 1] for any counts."""
    _check_n(n)
    if not 0 <= passes <= n:
        raise ValueError(f"passes={passes} of n={n}")
    p = passes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # rounding: at 0 and n an end is p itself


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


@dataclass(frozen=True)
class Paired:
    """A mean difference a - b over `n` prompts that both systems drew, its 95 % interval, and a two-sided p value."""

    difference: float
    ci95: tuple[float, float]
    p_value: float
    n: int


def paired_bootstrap(a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Paired:
    """Compares two systems on the same prompts, whose differences are resampled (float64).

    The interval is the 95 % percentile interval. The p value says how often resamples of differences whose mean was
    moved to 0 have a mean at least as far from 0 as the one found, counted with it: `(1 + hits) / (1 + resamples)`
    (Efron and Tibshirani 1993, 16.4; Davison and Hinkley 1997, 4.2). It does not depend on the order of the prompts.

    Args:
        a, b: one number a prompt, in the same order.

    Raises:
        ValueError: no prompts, lists of different lengths, or a number that is not finite.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} numbers: systems are compared on the same prompts")
    _check_n(len(a))
    differences = np.sort(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    if not np.isfinite(differences).all():
        raise ValueError("a number to compare is not finite")
    found, n = float(differences.mean()), len(differences)
    rng, rows = np.random.default_rng(seed), max(1, BLOCK // n)
    parts = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = np.concatenate([differences[rng.integers(n, size=(part, n))].mean(1) for part in parts])
    lo, hi = np.quantile(means, (0.025, 0.975))
    # Sums in another order differ by rounding; a tie counts.
    hits = np.count_nonzero(np.abs(means - found) >= abs(found) - 1e-12)
    return Paired(found, (float(lo), float(hi)), (1 + int(hits)) / (1 + resamples), n)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for so many comparisons at a time (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _check_n(n: int) -> None:
    if n < 1:
        raise ValueError(f"n={n}: no samples")
