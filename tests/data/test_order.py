"""The order is a permutation an epoch, the same for any number of ranks, and as cheap at ten million as at ten."""

from collections import Counter
from itertools import combinations
from math import factorial, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clvr_train.data import order as order_module
from clvr_train.data.order import BlockPermutation, Blocks, Order, Permutation

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


def of_blocks(sizes, indices):
    """The block of every index."""
    return np.repeat(np.arange(len(sizes)), sizes)[list(indices)].tolist()


@given(SIZES, st.integers(1, 4), st.integers(0, 3))
def test_blocks_are_read_forwards_one_window_after_the_other(sizes, window, epoch):
    indices = list(BlockPermutation(sizes, window, "test", epoch))
    assert sorted(indices) == list(range(sum(sizes)))
    visited = of_blocks(sizes, indices)
    for block in set(visited):
        rows = [index for index, other in zip(indices, visited, strict=True) if other == block]
        assert rows == sorted(rows), "its rows keep their order"
    blocks = list(dict.fromkeys(visited))  # by first appearance
    parts = np.array_split(blocks, -(-len(blocks) // window))
    for part in parts:  # a window is finished before the next begins
        rows, visited = visited[: sum(sizes[b] for b in part)], visited[sum(sizes[b] for b in part) :]
        assert set(rows) == set(part.tolist()) and len(part) <= window
    assert not visited and max(map(len, parts)) - min(map(len, parts)) <= 1


@given(SIZES, st.integers(1, 4), st.randoms(use_true_random=False))
def test_an_element_of_a_block_permutation_depends_on_its_position_alone(sizes, window, random):
    indices = list(BlockPermutation(sizes, window, "test", 1))
    asked = [random.randrange(len(indices)) for _ in range(20)]
    again = BlockPermutation(tuple(sizes), window, "test", 1)
    assert [again[position] for position in asked] == [indices[position] for position in asked]
    for position in (-1, len(indices)):
        with pytest.raises(IndexError):
            again[position]


def test_block_permutations_stay_what_they_were():
    """Of a run that is resumed with another version of Python or numpy."""
    assert list(BlockPermutation([3, 0, 4, 2, 5], 2, "order", 7, 0)) == [9, 10, 11, 0, 1, 12, 13, 2, 3, 7, 4, 5, 6, 8]


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3], [3, 1, 2]])
def test_every_interleaving_of_a_window_comes_equally_often(sizes):
    """Chi-square over all of them: 6, 4 and 60; a draw is a window of an epoch."""
    draws = 6000
    seen = Counter(
        tuple(of_blocks(sizes, BlockPermutation(sizes, len(sizes), "test", epoch))) for epoch in range(draws)
    )
    kinds = factorial(sum(sizes)) // prod(map(factorial, sizes))
    assert len(seen) == kinds
    chi = sum((count - draws / kinds) ** 2 / (draws / kinds) for count in seen.values())
    assert abs(chi - (kinds - 1)) < 4.5 * (2 * (kinds - 1)) ** 0.5


def test_the_rows_of_a_block_are_spread_over_its_window():
    size, window = 250, 8
    places = {}
    for epoch in (0, 1):
        visited = np.array(of_blocks([size] * 24, BlockPermutation([size] * 24, window, "test", epoch)))
        places[epoch] = visited
        for part in visited.reshape(3, window * size):
            for block in set(part.tolist()):
                found = (np.flatnonzero(part == block) + 0.5) / len(part)
                furthest = np.abs(found - (np.arange(size) + 0.5) / size).max()
                assert furthest < 1.95 / size**0.5, "Kolmogorov and Smirnov against an even spread, p = 0.001"
            neighbours = np.mean(part[1:] == part[:-1])
            assert abs(neighbours - 1 / window) < 4.5 * (window * size * 8) ** -0.5, "as often as by chance"
    assert abs(np.mean(places[0] == places[1]) - 1 / 24) < 0.05, "another epoch, another interleaving"


def test_blocks_stand_anywhere_and_with_any_others():
    """Of 16 blocks in windows of 4: each is in every window a quarter of the epochs, with any other a fifth of them."""
    together, windows, draws = Counter(), Counter(), 600
    for epoch in range(draws):
        visited = of_blocks([2] * 16, BlockPermutation([2] * 16, 4, "test", epoch))
        for number in range(4):
            blocks = sorted(set(visited[8 * number : 8 * number + 8]))
            together.update(combinations(blocks, 2))
            windows.update((number, block) for block in blocks)
    assert len(windows) == 64 and all(abs(n - draws / 4) < 4.5 * (draws * 3 / 16) ** 0.5 for n in windows.values())
    assert len(together) == 120 and all(abs(n - draws / 5) < 4.5 * (draws * 4 / 25) ** 0.5 for n in together.values())


def test_a_window_is_merged_once_when_it_is_first_touched():
    permutation = BlockPermutation([1000] * 6000, 10, "order", 0, 0)
    assert sorted(permutation[5_900_000 + n] for n in range(10_000)) != list(range(10_000))
    assert permutation._merged.cache_info().misses == 1
    assert [permutation[position] for position in (10_000, 9_999, 10_000, 9_998)] and len(permutation) == 6_000_000
    assert permutation._merged.cache_info().misses == 3


@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 2, 8]), st.integers(0, 30), st.booleans())
def test_ranks_together_see_the_sequence_of_one(num_samples, share, world, step, by_block):
    blocks = [num_samples // 3, num_samples - num_samples // 3] if by_block else ()
    order = Order(num_samples, share * 8, seed=1, blocks=blocks, window=2)
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
    with pytest.raises(ValueError, match="window=0: must be at least 1"):
        Order(3, 1, seed=0, blocks=[1, 2], window=0)
    for sizes, window in (([], 1), ([0, 0], 1), ([3, -1], 1), ([1], 0)):
        with pytest.raises(ValueError, match=f"window={window}, {len(sizes)} blocks: "):
            BlockPermutation(sizes, window)
    with pytest.raises(ValueError, match="window=3, but the corpus keeps 2 blocks open"):
        Order(3, 1, seed=0, blocks=Blocks([1, 2], window=2), window=3)
    with pytest.raises(ValueError, match="multiple of the ranks"):
        Order(4, 3, seed=0).batch(0, 0, 2)
    with pytest.raises(ValueError, match="at least 1 element"):
        Permutation(0)
