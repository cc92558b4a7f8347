"""Tensors on disk, found again by what they were made from.

An entry is `<folder>/<ab>/<cd>/<key>.safetensors`, where the key is the SHA-256 of a description of everything that the
tensor depends on and begins with `abcd`. Nothing is ever looked up by a name or a date, so nothing can be stale.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, uint8

logger = logging.getLogger(__name__)

Description = Mapping[str, str | int | list[int] | tuple[int, ...]]
_NAME = "tensor"
_BLOCK_BYTES, _HEADER_BYTES = 4096, 1024  # what a file system gives at least, and what stands before a tensor
_ABANDONED_S = 3600  # no write lasts an hour


def canonical(description: Description) -> str:
    """The description as JSON in which the order of the fields plays no part."""
    return json.dumps(dict(description), sort_keys=True, separators=(",", ":"))


def cache_key(description: Description) -> str:
    """SHA-256 of the description, in hex."""
    return hashlib.sha256(canonical(description).encode()).hexdigest()


def bytes_on_disk(num_bytes: int) -> int:
    """Bytes that an entry takes whose tensor has `num_bytes`."""
    return -(-(num_bytes + _HEADER_BYTES) // _BLOCK_BYTES) * _BLOCK_BYTES


def readable(num_bytes: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


class TensorCache:
    """A folder of tensors that any number of processes read and write at once.

    An entry is written under a name of its own and renamed: a reader sees all of it or none. It carries its description
    and a checksum, so what a power cut or a bad disk left of it is no entry; it is written anew.

    Counters: `hits`, `misses` and `damaged` (misses that found a file).

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._staging = folder / "tmp"
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{folder}: no folder for a cache ({error.strerror})") from error
        self._clear_abandoned()
        self.hits = self.misses = self.damaged = 0

    def path(self, description: Description) -> Path:
        """Where the entry lies, or would."""
        key = cache_key(description)
        return self.folder / key[:2] / key[2:4] / f"{key}.safetensors"

    def has(self, description: Description) -> bool:
        """Whether there is a file for it, which `get` may still find damaged. Costs no reading."""
        return self.path(description).is_file()

    def get(self, description: Description) -> Tensor | None:
        """The tensor that was put under this description, bit for bit, on the CPU; None if there is none.

        A file cut short is known from its header, any other damage from the CRC-32 of its tensor (about 1 GB/s).
        """
        path = self.path(description)
        try:
            tensor = _read(path, canonical(description))
        except FileNotFoundError:
            self.misses += 1
            return None
        except SafetensorError as error:
            logger.warning("%s: damaged (%s); made anew", path, " ".join(str(error).split()))
            self.misses += 1
            self.damaged += 1
            return None
        self.hits += 1
        return tensor

    def put(self, description: Description, tensor: Tensor) -> None:
        """Keeps a tensor.

        There is no fsync, which costs more than most encoders: what a power cut leaves is damaged, and a miss.

        Raises:
            OSError: it cannot be written, say because the disk is full; nothing of it is left then.
        """
        tensor = tensor.detach().cpu().contiguous()
        metadata = {"description": canonical(description), "crc32": _checksum(tensor)}
        data = save({_NAME: tensor}, metadata)
        path = self.path(description)
        staging = self._staging / f"{path.stem}.{uuid4().hex}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staging.write_bytes(data)
            os.replace(staging, path)
        except OSError as error:
            reason = f"{error.strerror}; {self.free_bytes()} bytes are free, the entry has {len(data)}"
            raise OSError(f"{path}: not written ({reason}); free space or choose another folder") from error
        finally:
            staging.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """What is free where the folder lies."""
        return shutil.disk_usage(self.folder).free

    def _clear_abandoned(self) -> None:
        """Removes what a killed process was writing; what another one writes just now is younger."""
        for path in self._staging.iterdir():
            try:
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()
            except FileNotFoundError:
                continue  # another process was first


def _read(path: Path, description: str) -> Tensor:
    """Raises `FileNotFoundError`, or `SafetensorError` for whatever is not the whole entry of the description."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("description") != description:
            raise SafetensorError("the entry of another description")
        tensor = file.get_tensor(_NAME).clone()  # not a map of the file: a process may have 65,530 of them
    if metadata.get("crc32") != _checksum(tensor):
        raise SafetensorError("wrong checksum")
    return tensor


def _checksum(tensor: Tensor) -> str:
    kind = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    return f"{zlib.crc32(tensor.reshape(-1).view(uint8).numpy(), kind):08x}"
