"""The order of samples: a function of (seed, epoch, position) alone, asked at any position for the same small price.

So ranks and workers see parts of one sequence, and to resume is to ask for a later position.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b, shake_128
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


class Blocks(tuple[int, ...]):
    """The rows of every block (row group of parquet, shard) in the order of their indices, and how many blocks whoever
    reads them keeps open, `window`. Without blocks the order is free.
    """

    window: int

    def __new__(cls, sizes: Iterable[int] = (), window: int = 1) -> "Blocks":
        blocks = super().__new__(cls, sizes)
        blocks.window = window
        return blocks


class BlockPermutation(Sequence[int]):
    """A permutation for files that are read forwards, block by block (row groups of parquet).

    The blocks are permuted and dealt out into windows of up to `window` blocks, as even as can be. The blocks of a
    window are merged: which block the next row is of is random, every interleaving equally likely, while the rows of a
    block keep their order. So whoever keeps `window` blocks open reads every block once, forwards.

    What it costs is O(blocks) time and memory at the start, O(rows of a window) when a window is first touched, and
    O(log blocks) an element; the last two windows are kept.

    Args:
        sizes: rows of every block, in the order of their indices; blocks without rows take no part.
        key: integers and texts that name the permutation.

    Raises:
        ValueError: window is below 1, a size below 0, or there are no rows.
    """

    def __init__(self, sizes: Sequence[int], window: int, *key: int | str) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64)
        if window < 1 or not self._sizes.sum() or self._sizes.min() < 0:
            raise ValueError(f"window={window}, {len(sizes)} blocks: both must be at least 1, with rows, none negative")
        self._key = key
        self._starts = np.cumsum(self._sizes) - self._sizes
        blocks = np.flatnonzero(self._sizes)
        blocks = blocks[_shuffled(len(blocks), *key, "blocks")]
        self._windows = np.array_split(blocks, -(-len(blocks) // window))
        self._ends = np.cumsum([self._sizes[blocks].sum() for blocks in self._windows])
        self._merged = lru_cache(maxsize=2)(self._merge)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of a permutation of {len(self)}")
        number = int(np.searchsorted(self._ends, position, side="right"))
        begin = int(self._ends[number - 1]) if number else 0
        return int(self._merged(number)[position - begin])

    def _merge(self, number: int) -> np.ndarray:
        """The indices of window `number` in the order in which they are read, (rows of the window,) int64."""
        blocks = self._windows[number]
        sizes, starts = self._sizes[blocks], self._starts[blocks]
        of_block = np.repeat(np.arange(len(blocks)), sizes)[_shuffled(int(sizes.sum()), *self._key, "rows", number)]
        indices = np.empty(len(of_block), dtype=np.int64)
        # The places of a block's rows, in rising order, one block after the other: its rows go there in file order.
        indices[np.argsort(of_block, kind="stable")] = np.concatenate(
            [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        )
        return indices


def _shuffled(n: int, *key: int | str) -> np.ndarray:
    """0 .. n-1 in a random order, written out: they are sorted by the bits that SHAKE128 (FIPS 202) makes of the key.

    Hash and stable sort are defined to the bit, so it is the same with any version of numpy and on any machine.
    """
    bits = shake_128(json.dumps(key).encode()).digest(8 * n)
    return np.argsort(np.frombuffer(bits, dtype="<u8"), kind="stable")


def epochs(
    num_samples: int, blocks: Sequence[int], window: int, *key: int | str
) -> Callable[[int], Permutation | BlockPermutation]:
    """The permutation of every epoch, asked for by its number: by block if there are blocks, else free.

    Raises:
        ValueError: see `Order`.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: must be at least 1")
    if window < 1:
        raise ValueError(f"window={window}: must be at least 1")
    if len(blocks) and sum(blocks) != num_samples:
        raise ValueError(f"num_samples={num_samples}, but the {len(blocks)} blocks hold {sum(blocks)}")
    if len(blocks) and isinstance(blocks, Blocks) and blocks.window < window:
        raise ValueError(f"window={window}, but the corpus keeps {blocks.window} blocks open: open it with this window")

    @lru_cache(maxsize=2)
    def permutation(epoch: int) -> Permutation | BlockPermutation:
        if len(blocks):
            return BlockPermutation(blocks, window, *key, epoch)
        return Permutation(num_samples, *key, epoch)

    return permutation


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
        blocks: rows of the blocks in which the samples lie, if they are read by block, e.g. `FluxReason.blocks`; see
            `BlockPermutation`.
        window: how many blocks are mixed with each other.

    Raises:
        ValueError: without samples, with blocks that hold another number of samples, or with a window of more blocks
            than their reader keeps open (`Blocks.window`).
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, *, blocks: Sequence[int] = (), window: int = 1
    ) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"num_samples={num_samples}, batch_size={batch_size}: both must be at least 1")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._epoch = epochs(num_samples, blocks, window, "order", seed)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """The (epoch, index) pairs of a rank at step `step`, counted from 0; costs the same at any step."""
        return [self.at(position) for position in positions(step, self.batch_size, rank, world)]

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, index) of a sample's position over all epochs."""
        epoch, offset = divmod(position, self.num_samples)
        return epoch, self._epoch(epoch)[offset]
