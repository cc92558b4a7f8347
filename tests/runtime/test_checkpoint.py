"""What a checkpoint promises: what was saved comes back bit for bit, or the damage is named."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from clvr_train.runtime import checkpoint
from clvr_train.runtime.checkpoint import (
    CheckpointError,
    flatten_optimizer,
    load_latest,
    restore_optimizer,
    save_checkpoint,
)

# Python announces every change of the file system; these are the moments at which a kill may strike.
MUTATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fsync"}


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((4, 3), float(step)), "rng": torch.arange(16, dtype=torch.uint8) + step}


def killed_save(folder: Path, step: int, moment: int) -> bool:
    """Save in a forked process that dies by SIGKILL before its `moment`-th change of the disk; was it?"""
    child = os.fork()
    if child == 0:
        left = moment

        def strike(event: str, arguments: tuple) -> None:
            nonlocal left
            if event in MUTATIONS:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        real = os.fsync
        os.fsync = lambda descriptor: (sys.audit("fsync"), real(descriptor))
        sys.addaudithook(strike)
        save_checkpoint(folder, step, weights(step), {"step": step})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("again", [False, True], ids=["next step", "the same step again"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_step(tmp_path: Path, again: bool) -> None:
    before, after = (2, 2) if again else (1, 2)
    moment, seen = 1, set()
    while True:
        folder = tmp_path / str(moment)
        save_checkpoint(folder, before, weights(before), {"step": before})
        killed = killed_save(folder, after, moment)
        step, tensors, state = load_latest(folder)
        assert step in (before, after) and state == {"step": step}
        assert all(torch.equal(tensors[name], value) for name, value in weights(step).items())
        seen.add(step)
        # The next save of the resumed run works and leaves nothing behind.
        save_checkpoint(folder, step + 1, weights(step + 1), {"step": step + 1})
        assert sorted(path.name for path in folder.iterdir()) == ["latest", f"step-{step + 1}"]
        if not killed:
            break
        moment += 1
    assert moment > 12, "the fault was injected at too few moments to mean anything"
    assert seen == {before, after}


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
    save_checkpoint(tmp_path, 1, weights(1), {"step": 1})
    save_checkpoint(tmp_path, 2, weights(2), {"step": 2}, keep=2)
    damage(tmp_path / "step-2" / name)
    step, tensors, _ = load_latest(tmp_path)
    assert step == 1 and torch.equal(tensors["w"], weights(1)["w"])
    assert f"step-2/{name}" in caplog.text

    shutil.rmtree(tmp_path / "step-1")
    with pytest.raises(CheckpointError, match=f"step-2/{name}.*remove"):
        load_latest(tmp_path)


def test_a_save_after_a_fallback_outlives_the_damaged_newer_step(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, weights(1), {})
    save_checkpoint(tmp_path, 9, weights(9), {}, keep=2)
    damage_flip(tmp_path / "step-9" / "tensors-0.safetensors")
    save_checkpoint(tmp_path, 2, weights(2), {})
    assert load_latest(tmp_path)[0] == 2
    assert not (tmp_path / "step-9").exists()


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    (tmp_path / "step-3.tmp").mkdir()
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_and_rng_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Three steps in one go equal two steps, a checkpoint, a new process' worth of objects, and the third."""

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            model(torch.randn(8, 5, dtype=dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Linear(5, 3, dtype=dtype)
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
        return model, torch.optim.AdamW(groups, lr=1 / 3, betas=(0.9, 0.95))

    torch.manual_seed(0)
    model, optimizer = build()
    train(model, optimizer, 2)
    moments, state = flatten_optimizer(optimizer)
    tensors = (
        {f"model.{name}": value for name, value in model.state_dict().items()}
        | moments
        | {"rng": torch.get_rng_state()}
    )
    save_checkpoint(
        tmp_path, 2, tensors, {"optimizer": state, "best": float("inf"), "seen": 2**60, "third": 1 / 3}
    )
    train(model, optimizer, 1)

    torch.manual_seed(1)
    other, other_optimizer = build()
    step, tensors, state = load_latest(tmp_path)
    assert (step, state["best"], state["seen"], state["third"]) == (2, float("inf"), 2**60, 1 / 3)
    other.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    restore_optimizer(other_optimizer, tensors, state["optimizer"])
    torch.set_rng_state(tensors["rng"])
    train(other, other_optimizer, 1)
    for name, value in model.state_dict().items():
        assert value.dtype == dtype and torch.equal(value, other.state_dict()[name])
    assert other_optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    flat, other_flat = flatten_optimizer(optimizer), flatten_optimizer(other_optimizer)
    assert flat[1] == other_flat[1] and all(
        torch.equal(flat[0][name], other_flat[0][name]) for name in flat[0]
    )


def test_views_and_ties_are_written_one_by_one(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": base, "tied": base, "row": base[1], "turned": base.T}
    save_checkpoint(tmp_path, 0, tensors, {})
    _, loaded, _ = load_latest(tmp_path)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("state", [{"t": (1, 2)}, {"d": {1: 2}}, {"x": float("nan")}])
def test_state_that_json_would_change_is_refused_before_writing(tmp_path: Path, state: dict) -> None:
    with pytest.raises(CheckpointError, match="survive JSON"):
        save_checkpoint(tmp_path / "c", 1, weights(1), state)
    assert not (tmp_path / "c").exists()


def test_a_full_disk_is_explained_and_costs_nothing(tmp_path: Path, monkeypatch) -> None:
    save_checkpoint(tmp_path, 1, weights(1), {})

    def full(path: Path, chunks: Iterable[bytes]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(CheckpointError, match="disk full: a checkpoint needs 64 bytes"):
        save_checkpoint(tmp_path, 2, weights(2), {})
    assert load_latest(tmp_path)[0] == 1


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    def optimizer(*shapes: tuple[int, ...]) -> torch.optim.Optimizer:
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        sum(parameter.sum() for parameter in parameters).backward()
        made = torch.optim.AdamW(parameters)
        made.step()
        return made

    tensors, state = flatten_optimizer(optimizer((2,), (3,)))
    with pytest.raises(CheckpointError, match="parameters a group"):
        restore_optimizer(optimizer((2,)), tensors, state)
    with pytest.raises(CheckpointError, match="shape"):
        restore_optimizer(optimizer((3,), (2,)), tensors, state)


def test_a_manifest_with_a_foreign_shape_is_damage_not_a_crash(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, weights(1), {})
    for content in ([], {"files": []}, {"files": {"tensors-0.safetensors": 3}}):
        (tmp_path / "step-1" / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="manifest.json"):
            load_latest(tmp_path)
