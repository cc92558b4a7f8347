"""SIGKILL at every change of the disk that a save makes, in every way to save: what is left can be resumed."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from clvr_train.runtime.checkpoint import Saver, load_latest
from tests.runtime.forks import ended, fork, fork_ranks, strike_at

NAMES = ("model.w", "optimizer.w.exp_avg", "rng.0.torch")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch) -> None:
    """What is synced is counted as a moment; only a power cut would show the difference."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def weights(step: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((4, 3), float(step + number)) for number, name in enumerate(NAMES)}


def save(folder: Path, step: int, asynchronous: bool, rank: int = 0, world: int = 1, moment: int = 0) -> None:
    """Saves the part of a rank, and is killed at a moment of it."""
    with Saver(folder, keep=1, asynchronous=asynchronous) as saver:
        strike_at(moment)
        saver.save(step, list(weights(step).items())[rank::world], {"step": step})


def assert_resumable(folder: Path, before: int, after: int) -> int:
    """The step that a resumed run starts from; it is whole, and its next save leaves nothing but itself."""
    step, tensors, state = load_latest(folder)
    assert step in (before, after) and state == {"step": step}
    assert set(tensors) == set(NAMES) and all(torch.equal(tensors[name], weights(step)[name]) for name in NAMES)
    with Saver(folder, keep=1) as saver:
        saver.save(step + 1, weights(step + 1).items(), {"step": step + 1})
    assert sorted(path.name for path in folder.iterdir()) == ["latest", f"step-{step + 1}"]
    assert load_latest(folder)[0] == step + 1
    return step


@pytest.mark.parametrize("before", [1, 2], ids=["next step", "the same step again"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "asynchronous"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_step(tmp_path: Path, asynchronous: bool, before: int) -> None:
    moment, status, steps = 0, -signal.SIGKILL, []
    while status == -signal.SIGKILL:
        moment += 1
        folder = tmp_path / str(moment)
        with Saver(folder, keep=1, asynchronous=False) as saver:
            saver.save(before, weights(before).items(), {"step": before})
        status = ended(fork(lambda folder=folder, moment=moment: save(folder, 2, asynchronous, moment=moment)))
        steps.append(assert_resumable(folder, before, 2))
    assert status == 0 and moment > 40, "too few moments to mean anything"
    assert set(steps) == {before, 2} and steps == sorted(steps)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "asynchronous"])
def test_a_kill_of_one_of_two_ranks(tmp_path: Path, asynchronous: bool, victim: int) -> None:
    """The other rank ends too, by an error; what is left can be resumed by one."""
    moment, killed, steps = 0, True, []
    fork_ranks(2, lambda rank: save(tmp_path / "first", 1, False, rank, 2))
    while killed:
        moment += 1
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "first", folder)

        def work(rank: int, folder: Path = folder, moment: int = moment) -> None:
            save(folder, 2, asynchronous, rank, 2, moment if rank == victim else 0)

        statuses = [status for status, _ in fork_ranks(2, work)]
        killed = statuses[victim] == -signal.SIGKILL
        assert statuses[1 - victim] == (1 if killed else 0)
        steps.append(assert_resumable(folder, 1, 2))
    assert moment > (40 if victim == 0 else 6), "too few moments to mean anything"
    assert set(steps) == {1, 2} and steps == sorted(steps)
