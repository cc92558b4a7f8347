"""Shares are exact by counts: over a period, at every prefix, for classes and for samples within them."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clvr_train.data.mixing import Mix, Shares, step_class, step_weights
from clvr_train.data.order import BlockPermutation, Blocks
from clvr_train.method.trajectory import Sample

WEIGHTS = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any).map(lambda w: dict(enumerate(w)))


def sample(history: int) -> Sample:
    return Sample("a", history + 1, "goal", ("r",), ("image",) * history, "image")


@given(WEIGHTS, st.integers(0, 3))
def test_shares_are_exact_over_a_period_and_close_at_every_prefix(weights, first_period):
    shares = Shares(weights)
    start = first_period * shares.period
    assert shares.period <= sum(weights.values())
    assert shares.counts(start) == {name: share * start for name, share in shares.shares.items()}
    counts = Counter(shares.counts(start))
    for position in range(start, start + shares.period):
        name, number = shares.at(position)
        assert number == counts[name], "the number of those before it"
        counts[name] += 1
        assert counts == shares.counts(position + 1)
        for other, share in shares.shares.items():
            assert abs(counts[other] - share * (position + 1)) <= len(weights) / 2
    assert counts == {name: share * (start + shares.period) for name, share in shares.shares.items()}


def test_decimals_are_taken_as_written():
    shares = Shares({"a": 0.7, "b": 0.2, "c": 0.1})
    assert shares.shares == {"a": Fraction(7, 10), "b": Fraction(1, 5), "c": Fraction(1, 10)}
    assert Counter(shares.at(10**15 + i)[0] for i in range(10)) == {"a": 7, "b": 2, "c": 1}


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": 1, "b": -1}, {"a": float("nan")}, {"a": float("inf")}])
def test_weights_that_make_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        Shares(weights)


@given(
    st.sets(st.integers(0, 4), min_size=1),
    st.sampled_from([0, 0.1, 0.25, 0.5, 1]),
    st.integers(1, 3),
)
def test_text_to_image_has_its_share_and_lengths_of_history_equal_ones(present, t2i_share, periods):
    editing = present - {0}
    if t2i_share > 0 and 0 not in present or t2i_share < 1 and not editing:
        with pytest.raises(ValueError, match=f"t2i_share={t2i_share}, but no sample"):
            step_weights(present, t2i_share)
        return
    shares = Shares(step_weights(present, t2i_share))
    total = periods * shares.period
    counts = Counter(shares.at(position)[0] for position in range(total))
    assert counts[0] == Fraction(str(t2i_share)) * total
    assert {counts[c] for c in editing} <= {(total - counts[0]) // max(1, len(editing))}


def test_classes_are_lengths_of_history_up_to_four_and_more():
    assert [step_class(sample(history)) for history in range(7)] == [0, 1, 2, 3, 4, 4, 4]
    with pytest.raises(ValueError, match="not in"):
        step_weights([0, 1], 1.5)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2),
)
def test_sources_in_their_shares_each_sample_once_an_epoch_of_its_source(sources, world, seed):
    """Ranges of indices one after the other stand for sources of several sizes."""
    members, start = {}, 0
    for name, (size, _) in enumerate(sources):
        members[name] = range(start, start + size)
        start += size
    mix = Mix(members, {name: weight for name, (_, weight) in enumerate(sources)}, 4, seed)
    steps = range(mix.shares.period)  # 4 periods
    drawn = [pair for step in steps for rank in range(world) for pair in mix.batch(step, rank, world)]
    assert drawn == [mix.at(position) for position in range(4 * len(steps))]
    for name, (size, _) in enumerate(sources):
        of_source = [pair for pair in drawn if pair[1] in members[name]]
        assert len(of_source) == mix.shares.shares[name] * len(drawn)
        assert [epoch for epoch, _ in of_source] == [number // size for number in range(len(of_source))]
        epochs = [of_source[i : i + size] for i in range(0, len(of_source), size)]
        assert all(len({index for _, index in epoch}) == len(epoch) for epoch in epochs)


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
)
def test_sources_that_are_read_by_block_beside_one_in_free_order(sizes, window, world):
    """The order of every source is that of its blocks, and adding blocks to one leaves the others as they are."""
    members, start = {"free": range(7)}, 7
    for name, blocks in enumerate(sizes):
        members[name] = range(start, start + sum(blocks))
        start += sum(blocks)
    weights = {name: len(indices) for name, indices in members.items()}
    mix = Mix(members, weights, 4, 3, blocks=dict(enumerate(sizes)), window=window)
    plain = Mix(members, weights, 4, 3)
    steps = range(-(-2 * start // 4))
    drawn = [pair for step in steps for rank in range(world) for pair in mix.batch(step, rank, world)]
    of_plain = [pair for step in steps for pair in plain.batch(step)]
    assert [pair for pair in drawn if pair[1] < 7] == [pair for pair in of_plain if pair[1] < 7]
    for name, blocks in enumerate(sizes):
        of_source = [pair for pair in drawn[: 2 * start] if pair[1] in members[name]]
        expected = [BlockPermutation(blocks, window, "mix", 3, str(name), epoch) for epoch in range(2)]
        assert of_source == [(e, members[name][n]) for e, permutation in enumerate(expected) for n in permutation]


def test_blocks_that_do_not_fit_are_refused():
    members, weights = {"a": range(4), "b": range(4, 6)}, {"a": 1, "b": 1}
    for blocks, window, message in (
        ({"c": [6]}, 1, "blocks: 'c' is no class of the members"),
        ({"a": [1, 2]}, 1, "num_samples=4, but the 2 blocks hold 3"),
        ({"a": Blocks([1, 3], window=1)}, 2, "window=2, but the corpus keeps 1 blocks open"),
        ({"a": [1, 3]}, 0, "window=0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            Mix(members, weights, 2, 0, blocks=blocks, window=window)
    assert Mix(members, weights, 2, 0, blocks={"a": Blocks([1, 3], window=2), "b": ()}, window=2).batch(0)


def test_sources_and_classes_multiply():
    """Two sources, 3 to 1, each with its own text-to-image share and lengths of history."""
    classes = {"trajectories": (3, step_weights([0, 1, 2], 0.5)), "captions": (1, step_weights([0], 1))}
    weights = {(name, c): weight * share for name, (weight, part) in classes.items() for c, share in part.items()}
    mix = Mix({key: range(10 * i, 10 * i + 10) for i, key in enumerate(weights)}, weights, 16, seed=0)
    counts = Counter(list(weights)[index // 10] for _, index in mix.batch(7))
    assert counts == {("trajectories", 0): 6, ("trajectories", 1): 3, ("trajectories", 2): 3, ("captions", 0): 4}


def test_a_class_of_some_weight_needs_samples():
    with pytest.raises(ValueError, match="'b' has weight 0.5, but no samples"):
        Mix({"a": [0]}, {"a": 0.5, "b": 0.5}, 1, seed=0)
    assert Mix({"a": [4]}, {"a": 1, "b": 0}, 2, seed=0).batch(0) == [(0, 4), (1, 4)]
