"""Writing that a kill at any moment cannot leave half done."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def sync(path: Path) -> None:
    """Push a file or a folder's entries to disk: a rename may outlive a power cut, its content not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Write a file and push it to disk; returns its fingerprint, `{"bytes": ..., "sha256": ...}`, of what was meant.

    Large chunks are written and hashed without Python's lock, so that another thread can go on meanwhile.
    """
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that its readers see the old content or the new, never a part.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; the old content is then intact.
    """
    staging = path.with_name(path.name + ".tmp")
    write_synced(staging, [content.encode() if isinstance(content, str) else content])
    os.replace(staging, path)
    sync(path.parent)


def publish_folder(staging: Path, final: Path) -> None:
    """Give a finished folder its final name; an old one goes only once the new one is in place.

    A kill between the two renames leaves the old folder as `<final>.old`; the next call clears it away.

    Raises:
        FileNotFoundError: there is no folder `staging`.
    """
    for path in staging.rglob("*"):
        sync(path)
    sync(staging)
    old = final.with_name(final.name + ".old")
    if final.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(final, old)
    os.rename(staging, final)
    sync(final.parent)
    if old.exists():
        shutil.rmtree(old)
