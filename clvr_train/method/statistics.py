"""Intervals that benchmark numbers are reported with (CLVR A.2)."""

import math
import random
from collections.abc import Sequence


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


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """`mean(a) - mean(b)` over the same prompts, with its 95 % percentile interval: (difference, lo, hi)."""
    if len(a) != len(b):
        raise ValueError(f"paired samples differ in length: {len(a)} and {len(b)}")
    _check_n(len(a))
    differences = [x - y for x, y in zip(a, b, strict=True)]
    rng = random.Random(seed)
    n = len(differences)
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(resamples))
    return sum(differences) / n, means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]


def _check_n(n: int) -> None:
    if n < 1:
        raise ValueError(f"n={n}: no samples")
