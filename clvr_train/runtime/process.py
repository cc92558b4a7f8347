"""What a run needs of its process: a folder that no other run writes to, and an end in order when asked to end."""

import errno
import fcntl
import logging
import os
import signal
import socket
from pathlib import Path
from types import FrameType, TracebackType

from clvr_train.runtime.distributed import World

logger = logging.getLogger(__name__)

LOCK = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_owned: set[Path] = set()  # their descriptors stay open: a lock is lost when its file is closed


def own_folder(folder: Path) -> None:
    """Makes this process the owner of a folder until it ends, however it ends; `<folder>/.lock` says who that is.

    The lock is one of POSIX, of the process alone: its children have no part in it. Where the file system has none, it
    is said and nothing is locked.

    Raises:
        BlockingIOError: another process owns it; with its pid and host.
    """
    path = (folder / LOCK).resolve()
    if path in _owned:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
        os.close(descriptor)
        if error.errno in _HELD:
            raise BlockingIOError(f"{folder}: in use by {owner}; wait for its end, or choose another run=...") from None
        logger.warning("%s: no lock (%s): another run in this folder would not be noticed", folder, error.strerror)
        return
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    _owned.add(path)


class Deferral:
    """Within the block SIGTERM waits until the loop has saved. All ranks of `world` ask once a step:

        ended = sigterm.asked()
        if ended or ...:
            engine.save(saver, step)
        if ended:
            saver.wait()
            sigterm.deliver()

    `pending` says whether it has come to this process. It goes to the handler that was there before; if it is still
    pending at the end of the block, there, unless an exception ends it.
    """

    def __init__(self, world: World | None = None) -> None:
        self.pending = False
        self._world = world or World()

    def __enter__(self) -> "Deferral":
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            self.asked()  # so that all end here if one does
        signal.signal(signal.SIGTERM, self._before)
        if kind is None:
            self.deliver()

    def asked(self) -> bool:
        """Whether SIGTERM has come, to whatever rank: one answer for all, which ask at the same time.

        One that comes while they ask counts at the next time: a rank must not end alone.
        """
        asked = any(self._world.gather(self.pending))
        if asked:
            self.pending = self._world.ending = True
        return asked

    def deliver(self) -> None:
        """Hands a pending signal on; returns if there is none."""
        if self.pending:
            self.pending = False
            signal.signal(signal.SIGTERM, self._before)
            signal.raise_signal(signal.SIGTERM)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.pending = True
        logger.info("terminated: finishing and saving the step at hand")
