"""Processes that another one started end when that one is told to."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from selftrain_d2.engine import children
from selftrain_d2.engine.children import children_stopped


def _signal_soon(number):
    """To this process alone, as `kill` does."""
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()


def _hear_nothing(signals):
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    time.sleep(60)


@pytest.fixture
def start(monkeypatch):
    """``start(*signals)``: a process that ignores these."""
    monkeypatch.setattr(children, "REQUESTS", tuple((request, 0.5) for request, _ in children.REQUESTS))
    fork = multiprocessing.get_context("fork")

    def start(*signals):
        process = fork.Process(target=_hear_nothing, args=(signals,))
        process.start()
        return process

    return start


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
@pytest.mark.parametrize("ignored", [(), (signal.SIGINT, signal.SIGTERM)])
def test_none_outlives_its_parent(start, number, raised, ignored):
    other = start()  # from before
    try:
        with pytest.raises(raised) as error, children_stopped():
            inside = [start(*ignored), start(*ignored)]
            _signal_soon(number)
            time.sleep(30)
        assert not any(child.is_alive() for child in inside) and other.is_alive()
        assert raised is KeyboardInterrupt or error.value.code == 128 + signal.SIGTERM
    finally:
        other.kill()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_error_stops_them_and_success_does_not(start):
    with children_stopped():
        child = start()
    assert child.is_alive()
    child.kill()
    with pytest.raises(ValueError, match="mistake"), children_stopped():
        child = start()
        raise ValueError("mistake")
    assert not child.is_alive()


def test_another_handler_stays(monkeypatch):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with children_stopped():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [1]
