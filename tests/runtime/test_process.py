"""One owner of a folder, and an end in order at SIGTERM, of one process and of several ranks."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clvr_train.runtime.distributed import World, start
from clvr_train.runtime.process import Deferral, own_folder
from recipes._recipe import _terminate
from tests.runtime.forks import ended, fork


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"no {files}"
        time.sleep(0.005)


def test_a_second_owner_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    def own() -> None:
        own_folder(tmp_path)
        own_folder(tmp_path)  # again, by the same process: nothing
        (tmp_path / "owned").touch()
        time.sleep(60)

    first = fork(own)
    wait_for(tmp_path / "owned")
    with pytest.raises(BlockingIOError, match=f"in use by pid {first} on {socket.gethostname()}; wait for its end"):
        own_folder(tmp_path)
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    assert ended(fork(lambda: own_folder(tmp_path))) == 0, "the folder of a killed run is free"
    assert (tmp_path / ".lock").read_text().startswith("pid ")


def test_sigterm_waits_until_it_is_delivered() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with Deferral() as sigterm:
            assert not sigterm.asked()
            sigterm.deliver()
            signal.raise_signal(signal.SIGTERM)
            assert sigterm.asked() and sigterm.asked() and not heard
            sigterm.deliver()
            assert heard == [signal.SIGTERM]
        with Deferral():
            signal.raise_signal(signal.SIGTERM)
        assert len(heard) == 2, "delivered at the end of the block"
        with pytest.raises(ValueError, match="own error"), Deferral():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("own error")
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_that_comes_while_the_ranks_ask_counts_at_the_next_time() -> None:
    """Or this rank would save alone."""

    class Slow(World):
        def gather(self, value: bool) -> list[bool]:
            signal.raise_signal(signal.SIGTERM)
            return [value]

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Deferral(Slow()) as sigterm:
            assert not sigterm.asked() and sigterm.pending
            assert sigterm.asked()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def ranks(tmp_path: Path):
    """ranks(work) -> ids of two processes that run `work(world)` as recipes do."""
    children: list[int] = []

    def begin(work: Callable[[World], None]) -> list[int]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]

        def run(rank: int) -> None:
            signal.signal(signal.SIGTERM, _terminate)
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            with start(timeout_s=20) as world:
                work(world)

        children.extend(fork(lambda rank=rank: run(rank)) for rank in range(2))
        wait_for(tmp_path / "begun-0", tmp_path / "begun-1")
        return children

    return begin


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_sigterm_at_any_rank_ends_all_after_the_same_step(tmp_path: Path, ranks, asked: tuple[int, ...]) -> None:
    def work(world: World) -> None:
        with Deferral(world) as sigterm:
            for step in range(100_000):
                ending = sigterm.asked()
                if ending:
                    (tmp_path / f"saved-{world.rank}").write_text(str(step))
                    sigterm.deliver()
                (tmp_path / f"begun-{world.rank}").touch()

    children = ranks(work)
    for rank in asked:
        os.kill(children[rank], signal.SIGTERM)
    assert [ended(child) for child in children] == [143, 143]
    assert (tmp_path / "saved-0").read_text() == (tmp_path / "saved-1").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_at_one_rank_where_they_do_not_ask_ends_all(tmp_path: Path, ranks, asked: int) -> None:
    """One reads data, say, and the other already waits for it in a collective."""

    def work(world: World) -> None:
        (tmp_path / f"begun-{world.rank}").touch()
        if world.rank == asked:
            time.sleep(60)
        world.barrier()

    children = ranks(work)
    start_s = time.monotonic()
    os.kill(children[asked], signal.SIGTERM)
    assert [ended(child) for child in children] == [143, 143]
    assert time.monotonic() - start_s < 20
