"""Mixing rewards by dimensions: a missing member takes no part, scales of dimensions play none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clvr_train.method.advantage import group_advantages, normalised_mix

member = st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
groups = st.lists(st.lists(member, max_size=6), min_size=1, max_size=4)
WEIGHTS = (0.5, 0.3, 0.2)


def dimensions(group):
    return [{} if m is None else {f"d{i}": (m[i], w) for i, w in enumerate(WEIGHTS)} for m in group]


def advantages(batch, std="global"):
    return group_advantages(normalised_mix([dimensions(group) for group in batch]), std=std)


@given(groups, st.sampled_from(["global", "group"]))
def test_advantages_of_the_others_are_those_of_the_group_without_the_failed(batch, std):
    found = advantages(batch, std)
    kept = advantages([[m for m in group if m is not None] for group in batch], std)
    assert [[a for a in group if a is not None] for group in found] == [[a for a in g if a is not None] for g in kept]
    for group, values in zip(batch, found, strict=True):
        counts = sum(m is not None for m in group) >= 2
        assert [a is not None for a in values] == [m is not None and counts for m in group]


@given(groups)
def test_the_mean_of_a_group_is_zero(batch):
    for group in advantages(batch):
        valid = [a for a in group if a is not None]
        assert not valid or sum(valid) / len(valid) == pytest.approx(0, abs=1e-6)


def test_a_narrow_dimension_counts_as_much_as_a_wide_one():
    """Two dimensions of equal weight say the opposite, one within .9 .. 1, one within 0 .. 1: they cancel out."""
    group = [{"wide": (v, 1.0), "narrow": (1.0 - v / 10, 1.0)} for v in (0.0, 0.5, 1.0)]
    (mixed,) = normalised_mix([group], eps=0.0)
    assert mixed == pytest.approx([0, 0, 0], abs=1e-9)
    weighted = [sum(v * w for v, w in m.values()) for m in group]
    assert max(weighted) - min(weighted) > 0.8


def test_worked_numbers():
    group = [{"a": (0.0, 3.0), "b": (1.0, 1.0)}, {"a": (1.0, 3.0), "b": (0.0, 1.0)}, {}]
    assert normalised_mix([group], eps=0.0) == [[pytest.approx(-0.5), pytest.approx(0.5), None]]
    assert normalised_mix([group[1:]]) == [[None, None]]


def test_a_flat_dimension_says_nothing():
    group = [{"a": (v, 1.0), "b": (0.7, 1.0)} for v in (0.1, 0.9)]
    assert normalised_mix([group], eps=1e-12)[0] == pytest.approx([-0.5, 0.5])


def test_different_dimensions_in_a_group_are_a_bug():
    with pytest.raises(ValueError, match="different dimensions"):
        normalised_mix([[{"a": (0.1, 1.0)}, {"b": (0.1, 1.0)}]])
