"""One writer of a folder at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
import weakref
from pathlib import Path

import torch.distributed as dist

from selftrain_d2.errors import InputError

logger = logging.getLogger(__name__)

#: The locked file in a folder. It stays there: to remove it would let two writers lock two files of that name.
LOCK = ".lock"

# Under torchrun processes are started anew a moment after others ended: of a machine that is gone a file server keeps
# the locks for a while (NFS 4: 90 seconds).
_PATIENCE_IN_TORCHRUN = 120.0
_PAUSE = 0.5

# What a system says when another process has the lock.
_HELD = (errno.EAGAIN, errno.EACCES)


class FolderLock:
    """Holds a folder until closed, or until its process ends, however that ends.

    The operating system keeps the lock (``flock``; Linux carries it to other machines over NFS), so a killed
    process leaves none behind. The file's text, host and process, only serves the message to others.
    (Why this is not the package filelock: docs/development.md.)

    Args:
        patience: seconds to wait for one that holds it; by default 120 in a process of torchrun, else none.

    Raises:
        InputError: another holds the folder; the message names it.
    """

    def __init__(self, folder: str | os.PathLike, patience: float | None = None):
        if patience is None:
            patience = _PATIENCE_IN_TORCHRUN if dist.is_torchelastic_launched() else 0.0
        end = time.monotonic() + patience
        self._file = open(Path(folder) / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held open)
        try:
            self._wait(end)
        except OSError as error:
            if error.errno in _HELD:
                self._file.seek(0)
                owner = self._file.read().strip() or "another process"
                self._file.close()
                raise InputError(
                    f"{folder} is being written by {owner}: wait until that has finished, or stop it first."
                ) from None
            logger.warning(f"{folder} cannot be locked ({error.strerror}): let only one run write to it.")
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
            self._file.flush()
        except OSError:
            self.close()
            raise
        _held.add(self)

    def _wait(self, end: float) -> None:
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in _HELD or time.monotonic() >= end:
                    raise
            time.sleep(_PAUSE)

    def close(self) -> None:
        """Give the folder free. May be called again."""
        self._file.close()


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _close_inherited() -> None:
    """A forked child (a loader worker) shares its parent's lock, and may outlive it by seconds."""
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_close_inherited)
