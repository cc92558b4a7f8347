"""What the loop is given: the order's sequence for any number of workers and ranks, and exactly its tail on resume."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from clvr_train.data.images import target_pixels
from clvr_train.data.loader import Mapped, read_ahead
from clvr_train.data.order import Order
from clvr_train.data.refusals import Refusals
from clvr_train.method.trajectory import Sample

ROOT = Path(__file__).resolve().parents[2]


def sample(number: int, image: object = None) -> Sample:
    return Sample(f"t{number}", 1, "goal", ("r",), (), image)


def number_of(sample: Sample) -> int:
    if sample.trajectory_id == "t3":
        raise ValueError("a.jsonl:3: images[1]: no\nsuch file")
    return int(sample.trajectory_id[1:])


def tail(samples, order, first, last, prepare, **options):
    return list(read_ahead(Mapped(samples, prepare), (order.batch(step) for step in range(first, last)), **options))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_sequence_and_resume_its_tail(tmp_path, workers):
    samples = []
    for number in range(10):
        Image.new("RGB", (70 + number, 64), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
        samples.append(sample(number, tmp_path / f"{number}.png"))
    order = Order(10, 4, seed=0)
    read = tail(samples, order, 2, 8, partial(target_pixels_of, size_px=(64, 64)), workers=workers)
    assert [[drawn for drawn, _ in batch] for batch in read] == [order.batch(step) for step in range(2, 8)]
    for (_, index), made in (pair for batch in read for pair in batch):
        assert made.shape == (3, 64, 64) and made.equal(target_pixels(samples[index].target, (64, 64)))


def target_pixels_of(sample: Sample, size_px):
    return target_pixels(sample.target, size_px)


@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_come_out_of_a_worker_as_they_went_in(workers):
    pictures = [Image.effect_noise((65, 33), 90).convert(mode) for mode in ("RGB", "L", "RGBA", "RGB")]
    read = tail(pictures, Order(4, 4, seed=0), 0, 1, prepare=Image.Image.copy, workers=workers)
    for (_, index), made in read[0]:
        assert made.mode == pictures[index].mode and made.tobytes() == pictures[index].tobytes()


def test_what_a_function_makes_is_a_sequence():
    made = Mapped(range(5), str)
    assert list(made) == ["0", "1", "2", "3", "4"] and len(made) == 5 and made[-1] == "4" and made[1:3] == ["1", "2"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_left_out_within_a_share(workers, caplog):
    samples, order = [sample(number) for number in range(10)], Order(10, 5, seed=0)
    with pytest.raises(ValueError, match=r"^a.jsonl:3: images\[1\]: no such file$"):
        tail(samples, order, 0, 2, prepare=number_of, workers=workers)
    refusals = Refusals("a.jsonl", 0.1)
    read = tail(samples, order, 0, 4, prepare=number_of, workers=workers, refusals=refusals)
    assert sorted(made for batch in read for _, made in batch) == sorted(2 * [0, 1, 2, 4, 5, 6, 7, 8, 9])
    assert all(index == made for batch in read for (_, index), made in batch)
    assert (refusals.refused, refusals.records) == (2, 20), "once every time that it is drawn"
    assert len([record for record in caplog.records if "no such file" in record.message]) == 2


def test_a_resumed_reading_is_held_to_the_same_share():
    """However often it is broken off: one more than the share of what is read since ends it."""
    samples = [sample(number) for number in range(2000)]

    def every_fifth(one: Sample) -> int:
        number = int(one.trajectory_id[1:])
        if number % 5 == 0:
            raise ValueError(f"{number} is bad")
        return number

    order = Order(2000, 10, seed=0)
    for first in (0, 60, 1000):
        for share, fits in ((0.3, True), (0.1, False)):
            refusals = Refusals("data", share)
            batches = (order.batch(step) for step in range(first, first + 200))
            read = read_ahead(Mapped(samples, every_fifth), batches, refusals=refusals)
            if fits:
                assert sum(map(len, read)) == 2000 - refusals.refused
            else:
                with pytest.raises(ValueError, match="of 1000 records refused"):
                    list(read)


def test_bugs_are_no_refusals():
    with pytest.raises(ZeroDivisionError):
        tail([sample(0)], Order(1, 1, seed=0), 0, 1, prepare=lambda sample: 1 / 0, refusals=Refusals("data", 0.9))


RANK = """
import json, sys
import torch
import torch.distributed as dist
from clvr_train.data.loader import Mapped, read_ahead
from clvr_train.data.order import Order

rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
order = Order(13, 6, seed=5)
batches = (order.batch(step, rank, dist.get_world_size()) for step in range(3, 9))
seen = []
for batch in read_ahead(Mapped(range(13), (10).__mul__), batches, workers=1):
    mine = torch.tensor([[epoch, index, made] for (epoch, index), made in batch])
    parts = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(parts, mine)
    seen.append(torch.cat(parts).tolist())
dist.destroy_process_group()
sys.stdout.write(json.dumps(seen))
"""


def test_two_processes_see_together_the_sequence_of_one(tmp_path):
    command = [sys.executable, "-c", RANK]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], cwd=ROOT, env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    order = Order(13, 6, seed=5)
    expected = [[[epoch, index, 10 * index] for epoch, index in order.batch(step)] for step in range(3, 9)]
    assert [json.loads(out) for out, _ in outputs] == [expected, expected]
