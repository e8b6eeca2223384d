"""Processes that this one started end with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess

#: How a process is asked to end, and seconds that it then has: it may have had the terminal's Ctrl-C (None) like this
#: one, may ignore SIGINT as what a shell starts in the background does, or wait for other processes and hear nothing.
REQUESTS = ((None, 3.0), (signal.SIGINT, 5.0), (signal.SIGTERM, 5.0))


@contextlib.contextmanager
def children_stopped() -> Iterator[None]:
    """When an exception leaves this context, the processes that were started inside are gone.

    Inside, SIGTERM ends this process by such an exception (SystemExit, status 143), as SIGINT does; unless it has
    another handler than Python's own, or this is not the main thread.
    """
    before = multiprocessing.active_children()
    with _sigterm_raises():
        try:
            yield
        except BaseException:
            _stop([child for child in multiprocessing.active_children() if child not in before])
            raise


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _stop(children: Sequence[BaseProcess]) -> None:
    try:
        for request, seconds in REQUESTS:
            for child in children:
                if request is not None and child.is_alive():
                    os.kill(child.pid, request)
            end = time.monotonic() + seconds
            for child in children:
                child.join(max(0.0, end - time.monotonic()))
    finally:  # also at a second Ctrl-C
        for child in children:
            child.kill()
            child.join()
