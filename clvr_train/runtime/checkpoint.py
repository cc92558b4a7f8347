"""Checkpoints that a kill at any moment leaves resumable: tensors in safetensors, state in JSON, no pickle.

On disk: `<folder>/step-<n>/{tensors-<rank>.safetensors, state.json, manifest.json}` and a file `latest` for people.
Every rank writes the tensors that it owns to a file of its own. A step is written as `step-<n>.tmp`, synced, and
renamed once all ranks are done; what came before goes only after. The manifest (size and SHA-256 of each file) says
whether a step is whole: safetensors does not notice a flipped bit in its data. Tensors are found by name in whatever
file they are, so that the number of ranks that reads need not be the number that wrote.
"""

import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed import ProcessGroup

from clvr_train.runtime.files import publish_folder, write_atomic, write_synced

STATE, MANIFEST, POINTER = "state.json", "manifest.json", "latest"
CHUNK = 1 << 24  # bytes handed to the disk at once
DTYPES = {  # as safetensors calls them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_STEP = re.compile(r"step-(\d+)(\.old)?")
_FILE = re.compile(r"tensors-\d+\.safetensors|state\.json")

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or is not whole; the message names the file."""


class Saver:
    """Saves and reads the steps of a training in a folder that all ranks share; use it as a context manager.

    All ranks build it at the same moment and call `save` and `load` together: where there are several it makes a gloo
    group of its own, which never meets the training's collectives. Its end waits for the save that is under way.

    Args:
        keep: how many steps stay, the newest included: with two, a step that the disk has damaged is not the last.
        asynchronous: `save` returns once the tensors are copied to the CPU, and a thread writes. The copies stay
            allocated between saves (page-locked, if they come from a GPU).
    """

    def __init__(self, folder: Path, keep: int = 2, asynchronous: bool = True) -> None:
        self._folder, self._keep = Path(folder), keep
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._under_way: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}

    def save(self, step: int, tensors: Iterable[tuple[str, Tensor]], state: dict[str, Any]) -> None:
        """Saves a step, after the save before it; an error of that one is raised here.

        Args:
            tensors: names with the tensors that this rank owns, any dtypes, written as they are. They may be made one
                by one: each is copied to the CPU before the next is asked for.
            state: what JSON gives back unchanged: numbers, texts, booleans, None, lists, dicts with text keys. That
                of rank 0 is written.

        Raises:
            CheckpointError: `state` would not survive JSON, the disk is full, or another rank has failed; the step
                before is then intact.
        """
        self.wait()
        text = _as_json(self._folder, step, state)
        if self._writer is None:
            copies = {name: tensor.detach().cpu() for name, tensor in tensors}
            _write(self._folder, step, copies, text, self._keep, self._group)
            return
        self._copies = _copied(tensors, self._copies)
        self._under_way = self._writer.submit(
            _write, self._folder, step, self._copies, text, self._keep, self._group
        )

    def reserve(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Makes the memory for copies of such tensors ahead of the first save, in the thread: fresh memory costs more
        than the copy. Values are not read: `meta` tensors will do, and any may be left out.
        """
        if self._writer is not None:
            self.wait()
            self._under_way = self._writer.submit(self._make, [(name, t.shape, t.dtype) for name, t in tensors])

    def _make(self, wanted: list[tuple[str, torch.Size, torch.dtype]]) -> None:
        pinned = torch.cuda.is_available()
        for name, shape, dtype in wanted:
            self._copies[name] = torch.empty(shape, dtype=dtype, pin_memory=pinned).zero_()  # empty() touches nothing

    def wait(self) -> None:
        """Returns once nothing is under way; raises what the last save has raised."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def load(self, newest: int | None = None) -> tuple[int, Mapping[str, Tensor], dict[str, Any]] | None:
        """As `load_latest`, with the work of verifying shared among the ranks; all take the same step."""
        return load_latest(self._folder, self._group, newest)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()


class Tensors(Mapping[str, Tensor]):
    """The tensors of a step by name, on the CPU, each read from disk when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._file_of: dict[str, Any] = {}
        for path in files:
            opened = safe_open(path, framework="pt")
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                if name in self._file_of:
                    raise CheckpointError(f"{path}: {name}: two ranks have written it")
                self._file_of[name] = opened

    def __getitem__(self, name: str) -> Tensor:
        # A copy: the tensor of the file is a view of it, and another rank may remove the file.
        return self._file_of[name].get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def load_latest(
    folder: Path, group: ProcessGroup | None = None, newest: int | None = None
) -> tuple[int, Mapping[str, Tensor], dict[str, Any]] | None:
    """The newest step that is whole, none after `newest`, as (step, its tensors, state); `None` if there is none.

    A damaged newest step is reported in the log and the one before it is taken.

    Raises:
        CheckpointError: there are steps and none is whole (names the damage of the newest), or the ranks of `group` do
            not see the same folder.
    """
    damaged: list[CheckpointError] = []
    rank, world = _place(group)
    steps = [(step, path) for step, path in _steps(Path(folder)) if newest is None or step <= newest]
    seen = _exchange(" ".join(path.name for _, path in steps) or "none", group)
    if len(set(seen)) > 1:
        raise CheckpointError(f"{folder}: ranks see different steps ({', '.join(seen)}): all nodes must share it")
    for step, path in steps:
        try:
            with _together(group):
                files = _read_manifest(path)
                for name in sorted(files)[rank::world]:
                    _verify_file(path / name, files[name])
        except CheckpointError as error:
            logger.warning("%s; trying the step before it", error)
            damaged.append(error)
            continue
        tensors = Tensors(path / name for name in sorted(files) if name != STATE)
        return step, tensors, json.loads((path / STATE).read_text(encoding="utf-8"))
    if damaged:
        raise CheckpointError(f"{damaged[0]}; no other step is whole: remove {folder} to start anew")
    return None


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file of a step."""
    manifest = path / MANIFEST
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (files[name]["bytes"], files[name]["sha256"]) for name in [STATE, *files]}
        foreign = [name for name in expected if not _FILE.fullmatch(name)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest}: missing or damaged ({type(error).__name__}: {error})") from error
    if foreign:
        raise CheckpointError(f"{manifest}: names {foreign[0]!r}, which is no file of a checkpoint")
    return expected


def _verify_file(file: Path, expected: tuple[int, str]) -> None:
    size, sha256 = expected
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    if file.stat().st_size != size:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes, expected {size}")
    with file.open("rb") as content:
        actual = hashlib.file_digest(content, "sha256").hexdigest()
    if actual != sha256:
        raise CheckpointError(f"{file}: sha256 {actual[:12]}, expected {sha256[:12]}")


def _as_json(folder: Path, step: int, state: dict[str, Any]) -> str:
    text = json.dumps(state)
    if json.loads(text) != state:
        raise CheckpointError(f"{folder}: state of step {step} would not survive JSON (tuples, integer keys or NaN)")
    return text


def _copied(tensors: Iterable[tuple[str, Tensor]], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, in the memory of `buffers` where it fits: fresh memory costs more than the copy."""
    copies = {}
    for name, tensor in tensors:
        buffer = buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copies


def _write(
    folder: Path, step: int, tensors: dict[str, Tensor], state: str, keep: int, group: ProcessGroup | None
) -> None:
    """Writes and publishes a step together with the other ranks, then removes the steps that it replaces.

    Steps after this one belong to a line that a resume has abandoned and always go.
    """
    rank, _ = _place(group)
    staging = folder / f"step-{step}.tmp"
    try:
        with _together(group):
            if rank == 0:
                if staging.exists():
                    shutil.rmtree(staging)
                staging.mkdir(parents=True)
        with _together(group):
            mine = write_synced(staging / f"tensors-{rank}.safetensors", _safetensors(tensors))
        prints = _exchange(json.dumps(mine), group)
        with _together(group):
            if rank == 0:
                files = {f"tensors-{number}.safetensors": json.loads(text) for number, text in enumerate(prints)}
                Tensors(staging / name for name in files)  # refuses a tensor that two ranks have written
                files[STATE] = write_synced(staging / STATE, [state.encode()])
                manifest = json.dumps({"step": step, "files": files}, indent=1)
                write_synced(staging / MANIFEST, [manifest.encode()])
                publish_folder(staging, folder / f"step-{step}")
                write_atomic(folder / POINTER, f"step-{step}\n")
                _prune(folder, step, keep)
    except (OSError, CheckpointError) as error:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
            raise CheckpointError(
                f"{folder}: disk full: a checkpoint needs {needed:,} bytes, {free:,} are free; the last is intact"
            ) from error
        raise


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, in pieces.

    Not by the library's writer, which writes all at once: here the hash is taken on the way and no copy is made.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        content = memoryview(flat)  # type: ignore[arg-type]  # numpy types it from Python 3.12 on
        for start in range(0, len(content), CHUNK):
            yield content[start : start + CHUNK]


def _place(group: ProcessGroup | None) -> tuple[int, int]:
    return (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)


def _exchange(text: str, group: ProcessGroup | None) -> list[str]:
    """Every rank's text in the order of the ranks, cut to 500 bytes."""
    if group is None:
        return [text]
    word = torch.tensor(list(text.encode()[:500].ljust(500)), dtype=torch.uint8)
    words = [torch.empty_like(word) for _ in range(dist.get_world_size(group))]
    dist.all_gather(words, word, group=group)
    return [bytes(word.tolist()).decode(errors="replace").rstrip() for word in words]


@contextmanager
def _together(group: ProcessGroup | None) -> Iterator[None]:
    """What is done within ends only when all ranks have done it, and is an error on all if it is one on any."""
    failure = None
    try:
        yield
    except (OSError, CheckpointError) as error:
        failure = error
    failures = _exchange(str(failure or ""), group)
    if failure is not None:
        raise failure
    for rank, text in enumerate(failures):
        if text:
            raise CheckpointError(f"rank {rank} has failed: {text}")


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
