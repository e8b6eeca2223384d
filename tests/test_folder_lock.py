import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import time

import pytest

from selftrain_d2 import InputError
from selftrain_d2.folder_lock import FolderLock


def _hold(folder, pipe):
    """Holds a folder, forks a child that lives on as a loader worker may, and waits."""
    lock = FolderLock(folder)
    child = os.fork()
    if child:
        pipe.send(child)
    time.sleep(60)
    lock.close()


@pytest.fixture
def holder(tmp_path):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(tmp_path, theirs))
    process.start()
    child = ours.recv()
    yield process
    process.kill()
    process.join()
    os.kill(child, signal.SIGKILL)


def test_the_second_process_is_refused_naming_the_first(tmp_path, holder):
    owner = rf"written by process {holder.pid} on host {socket.gethostname()}: wait .* or stop it"
    for _ in range(2):  # a refused one does not take the name away
        with pytest.raises(InputError, match=owner):
            FolderLock(tmp_path)


def test_a_killed_process_leaves_no_lock_though_its_child_lives(tmp_path, holder):
    holder.kill()
    holder.join()
    FolderLock(tmp_path).close()


def test_one_process_holds_a_folder_once(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(InputError, match=f"process {os.getpid()} "):
        FolderLock(tmp_path)
    lock.close()
    lock.close()
    FolderLock(tmp_path).close()


def test_a_forked_child_does_not_free_the_folder(tmp_path):
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        lock.close()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(InputError, match="being written"):
        FolderLock(tmp_path)


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    FolderLock(tmp_path).close()
    assert "cannot be locked" in caplog.text
