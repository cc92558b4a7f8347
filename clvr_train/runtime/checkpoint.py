"""Checkpoints that a kill at any moment leaves resumable: tensors in safetensors, state in JSON, no pickle.

On disk: `<folder>/step-<n>/{tensors.safetensors, state.json, manifest.json}` and a file `latest` for people.
A step is written as `step-<n>.tmp`, synced, and renamed; what came before goes only after. The manifest (size
and SHA-256 of each file) says whether a step is whole: safetensors does not notice a flipped bit in its data.
"""

import errno
import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clvr_train.runtime.files import publish_folder, sync, write_atomic

TENSORS, STATE, MANIFEST, POINTER = "tensors.safetensors", "state.json", "manifest.json", "latest"
OPTIMIZER = "optimizer."
_STEP = re.compile(r"step-(\d+)(\.old)?")

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or is not whole; the message names the file."""


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 1
) -> Path:
    """Save a step, then remove the steps that it replaces; returns its folder.

    Args:
        tensors: any dtypes, written as they are; tensors that share memory are written one by one.
        state: what JSON gives back unchanged: numbers, texts, booleans, None, lists, dicts with text keys.
        keep: how many steps stay, this one included. Steps after this one belong to a line that a resume has
            abandoned and always go.

    Raises:
        CheckpointError: `state` would not survive JSON, or the disk is full; the step before is then intact.
    """
    text = json.dumps(state)
    if json.loads(text) != state:
        raise CheckpointError(
            f"{folder}: state of step {step} would not survive JSON (tuples, integer keys or NaN)"
        )
    folder = Path(folder)
    staging, final = folder / f"step-{step}.tmp", folder / f"step-{step}"
    if staging.exists():
        shutil.rmtree(staging)
    try:
        staging.mkdir(parents=True)
        save_file(_separate(tensors), staging / TENSORS)
        (staging / STATE).write_text(text, encoding="utf-8")
        manifest = {"step": step, "files": {name: _fingerprint(staging / name) for name in (TENSORS, STATE)}}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        publish_folder(staging, final)
        write_atomic(folder / POINTER, f"step-{step}\n")
    except (OSError, SafetensorError) as error:
        _explain(error, folder, tensors)
        raise
    _prune(folder, step, keep)
    return final


def load_latest(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest step that is whole, as (step, tensors on the CPU, state); `None` if nothing was ever saved.

    A damaged newest step is reported in the log and the one before it is taken.

    Raises:
        CheckpointError: there are steps and none is whole; names the damage of the newest.
    """
    damaged: list[CheckpointError] = []
    for step, path in _steps(Path(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("%s; trying the step before it", error)
            damaged.append(error)
            continue
        return step, load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))
    if damaged:
        raise CheckpointError(f"{damaged[0]}; no other step is whole: remove {folder} to start anew")
    return None


def verify(path: Path) -> None:
    """Check one step's folder against its manifest.

    Raises:
        CheckpointError: a file is missing, of another size or of other content; names it.
    """
    manifest = path / MANIFEST
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (files[name]["bytes"], files[name]["sha256"]) for name in (TENSORS, STATE)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest}: missing or damaged ({type(error).__name__}: {error})") from error
    for name, (size, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, expected {size}")
        actual = _fingerprint(file)["sha256"]
        if actual != sha256:
            raise CheckpointError(f"{file}: sha256 {actual[:12]}, expected {sha256[:12]}")


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser as (tensors named `optimizer.<parameter>.<name>`, JSON state), for `save_checkpoint`.

    Raises:
        CheckpointError: a value is neither a tensor nor of JSON.
    """
    full = optimizer.state_dict()
    tensors, values = {}, {}
    for number, entries in full["state"].items():
        for name, value in entries.items():
            target = tensors if isinstance(value, Tensor) else values
            target[f"{OPTIMIZER}{number}.{name}"] = value
    try:
        state = json.loads(json.dumps({"groups": full["param_groups"], "values": values}))
    except TypeError as error:
        raise CheckpointError(f"{type(optimizer).__name__}: {error}") from error
    return tensors, state


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """The inverse of `flatten_optimizer`; all tensors of a checkpoint may be passed, others are left alone.

    Raises:
        CheckpointError: the checkpoint was made for other parameters.
    """
    current = optimizer.state_dict()["param_groups"]
    saved = [dict(group) for group in state["groups"]]
    if [group["params"] for group in saved] != [group["params"] for group in current]:
        counts = [len(group["params"]) for group in saved], [len(group["params"]) for group in current]
        raise CheckpointError(
            f"optimizer: parameters a group {counts[0]} in the checkpoint, {counts[1]} in the run"
        )
    for group, now in zip(saved, current, strict=True):
        # JSON knows no tuples, and an optimiser may compare its betas with one.
        group.update({name: tuple(group[name]) for name, value in now.items() if isinstance(value, tuple)})
    entries: dict[int, dict[str, Any]] = {}
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(OPTIMIZER)}
    for key, value in (own | state["values"]).items():
        number, name = key.removeprefix(OPTIMIZER).split(".", 1)
        entries.setdefault(int(number), {})[name] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in entries.items():
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if name in moments and moments[name].shape != parameters[number].shape:
                shapes = tuple(moments[name].shape), tuple(parameters[number].shape)
                raise CheckpointError(
                    f"{OPTIMIZER}{number}.{name}: shape {shapes[0]} for a parameter of {shapes[1]}"
                )
    optimizer.load_state_dict({"state": entries, "param_groups": saved})


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them; copies only where needed."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        address = value.untyped_storage().data_ptr()
        if address in seen or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        seen.add(address)
        result[name] = value
    return result


def _fingerprint(path: Path) -> dict[str, Any]:
    sync(path)
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Published steps, newest first; of one step, the new folder before the `.old` one it replaces."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _prune(folder: Path, step: int, keep: int) -> None:
    steps = _steps(folder)
    kept = [path for number, path in steps if number <= step][:keep]
    for _, path in steps:
        if path not in kept:
            shutil.rmtree(path)
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)


def _explain(error: Exception, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Turn a full disk into an error that says how much was needed; other errors say enough by themselves."""
    number = error.errno if isinstance(error, OSError) else None
    full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        free = shutil.disk_usage(folder).free
        raise CheckpointError(
            f"{folder}: disk full: a checkpoint needs {needed:,} bytes, {free:,} are free; the last is intact"
        ) from error
