"""A rank that is killed, frozen or fails is named by the others, which end in time."""

import os
import signal
import socket
import sys
import time

import pytest

from clvr_train.runtime.distributed import start
from tests.runtime.forks import ended, fork

TIMEOUT_S = 2.0
PHASE = "step 7: backward"


def rank_of(place, folder):
    """Waits for the others again and again, until a file says how it is to end."""
    sys.stderr = (folder / f"stderr-{place['RANK']}").open("w")
    os.environ.update(place)
    with start("cpu", timeout_s=TIMEOUT_S) as world:
        world.phase = PHASE
        began = time.monotonic()
        while not any(world.gather((folder / "finish").exists())):
            if world.rank == 1 and (folder / "raise").exists():
                raise ValueError("no such thing")
            if time.monotonic() - began > TIMEOUT_S:  # its phase has been seen
                (folder / place["RANK"]).touch()
            time.sleep(0.01)
        time.sleep(world.rank * TIMEOUT_S / 2)  # what the others do not wait for


@pytest.fixture
def ranks(tmp_path):
    """ranks(number) -> processes that are a world and have met."""
    started = []

    def begin(number: int) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(number):
            place = {"RANK": rank, "WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            place = {key: str(value) for key, value in place.items()}
            started.append(fork(lambda place=place: rank_of(place, tmp_path)))
        deadline = time.monotonic() + 60
        while not all((tmp_path / str(rank)).exists() for rank in range(number)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return started

    yield begin


def said(folder, rank):
    return (folder / f"stderr-{rank}").read_text().rstrip()


@pytest.mark.parametrize(("number", "sent", "lost"), [(3, signal.SIGKILL, 1), (2, signal.SIGSTOP, 1)])
def test_a_rank_that_is_killed_or_frozen_is_named_with_its_phase(ranks, tmp_path, number, sent, lost):
    """While the others wait for it in a collective, which none of them leaves by itself."""
    processes, since = ranks(number), time.monotonic()
    os.kill(processes[lost], sent)
    for rank in set(range(number)) - {lost}:
        assert ended(processes[rank]) == 1
        assert said(tmp_path, rank).splitlines()[-1].startswith(f"error: [rank {rank}, {PHASE}] ")
        assert f"rank {lost} was killed or is frozen: silent for" in said(tmp_path, rank)
        assert said(tmp_path, rank).endswith(f"last seen while {PHASE}")
    assert time.monotonic() - since < 3 * TIMEOUT_S
    os.kill(processes[lost], signal.SIGKILL)
    ended(processes[lost])


def test_the_first_rank_may_be_frozen_with_the_store_in_it(ranks, tmp_path):
    """Without torchrun, whose own process keeps the store."""
    processes, since = ranks(2), time.monotonic()
    os.kill(processes[0], signal.SIGSTOP)
    assert ended(processes[1]) == 1 and "rank 0, or torchrun, is frozen" in said(tmp_path, 1)
    assert time.monotonic() - since < 3 * TIMEOUT_S
    os.kill(processes[0], signal.SIGKILL)
    ended(processes[0])


def test_a_rank_that_fails_is_named_with_its_error(ranks, tmp_path):
    processes = ranks(2)
    (tmp_path / "raise").touch()
    assert [ended(process) for process in processes] == [1, 1]
    assert f"rank 1 has failed while {PHASE}: ValueError: no such thing" in said(tmp_path, 0)


def test_ranks_that_end_one_after_the_other_accuse_nobody(ranks, tmp_path):
    processes = ranks(2)
    (tmp_path / "finish").touch()
    assert [ended(process) for process in processes] == [0, 0]
    assert said(tmp_path, 0) == said(tmp_path, 1) == ""
