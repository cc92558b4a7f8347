"""The order of samples: a function of (seed, epoch, position) alone, asked at any position for the same small price.

So ranks and workers see parts of one sequence, and to resume is to ask for a later position.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from math import isqrt

import numpy as np

# Four make a large Feistel network a strong pseudo-random permutation (Luby and Rackoff, 1988); of five or seven
# elements, where the halves are 3 x 2 and 3 x 3, six still leave a bias that 20,000 draws show, and eight do not.
ROUNDS = 8


class Permutation(Sequence[int]):
    """A pseudo-random permutation of 0 .. n-1 that is never written out: O(1) time an element, O(1) memory.

    A Feistel network on Z_a x Z_b with a, b near sqrt(n) and a b >= n: every round adds a hash of one half to the
    other, which can be undone. What lands at n or beyond goes through again (cycle walking: a b - n < a, so rarely).

    Args:
        key: integers and texts that name the permutation, say ("order", seed, epoch).

    Raises:
        ValueError: n is below 1.
    """

    def __init__(self, n: int, *key: int | str) -> None:
        if n < 1:
            raise ValueError(f"n={n}: a permutation has at least 1 element")
        self.n = n
        self._a = isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._key = blake2b(json.dumps(key).encode(), digest_size=16).digest()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.n:
            raise IndexError(f"position {position} of a permutation of {self.n}")
        index = self._step(position)
        while index >= self.n:
            index = self._step(index)
        return index

    def _step(self, index: int) -> int:
        left, right = divmod(index, self._b)
        for number in range(0, ROUNDS, 2):
            left = (left + self._hash(number, right)) % self._a
            right = (right + self._hash(number + 1, left)) % self._b
        return left * self._b + right

    def _hash(self, number: int, value: int) -> int:
        return int.from_bytes(blake2b(b"%d/%d" % (number, value), digest_size=8, key=self._key).digest(), "little")


class BlockPermutation(Sequence[int]):
    """A permutation for files that are read by block (row groups of parquet, shards): blocks first, then rows.

    The blocks are permuted; each `window` of them that then stand together is permuted row by row. Whoever keeps
    `window` blocks open reads every block once. O(blocks) memory and start, O(log blocks) an element.

    Args:
        sizes: rows of every block, in the order of their indices.
    """

    def __init__(self, sizes: Sequence[int], window: int, *key: int | str) -> None:
        if window < 1 or not len(sizes) or min(sizes) < 0:
            raise ValueError(f"window={window}, {len(sizes)} blocks: both must be at least 1, and no size negative")
        self._window, self._key = window, key
        starts = np.fromiter(accumulate(sizes, initial=0), np.int64, len(sizes) + 1)
        blocks = np.fromiter(Permutation(len(sizes), *key, "blocks"), np.int64, len(sizes))
        self._starts = starts[blocks]  # of every permuted block: its first index
        self._ends = np.cumsum(np.asarray(sizes, dtype=np.int64)[blocks])  # and where its rows end after permuting

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of a permutation of {len(self)}")
        first = int(np.searchsorted(self._ends, position, side="right")) // self._window * self._window
        begin = self._begin(first)
        end = int(self._ends[min(first + self._window, len(self._ends)) - 1])
        row = begin + Permutation(end - begin, *self._key, "rows", first)[position - begin]
        block = int(np.searchsorted(self._ends, row, side="right"))
        return int(self._starts[block]) + row - self._begin(block)

    def _begin(self, block: int) -> int:
        return int(self._ends[block - 1]) if block else 0


def positions(step: int, batch_size: int, rank: int = 0, world: int = 1) -> range:
    """The positions of global batch `step` (from 0) that rank `rank` of `world` takes; the ranks' parts, one after the
    other, are the batch.

    Raises:
        ValueError: the batch cannot be shared out equally, or there is no such rank.
    """
    if batch_size < 1 or world < 1 or batch_size % world or not 0 <= rank < world:
        raise ValueError(f"batch_size={batch_size}, rank={rank}, world={world}: the batch is a multiple of the ranks")
    share = batch_size // world
    first = step * batch_size + rank * share
    return range(first, first + share)


class Order:
    """Batches of indices over endless epochs; a batch may reach over the end of an epoch, no sample is left out.

    Args:
        batch_size: of the global batch, all ranks together.
        blocks: sizes of the blocks in which the samples lie, if they are read by block; see `BlockPermutation`.
        window: how many blocks are mixed with each other.

    Raises:
        ValueError: without samples, or with blocks that hold another number of samples.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, *, blocks: Sequence[int] = (), window: int = 1
    ) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"num_samples={num_samples}, batch_size={batch_size}: both must be at least 1")
        if len(blocks) and sum(blocks) != num_samples:
            raise ValueError(f"num_samples={num_samples}, but the {len(blocks)} blocks hold {sum(blocks)}")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._blocks, self._window = blocks, window
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """The (epoch, index) pairs of a rank at step `step`, counted from 0; costs the same at any step."""
        return [self.at(position) for position in positions(step, self.batch_size, rank, world)]

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, index) of a sample's position over all epochs."""
        epoch, offset = divmod(position, self.num_samples)
        return epoch, self._epoch(epoch)[offset]

    def _permutation(self, epoch: int) -> Sequence[int]:
        if len(self._blocks):
            return BlockPermutation(self._blocks, self._window, "order", self.seed, epoch)
        return Permutation(self.num_samples, "order", self.seed, epoch)
