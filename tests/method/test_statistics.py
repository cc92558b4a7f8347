"""Intervals and tests of benchmark numbers: properties, exact enumeration, and formulas worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clvr_train.method import statistics as module
from clvr_train.method.statistics import holm, mean_se, paired_bootstrap, wald_se, wilson

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
numbers = st.lists(st.integers(0, 8).map(lambda i: i / 8), min_size=1, max_size=30)
pairs = numbers.flatmap(lambda a: st.tuples(st.just(a), st.lists(st.sampled_from(a), min_size=len(a), max_size=len(a))))


@given(counts)
def test_wilson_solves_the_score_equation(count) -> None:
    """Each end is where the observed proportion lies z standard errors of that end away."""
    passes, n = count
    p = passes / n
    lo, hi = wilson(passes, n)
    assert 0 <= lo <= p <= hi <= 1
    for end in (lo, hi):
        assert (p - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n, abs=1e-12)
    other = wilson(n - passes, n)
    assert other == (pytest.approx(1 - hi), pytest.approx(1 - lo))


@given(counts)
def test_wald_is_the_standard_error_of_the_mean_of_zeros_and_ones(count) -> None:
    passes, n = count
    outcomes = [1.0] * passes + [0.0] * (n - passes)
    _, se = mean_se(outcomes)
    assert wald_se(passes / n, n) == pytest.approx(se * math.sqrt((n - 1) / n), abs=1e-12)


def test_parity_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for passes, n in ((0, 5), (8, 10), (97, 192), (553, 553)):
        theirs = stats.binomtest(passes, n).proportion_ci(0.95, "wilson")
        assert wilson(passes, n, stats.norm.ppf(0.975)) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    values = np.random.default_rng(0).random(50)
    assert mean_se(values.tolist())[1] == pytest.approx(stats.sem(values))


@pytest.mark.parametrize("proportion", [-0.1, 1.1, math.nan])
def test_wald_refuses_what_is_no_proportion(proportion: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        wald_se(proportion, 10)


def test_paired_bootstrap_is_the_exact_distribution() -> None:
    """Of four differences all 4**4 resamples can be counted."""
    a, b = [1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.5, 0.0]
    differences = np.subtract(a, b)
    means = [np.mean(draw) for draw in itertools.product(differences, repeat=4)]
    exact = np.mean(np.abs(np.array(means) - 0.375) >= 0.375)
    result = paired_bootstrap(a, b, resamples=100_000)
    assert result.difference == 0.375 and result.n == 4
    assert result.p_value == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 100_000))
    assert result.ci95 == tuple(np.quantile(means, (0.025, 0.975)))


@settings(max_examples=40)
@given(pairs, st.randoms(use_true_random=False))
def test_paired_bootstrap_has_its_symmetries(both, shuffle) -> None:
    a, b = both
    result = paired_bootstrap(a, b, resamples=500)
    assert result == paired_bootstrap(a, b, resamples=500), "the same seed, the same answer"
    assert 0 < result.p_value <= 1
    order = list(range(len(a)))
    shuffle.shuffle(order)
    again = paired_bootstrap([a[i] for i in order], [b[i] for i in order], resamples=500)
    assert again == result, "the order of the prompts"
    moved = paired_bootstrap([x + 2 for x in a], [x + 2 for x in b], resamples=500)
    assert moved.difference == pytest.approx(result.difference) and moved.p_value == result.p_value
    assert paired_bootstrap(b, a, resamples=500).difference == -result.difference
    assert paired_bootstrap(a, a, resamples=500) == module.Paired(0.0, (0.0, 0.0), 1.0, len(a))


def test_the_p_value_is_fair_and_the_interval_covers() -> None:
    """No difference: p below 0.05 in about a twentieth of trials; the interval holds the truth in about 95 %."""
    rng = np.random.default_rng(1)
    results = [paired_bootstrap(rng.random(80), rng.random(80), seed=i, resamples=400) for i in range(400)]
    small = sum(result.p_value < 0.05 for result in results)
    inside = sum(result.ci95[0] <= 0 <= result.ci95[1] for result in results)
    assert 6 <= small <= 40 and inside >= 360  # 20 and 380 expected; each bound is wrong once in some thousands


def test_a_long_list_is_drawn_in_parts(monkeypatch) -> None:
    """Parts change nothing but the memory it takes."""
    rng = np.random.default_rng(0)
    a, b = rng.random(50), rng.random(50)
    whole = paired_bootstrap(a, b, resamples=200)
    monkeypatch.setattr(module, "BLOCK", 500)
    assert paired_bootstrap(a, b, resamples=200) == whole


def test_what_cannot_be_paired_is_refused() -> None:
    for a, b, words in (([1.0], [1.0, 2.0], "same prompts"), ([], [], "no samples"), ([math.nan], [0.0], "not finite")):
        with pytest.raises(ValueError, match=words):
            paired_bootstrap(a, b)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == [pytest.approx(p) for p in (0.03, 0.06, 0.06, 0.02)]
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_and_keeps_the_order(p_values) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    by_p = sorted(zip(p_values, adjusted, strict=True))
    assert [q for _, q in by_p] == sorted(q for _, q in by_p)
