"""The order is a permutation an epoch, the same for any number of ranks, and as cheap at ten million as at ten."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clvr_train.data import order as order_module
from clvr_train.data.order import BlockPermutation, Order, Permutation

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)


@given(st.integers(1, 400), st.integers(0, 5))
def test_a_permutation_has_every_element_once(n, epoch):
    permutation = Permutation(n, "test", epoch)
    assert sorted(permutation) == list(range(n)) and len(permutation) == n
    assert list(permutation) == list(Permutation(n, "test", epoch))
    with pytest.raises(IndexError):
        permutation[n]


@pytest.mark.parametrize("n", [3, 5, 7, 16, 30])
def test_every_element_comes_equally_often_at_every_place(n):
    draws = 1500
    counts = Counter(pair for epoch in range(draws) for pair in enumerate(Permutation(n, "test", epoch)))
    expected, freedom = draws / n, (n - 1) ** 2
    chi = sum((counts[place, value] - expected) ** 2 / expected for place in range(n) for value in range(n))
    assert abs(chi - freedom) < 4.5 * (2 * freedom) ** 0.5


def test_permutations_of_a_large_n_keep_no_order():
    n = 10_000_000
    for permutation in (Permutation(n, "order", 0, 0), Permutation(n, "order", 0, 1)):
        values = [permutation[position] for position in range(2000)]
        assert len(set(values)) == 2000
        assert abs(sum(values) / 2000 / n - 0.5) < 0.03  # 4.6 standard errors
        steps = [abs(a - b) / n for a, b in zip(values, values[1:], strict=False)]
        assert abs(sum(steps) / len(steps) - 1 / 3) < 0.03
    fixed = [Permutation(n, "order", seed, 0)[5] for seed in range(50)]
    assert len(set(fixed)) == 50


@given(SIZES, st.integers(1, 4), st.integers(0, 3))
def test_blocks_are_read_one_window_after_the_other(sizes, window, epoch):
    permutation = BlockPermutation(sizes, window, "test", epoch)
    indices = list(permutation)
    assert sorted(indices) == list(range(sum(sizes)))
    of_block = [block for block, size in enumerate(sizes) for _ in range(size)]
    visited = [of_block[index] for index in indices]
    for block in set(visited):  # between its first and its last row no more than a window of blocks is open
        first, last = visited.index(block), len(visited) - 1 - visited[::-1].index(block)
        assert len(set(visited[first : last + 1])) <= window


@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 2, 8]), st.integers(0, 30), st.booleans())
def test_ranks_together_see_the_sequence_of_one(num_samples, share, world, step, by_block):
    blocks = [num_samples // 3, num_samples - num_samples // 3] if by_block else ()
    order = Order(num_samples, share * 8, seed=1, blocks=blocks)
    together = [pair for rank in range(world) for pair in order.batch(step, rank, world)]
    assert together == order.batch(step)
    assert together == [order.at(position) for position in range(step * share * 8, (step + 1) * share * 8)]


@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 3))
def test_every_epoch_has_every_sample_once_and_batches_reach_over_its_end(num_samples, batch_size, seed):
    order = Order(num_samples, batch_size, seed)
    drawn = [pair for step in range(3 * num_samples) for pair in order.batch(step)][: 3 * num_samples]
    assert [epoch for epoch, _ in drawn] == [epoch for epoch in range(3) for _ in range(num_samples)]
    for epoch in range(3):
        assert sorted(index for e, index in drawn if e == epoch) == list(range(num_samples))


def test_epochs_and_seeds_differ():
    def indices(seed, epoch):
        return [index for _, index in Order(100, 100, seed).batch(epoch)]

    assert len({tuple(indices(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_position_costs_the_same_early_and_late(monkeypatch):
    calls = Counter()
    blake2b = order_module.blake2b

    def counted(*args, **kwargs):
        calls["hashes"] += 1
        return blake2b(*args, **kwargs)

    monkeypatch.setattr(order_module, "blake2b", counted)
    order = Order(6_000_000, 64, seed=0)
    costs = []
    for first in (10, 10_000_000, 1_000_000_000):
        calls.clear()
        order.batch(first // 64)
        costs.append(calls["hashes"])
    assert max(costs) <= 1.1 * min(costs), costs
    assert min(costs) >= 64 * order_module.ROUNDS


def test_what_cannot_be_ordered_is_refused():
    with pytest.raises(ValueError, match="num_samples=0"):
        Order(0, 1, seed=0)
    with pytest.raises(ValueError, match="hold 3"):
        Order(4, 1, seed=0, blocks=[1, 2])
    with pytest.raises(ValueError, match="multiple of the ranks"):
        Order(4, 3, seed=0).batch(0, 0, 2)
    with pytest.raises(ValueError, match="at least 1 element"):
        Permutation(0)
