"""Batches of one shape: samples of the same target size and the same reference sizes need no padding."""

from collections.abc import Hashable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import log, sqrt

import numpy as np

from clvr_train.data.order import Permutation, positions

Size = tuple[int, int]  # (height, width) in pixels

# Table 8 of Fine-T2I (arXiv 2602.09439), which gives width and height; every side is a multiple of 16.
FINE_T2I_SIZES_PX: tuple[Size, ...] = (
    *((512, 512), (768, 768), (1024, 1024), (1536, 1536), (2048, 2048), (2560, 2560)),  # 1:1
    *((1536, 2048), (768, 1024), (1200, 1600)),  # 4:3
    *((768, 1152), (1024, 1536)),  # 3:2
    *((720, 1280), (1152, 2048), (1440, 2560)),  # 16:9
    *((1024, 1280), (1536, 1920)),  # 5:4
    *((1024, 768), (1600, 1200), (2048, 1536)),  # 3:4
    *((1152, 768), (1536, 1024)),  # 2:3
    *((1280, 720), (2048, 1152), (2560, 1440)),  # 9:16
    *((1280, 1024), (1920, 1536)),  # 4:5
)


def sizes_of_area(side_px: int, multiple: int = 16, sizes: Sequence[Size] = FINE_T2I_SIZES_PX) -> tuple[Size, ...]:
    """The aspect ratios of `sizes` at about side_px x side_px pixels, both sides rounded to `multiple`."""
    aspects = dict.fromkeys(height / width for height, width in sizes)
    heights = [(side_px * sqrt(aspect), side_px / sqrt(aspect)) for aspect in aspects]
    return tuple(tuple(max(1, round(side / multiple)) * multiple for side in pair) for pair in heights)


def nearest_bucket(size_px: Size, sizes: Sequence[Size] = FINE_T2I_SIZES_PX) -> Size:
    """The size to which an image of `size_px` is brought: the nearest aspect ratio (by its logarithm), in it the
    largest size that the image covers, or the smallest if it covers none (the only case of enlarging).

    Raises:
        ValueError: a side is below 1, or there are no sizes.
    """
    height, width = size_px
    if height < 1 or width < 1 or not sizes:
        raise ValueError(f"size {size_px} px, {len(sizes)} buckets: sides and buckets must be at least 1")
    aspects = dict.fromkeys(Fraction(*size) for size in sizes)
    nearest = min(aspects, key=lambda aspect: abs(log(height / width) - log(aspect)))
    fitting = [size for size in sizes if Fraction(*size) == nearest]
    covered = [size for size in fitting if size[0] <= height and size[1] <= width]
    return max(covered) if covered else min(fitting)


def number_buckets(keys: Iterable[Hashable]) -> tuple[np.ndarray, list[Hashable]]:
    """The number of every sample's bucket (int64), by first appearance, and the keys by number.

    A key is all that a batch shares, say (target size, sizes of the references in order).
    """
    numbers: dict[Hashable, int] = {}
    found = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64)
    return found, list(numbers)


class BucketBatches:
    """Batches of samples of one bucket over endless epochs: the counterpart of `data.order.Order` for micro-batches.

    In an epoch every sample comes once: each bucket is permuted and cut into batches, and the batches are permuted. The
    last batch of a bucket may be short (`short_share` says how many are); nothing is padded or left out. A batch costs
    the same at any number; memory is 8 bytes a sample.

    Args:
        bucket_of: the number of every sample's bucket, see `number_buckets`.

    Raises:
        ValueError: without samples.
    """

    def __init__(self, bucket_of: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        if not len(bucket_of) or batch_size < 1:
            raise ValueError(f"num_samples={len(bucket_of)}, batch_size={batch_size}: both must be at least 1")
        self.batch_size, self.seed = batch_size, seed
        numbers = np.asarray(bucket_of)
        _, sizes = np.unique(numbers, return_counts=True)
        self._members = np.argsort(numbers, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._last = np.cumsum(-(-sizes // batch_size))  # after the last batch of every bucket
        self.per_epoch = int(self._last[-1])
        self.short_share = float(np.count_nonzero(sizes % batch_size) / self.per_epoch)
        self._permutation = lru_cache(maxsize=2 * len(sizes) + 2)(self._permuted)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """The (epoch, index) pairs of the micro-batch of a rank at step `step`, counted from 0: number `step * world +
        rank` of the one sequence.
        """
        (number,) = positions(step, world, rank, world)
        epoch, offset = divmod(number, self.per_epoch)
        place = self._permutation(epoch, -1)[offset]
        bucket = int(np.searchsorted(self._last, place, side="right"))
        first = (place - (int(self._last[bucket - 1]) if bucket else 0)) * self.batch_size
        rows = self._permutation(epoch, bucket)
        start = int(self._starts[bucket])
        return [
            (epoch, int(self._members[start + rows[row]]))
            for row in range(first, min(first + self.batch_size, len(rows)))
        ]

    def _permuted(self, epoch: int, bucket: int) -> Permutation:
        """The rows of a bucket, or the batches of the epoch for bucket -1."""
        size = int(self._starts[bucket + 1] - self._starts[bucket]) if bucket >= 0 else self.per_epoch
        return Permutation(size, "buckets", self.seed, epoch, bucket)
