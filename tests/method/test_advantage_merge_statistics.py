"""A failure is missing, not zero; merging identities; intervals against worked numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clvr_train.method.advantage import group_advantages, is_flat
from clvr_train.method.merge import DeltaStatistics, check_same_shapes, merge_tensor
from clvr_train.method.statistics import crossed_bootstrap, mean_se, wald_se, wilson

rewards = st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=6), min_size=1, max_size=4)


@given(rewards, st.data(), st.sampled_from(["global", "group"]))
def test_a_missing_reward_leaves_the_others_as_if_it_had_not_been_there(groups, data, std):
    without = group_advantages(groups, std=std)
    place = data.draw(st.integers(0, len(groups) - 1))
    position = data.draw(st.integers(0, len(groups[place])))
    with_failure = [list(group) for group in groups]
    with_failure[place].insert(position, None)
    result = group_advantages(with_failure, std=std)
    assert result[place].pop(position) is None
    assert result == without


@given(rewards, st.sampled_from(["global", "group"]))
def test_advantages_of_a_group_sum_to_zero(groups, std):
    for group in group_advantages(groups, std=std):
        assert abs(sum(group)) < 1e-6 * max(1.0, max(abs(a) for a in group) * 100)


def test_worked_example_and_dropped_group():
    a = group_advantages([[0.0, 1.0], [0.5, None]], std="global", eps=0.0)
    assert a == [[-1.0, 1.0], [None, None]]
    with pytest.raises(ValueError, match="not finite"):
        group_advantages([[math.nan, 1.0]])
    with pytest.raises(ValueError, match="std='batch'"):
        group_advantages([[0.0, 1.0]], std="batch")


def test_flat_groups():
    assert is_flat([0.5, 0.5, None]) and is_flat([]) and not is_flat([0.5, 0.6])


def weights(seed):
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))


def test_zero_deltas_give_the_base_bit_for_bit_and_order_does_not_matter():
    base, d, a = weights(0), weights(1), weights(2)
    assert torch.equal(merge_tensor(base, base, base), base)
    assert torch.equal(merge_tensor(base, d, a), merge_tensor(base, a, d))
    assert torch.allclose(merge_tensor(base, d, base), d, atol=1e-6)
    assert torch.allclose(merge_tensor(base, d, a, 0.0, 0.5), base + 0.5 * (a - base))


def test_shift_and_cosine_of_known_deltas():
    base = torch.full((4,), 2.0)
    statistics = DeltaStatistics()
    statistics.add(base, base + torch.tensor([1.0, 0, 0, 0]), base + torch.tensor([0, 2.0, 0, 0]))
    report = statistics.report()
    assert report == {"shift_distill": 0.25, "shift_align": 0.5, "cosine": 0.0}
    statistics.add(base, base + 1, base - 1)
    assert statistics.report()["cosine"] < 0


def test_differing_tensors_are_named():
    with pytest.raises(ValueError, match=r"aligned: x has shape \(2,\), base has \(3,\)"):
        check_same_shapes({"x": (3,)}, {"x": (2,)}, "aligned")
    with pytest.raises(ValueError, match="missing, e.g. .'x'"):
        check_same_shapes({"x": (3,)}, {"y": (3,)}, "aligned")


def test_intervals_against_worked_numbers():
    lo, hi = wilson(8, 10)
    assert (round(lo, 4), round(hi, 4)) == (0.4902, 0.9433)
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
    assert wald_se(0.5, 100) == 0.05
    assert mean_se([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    with pytest.raises(ValueError, match="passes=6 of n=5"):
        wilson(6, 5)


def test_crossed_bootstrap_sees_a_constant_difference_and_chance():
    a = np.array([[0.0, 1.0, 1.0, 0.0] * 20] * 3)
    assert crossed_bootstrap(np.subtract, a + 0.25, a) == (0.25, pytest.approx(0.25), pytest.approx(0.25))
    difference, lo, hi = crossed_bootstrap(np.subtract, a, np.roll(a, 1, axis=1))
    assert difference == 0 and lo < 0 < hi
    with pytest.raises(ValueError, match="shapes"):
        crossed_bootstrap(np.subtract, a, a[:2])


def test_crossed_bootstrap_of_one_seed_is_the_interval_over_prompts_and_seeds_widen_it():
    rng = np.random.default_rng(0)
    prompts = (rng.random(400) < 0.3).astype(float)
    mean, lo, hi = crossed_bootstrap(lambda x: x, prompts[None])
    se = math.sqrt(mean * (1 - mean) / 400)
    assert (lo, hi) == (pytest.approx(mean - 1.96 * se, abs=0.004), pytest.approx(mean + 1.96 * se, abs=0.004))
    shifted = np.clip(prompts[None] + np.array([[-0.2], [0.0], [0.2]]), -1, 2)  # seeds that differ as a whole
    _, wide_lo, wide_hi = crossed_bootstrap(lambda x: x, shifted)
    assert wide_hi - wide_lo > 2 * (hi - lo)
