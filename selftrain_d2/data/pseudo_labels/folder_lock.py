"""One writer of a folder at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import weakref
from pathlib import Path

from selftrain_d2.errors import InputError

logger = logging.getLogger(__name__)

#: The locked file in a folder. It stays there: to remove it would let two writers lock two files of that name.
LOCK = ".lock"


class FolderLock:
    """Holds a folder until closed, or until its process ends, however that ends.

    The operating system keeps the lock (``flock``; Linux carries it to other machines over NFS), so a killed
    process leaves none behind. The file's text, host and process, only serves the message to others.
    (Why this is not the package filelock: docs/development.md.)

    Raises:
        InputError: another holds the folder; the message names it.
    """

    def __init__(self, folder: str | os.PathLike):
        self._file = open(Path(folder) / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held open)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
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

    def close(self) -> None:
        """Give the folder free. May be called again."""
        self._file.close()


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _close_inherited() -> None:
    """A forked child (a loader worker) shares its parent's lock, and may outlive it by seconds."""
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_close_inherited)
