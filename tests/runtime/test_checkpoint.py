"""What a checkpoint promises: what was saved comes back bit for bit, or the damage is named."""

import errno
import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clvr_train.runtime import checkpoint
from clvr_train.runtime.checkpoint import (
    DTYPES,
    CheckpointError,
    Saver,
    load_latest,
)
from tests.runtime.forks import fork_ranks


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((4, 3), float(step)), "rng": torch.arange(16, dtype=torch.uint8) + step}


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int = 1) -> None:
    with Saver(folder, keep, asynchronous=False) as saver:
        saver.save(step, tensors.items(), state)


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_empty, Path.unlink])
@pytest.mark.parametrize("name", ["tensors-0.safetensors", "state.json", "manifest.json"])
def test_damage_is_named_and_the_step_before_is_taken(tmp_path: Path, caplog, name: str, damage) -> None:
    save(tmp_path, 1, weights(1), {"step": 1})
    save(tmp_path, 2, weights(2), {"step": 2}, keep=2)
    damage(tmp_path / "step-2" / name)
    step, tensors, _ = load_latest(tmp_path)
    assert step == 1 and torch.equal(tensors["w"], weights(1)["w"])
    assert f"step-2/{name}" in caplog.text

    shutil.rmtree(tmp_path / "step-1")
    with pytest.raises(CheckpointError, match=f"step-2/{name}.*remove"):
        load_latest(tmp_path)


def test_a_save_after_a_fallback_outlives_the_damaged_newer_step(tmp_path: Path) -> None:
    save(tmp_path, 1, weights(1), {})
    save(tmp_path, 9, weights(9), {}, keep=2)
    damage_flip(tmp_path / "step-9" / "tensors-0.safetensors")
    save(tmp_path, 2, weights(2), {})
    assert load_latest(tmp_path)[0] == 2
    assert not (tmp_path / "step-9").exists()


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    (tmp_path / "step-3.tmp").mkdir()
    assert load_latest(tmp_path) is None


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {"best": float("inf"), "seen": 2**60, "third": 1 / 3, "names": ["a", None, True]}
    save(tmp_path, 2, weights(2), state)
    assert load_latest(tmp_path)[2] == state


def test_views_and_ties_are_written_one_by_one(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": base, "tied": base, "row": base[1], "turned": base.T}
    save(tmp_path, 0, tensors, {})
    _, loaded, _ = load_latest(tmp_path)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("state", [{"t": (1, 2)}, {"d": {1: 2}}, {"x": float("nan")}])
def test_state_that_json_would_change_is_refused_before_writing(tmp_path: Path, state: dict) -> None:
    with pytest.raises(CheckpointError, match="survive JSON"):
        save(tmp_path / "c", 1, weights(1), state)
    assert not (tmp_path / "c").exists()


def test_a_full_disk_is_explained_and_costs_nothing(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1, weights(1), {})

    def full(path: Path, chunks: Iterable[bytes]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(CheckpointError, match="disk full: a checkpoint needs 64 bytes"):
        save(tmp_path, 2, weights(2), {})
    assert load_latest(tmp_path)[0] == 1


def test_a_manifest_with_a_foreign_shape_is_damage_not_a_crash(tmp_path: Path) -> None:
    save(tmp_path, 1, weights(1), {})
    for content in ([], {"files": []}, {"files": {"tensors-0.safetensors": 3}}):
        (tmp_path / "step-1" / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="manifest.json"):
            load_latest(tmp_path)


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """The library reads all types and shapes as they were, and ours are found in a file that it wrote."""
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "a name with é": torch.ones(1)}
    with Saver(tmp_path, asynchronous=False) as saver:
        saver.save(1, tensors.items(), {})
    ours = load_file(tmp_path / "step-1" / "tensors-0.safetensors")
    save_file(tensors, tmp_path / "theirs.safetensors")
    theirs = checkpoint.Tensors([tmp_path / "theirs.safetensors"])
    assert set(ours) == set(theirs) == set(tensors) and len(theirs) == len(tensors)
    for name, tensor in tensors.items():
        for read in (ours[name], theirs[name]):
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_large_tensors_are_written_in_pieces(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK", 24)
    with Saver(tmp_path) as saver:
        saver.save(1, {"a": torch.arange(100), "b": torch.rand(7, 3).T}.items(), {})
        saver.wait()
        assert torch.equal(saver.load()[1]["a"], torch.arange(100))


def test_an_asynchronous_save_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    """Training changes its tensors in place meanwhile; sizes change; the next save waits for the one under way."""
    value = torch.zeros(1000)
    with Saver(tmp_path, keep=9) as saver:
        saver.reserve([("w", value.to("meta")), ("s", torch.zeros(7)), ("never saved", torch.zeros(2))])
        for step in range(5):
            saver.save(step, {"w": value, "s": torch.tensor(step), "grows": torch.zeros(step)}.items(), {"step": step})
            value += 1
    for step in reversed(range(5)):
        found, tensors, state = load_latest(tmp_path)
        assert set(tensors) == {"w", "s", "grows"}
        assert found == state["step"] == tensors["s"] == step and tensors["grows"].shape == (step,)
        assert torch.equal(tensors["w"], torch.full((1000,), float(step)))
        shutil.rmtree(tmp_path / f"step-{step}")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tensors_are_asked_for_one_by_one_in_the_thread_of_the_caller(tmp_path: Path, asynchronous: bool) -> None:
    """So a gathered parameter can go before the next is gathered, and gathering may use the training's collectives."""

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        whole = torch.empty(4)
        for number in range(3):
            assert threading.current_thread() is threading.main_thread()
            yield f"w{number}", whole.fill_(number).clone()

    with Saver(tmp_path, asynchronous=asynchronous) as saver:
        saver.save(1, gather(), {})
    _, tensors, _ = load_latest(tmp_path)
    assert [tensors[f"w{number}"][0].item() for number in range(3)] == [0, 1, 2]


def test_an_asynchronous_save_stalls_the_caller_for_a_fifth_of_a_save_at_most(tmp_path: Path, monkeypatch) -> None:
    """On a disk that takes 0.4 s for a file; the wait of the save after it is what is left of the first."""
    real = checkpoint.write_synced
    monkeypatch.setattr(checkpoint, "write_synced", lambda *arguments: (time.sleep(0.4), real(*arguments))[1])

    def seconds(action) -> float:
        start = time.monotonic()
        action()
        return time.monotonic() - start

    with Saver(tmp_path / "a", asynchronous=False) as saver:
        blocking = seconds(lambda: saver.save(1, weights(1).items(), {}))
    with Saver(tmp_path / "b") as saver:
        stall = seconds(lambda: saver.save(1, weights(1).items(), {}))
        waited = seconds(saver.wait)
    assert blocking > 1.2 and stall <= 0.2 * blocking, (blocking, stall)
    assert waited > 1.0 and load_latest(tmp_path / "b")[0] == 1


@pytest.mark.parametrize("then", ["save", "wait", "end"])
def test_an_error_of_the_thread_reaches_the_caller(tmp_path: Path, monkeypatch, then: str) -> None:
    def full(path: Path, chunks: Iterable[bytes]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="disk full"), Saver(tmp_path) as saver:
        saver.save(1, weights(1).items(), {})
        saver.wait()
        monkeypatch.setattr(checkpoint, "write_synced", full)
        saver.save(2, weights(2).items(), {})
        if then == "save":
            saver.save(3, weights(3).items(), {})
        elif then == "wait":
            saver.wait()
    assert load_latest(tmp_path)[0] == 1 and not list(tmp_path.glob("*.tmp"))


def saved_by_two(folder: Path, step: int, asynchronous: bool = True) -> list:
    def work(rank: int) -> None:
        with Saver(folder, asynchronous=asynchronous) as saver:
            saver.save(step, [(f"w{rank}", torch.full((3,), float(step + rank)))], {"step": step, "rank": rank})

    return fork_ranks(2, work)


def read_by(world: int, folder: Path) -> list:
    def work(rank: int) -> list | None:
        with Saver(folder) as saver:
            step, tensors, state = saver.load()
            return [step, {name: tensor.tolist() for name, tensor in tensors.items()}, state]

    return fork_ranks(world, work)


def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path) -> None:
    assert saved_by_two(tmp_path, 1) == [(0, None)] * 2
    both = {"w0": [1.0] * 3, "w1": [2.0] * 3}
    assert read_by(1, tmp_path) == [(0, [1, both, {"step": 1, "rank": 0}])]
    assert read_by(2, tmp_path) == [(0, [1, both, {"step": 1, "rank": 0}])] * 2
    save(tmp_path, 2, {"w0": torch.zeros(1)}, {})
    assert read_by(3, tmp_path) == [(0, [2, {"w0": [0.0]}, {}])] * 3


def test_ranks_agree_on_the_newest_step_that_is_whole(tmp_path: Path, capfd) -> None:
    """Each verifies some of the files; what one finds damaged is damaged for all."""
    for step in (1, 2):
        saved_by_two(tmp_path, step)
    for name in ("tensors-1.safetensors", "tensors-0.safetensors", "state.json"):
        content = (tmp_path / "step-2" / name).read_bytes()
        damage_flip(tmp_path / "step-2" / name)
        assert [(status, read[0]) for status, read in read_by(2, tmp_path)] == [(0, 1)] * 2
        (tmp_path / "step-2" / name).write_bytes(content)
    assert [read[0] for _, read in read_by(2, tmp_path)] == [2, 2]
    damage_flip(tmp_path / "step-1" / "tensors-1.safetensors")
    damage_flip(tmp_path / "step-2" / "tensors-1.safetensors")
    assert [status for status, _ in read_by(2, tmp_path)] == [1, 1]
    assert capfd.readouterr().err.count("step-2/tensors-1.safetensors: sha256") >= 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_cannot_write_is_an_error_on_all(tmp_path: Path, monkeypatch, capfd, asynchronous: bool) -> None:
    saved_by_two(tmp_path, 1)
    real = checkpoint.write_synced

    def refuse(path: Path, chunks: Iterable[bytes]) -> dict:
        if path.name == "tensors-1.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, chunks)

    monkeypatch.setattr(checkpoint, "write_synced", refuse)
    assert [status for status, _ in saved_by_two(tmp_path, 2, asynchronous)] == [1, 1]
    text = capfd.readouterr().err
    assert "CheckpointError: rank 1 has failed: [Errno 13] Permission denied" in text
    assert "\nPermissionError: [Errno 13]" in text
    assert load_latest(tmp_path)[0] == 1 and not list(tmp_path.glob("*.tmp"))


def test_ranks_that_do_not_share_the_folder_are_told(tmp_path: Path, capfd) -> None:
    save(tmp_path / "0", 4, weights(4), {})

    def work(rank: int) -> None:
        Saver(tmp_path / str(rank)).load()

    assert [status for status, _ in fork_ranks(2, work)] == [1, 1]
    assert "ranks see different steps (step-4, none): all nodes must share it" in capfd.readouterr().err


def test_two_ranks_that_own_the_same_tensor_are_told(tmp_path: Path, capfd) -> None:
    def work(rank: int) -> None:
        with Saver(tmp_path) as saver:
            saver.save(1, weights(1).items(), {})

    assert [status for status, _ in fork_ranks(2, work)] == [1, 1]
    assert capfd.readouterr().err.count("tensors-1.safetensors: rng: two ranks have written it") >= 2
    assert load_latest(tmp_path) is None


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    save(tmp_path, 1, weights(1), {})
    manifest = tmp_path / "step-1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("tensors-0", "../tensors-0"))
    with pytest.raises(CheckpointError, match="names '../tensors-0.safetensors', which is no file"):
        load_latest(tmp_path)
