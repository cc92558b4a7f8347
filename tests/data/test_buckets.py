"""Every sample once an epoch, in batches of one bucket: nothing padded, short batches counted; sizes by aspect."""

from collections import Counter
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clvr_train.data.buckets import (
    FINE_T2I_SIZES_PX,
    BucketBatches,
    nearest_bucket,
    number_buckets,
    sizes_of_area,
)

BUCKETS = st.lists(st.integers(0, 4), min_size=1, max_size=40)
SIDES = st.integers(64, 6000)


@given(BUCKETS, st.integers(1, 6), st.sampled_from([1, 2, 8]), st.integers(0, 2))
def test_an_epoch_has_every_sample_once_in_batches_of_one_bucket(bucket_of, batch_size, world, seed):
    batches = BucketBatches(bucket_of, batch_size, seed)
    drawn = [batches.batch(step, rank, world) for step in range(batches.per_epoch) for rank in range(world)]
    assert drawn == [batches.batch(number) for number in range(world * batches.per_epoch)], "one sequence for all"
    for epoch in range(world):
        part = drawn[epoch * batches.per_epoch : (epoch + 1) * batches.per_epoch]
        assert {e for batch in part for e, _ in batch} == {epoch}
        assert sorted(index for batch in part for _, index in batch) == list(range(len(bucket_of)))
        assert all(len({bucket_of[index] for _, index in batch}) == 1 for batch in part), "so none is padded"
        short = [batch for batch in part if len(batch) < batch_size]
        assert len(short) == pytest.approx(batches.short_share * batches.per_epoch)
        assert len(short) == sum(count % batch_size > 0 for count in Counter(bucket_of).values())


def test_batches_and_their_samples_change_from_epoch_to_epoch():
    batches = BucketBatches([0] * 40 + [1] * 40, 4, seed=0)
    epochs = [[batches.batch(e * batches.per_epoch + i) for i in range(batches.per_epoch)] for e in range(2)]
    buckets = [[batch[0][1] // 40 for batch in epoch] for epoch in epochs]
    assert buckets[0] != buckets[1] and all(sum(epoch) == 10 for epoch in buckets)
    assert len({frozenset(index for _, index in batch) for epoch in epochs for batch in epoch}) == 40


def test_a_batch_far_off_is_reached_at_once():
    batches = BucketBatches([index % 7 for index in range(100_000)], 8, seed=0)
    ((epoch, _), *_) = far = batches.batch(10**9)
    assert epoch == 10**9 // batches.per_epoch and len({index % 7 for _, index in far}) == 1


def test_keys_are_numbered_by_first_appearance():
    keys = [((512, 512), ()), ((512, 512), ((64, 64),)), ((512, 512), ())]
    numbers, names = number_buckets(keys)
    assert numbers.tolist() == [0, 1, 0] and names == keys[:2]
    with pytest.raises(ValueError, match="num_samples=0"):
        BucketBatches(number_buckets([])[0], 4, seed=0)


def test_the_default_sizes_are_those_of_the_table():
    assert len(set(FINE_T2I_SIZES_PX)) == 26
    assert all(side % 16 == 0 for size in FINE_T2I_SIZES_PX for side in size)
    assert {size[::-1] for size in FINE_T2I_SIZES_PX} == set(FINE_T2I_SIZES_PX), "portrait mirrors landscape"
    assert len({height / width for height, width in FINE_T2I_SIZES_PX}) == 9
    assert all(nearest_bucket(size) == size for size in FINE_T2I_SIZES_PX)


@given(SIDES, SIDES)
def test_an_image_gets_the_nearest_aspect_and_is_enlarged_only_if_it_must_be(height, width):
    bucket = nearest_bucket((height, width))
    assert nearest_bucket((width, height)) == bucket[::-1]

    def distance(size):
        return abs(log(size[0] / size[1]) - log(height / width))

    assert distance(bucket) <= min(map(distance, FINE_T2I_SIZES_PX)) + 1e-9
    same = [size for size in FINE_T2I_SIZES_PX if size[0] * bucket[1] == size[1] * bucket[0]]
    covered = [size for size in same if size[0] <= height and size[1] <= width]
    assert bucket == max(covered, default=min(same))


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_the_aspects_at_another_area(side):
    sizes = sizes_of_area(side)
    assert (side, side) in sizes and len(sizes) == 9
    for height, width in sizes:
        assert height % 16 == width % 16 == 0
        assert 0.9 < height * width / side**2 < 1.1
        aspects = [abs(log(height / width) - log(h / w)) for h, w in FINE_T2I_SIZES_PX]
        assert min(aspects) < 0.07, "what rounding to 16 leaves at 256 px"


@pytest.mark.parametrize("size", [(0, 10), (10, -1)])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ValueError, match="at least 1"):
        nearest_bucket(size)
