"""What the processes of a run tell each other through torch.distributed's store, without a collective.

A collective ends the run when one process comes later than the group's timeout (half an hour): where some may be hours
later than others, they look into the store again and again instead.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from detectron2.utils import comm

from selftrain_d2.errors import InputError

# Between two looks: at first, at most, and so many times what a look takes.
_FIRST_PAUSE, _LONGEST_PAUSE, _PAUSE_RATIO = 0.05, 2.0, 10
# That others have to hear of a mistake before the process ends that may hold the store.
_TELL_SECONDS = 10.0

_numbers = itertools.count()


def shared_store() -> dist.Store:
    """A part of the process group's store that is empty; without a group one of this process alone.

    All processes must call this in the same order: then they have the same part.
    """
    if comm.get_world_size() == 1:
        return dist.HashStore()
    return dist.PrefixStore(f"selftrain_d2/{next(_numbers)}", dist.distributed_c10d._get_default_store())


def wait_until(condition: Callable[[], bool], seconds: float = float("inf")) -> bool:
    """Look again and again, at least once, until a condition holds or the time is over; whether it holds."""
    pause, end = _FIRST_PAUSE, time.monotonic() + seconds
    while True:
        start = time.monotonic()
        if condition():
            return True
        now = time.monotonic()
        if now >= end:
            return False
        pause = min(1.5 * pause, _LONGEST_PAUSE)
        time.sleep(min(max(pause, _PAUSE_RATIO * (now - start)), end - now))


def wait_for_all(store: dist.Store, key: str, seconds: float = float("inf")) -> bool:
    """Wait until every process has called this with the same key; whether that came about in time."""
    store.add(key, 1)
    return wait_until(lambda: store.add(key, 0) >= comm.get_world_size(), seconds)


def on_main_process(function: Callable[[], Any]) -> Any:
    """What ``function()`` returns in the main process, None in the others, which wait for as long as it takes.

    Raises:
        InputError: in every process, if it was raised in the main one: none waits for one that is gone.
    """
    store = shared_store()
    if comm.is_main_process():
        try:
            result = function()
        except InputError as error:
            store.set("problem", str(error))
            store.set("done", "")
            wait_for_all(store, "told", _TELL_SECONDS)
            raise
        store.set("done", "")
        return result
    wait_until(lambda: store.check(["done"]))
    if store.check(["problem"]):
        store.add("told", 1)
        raise InputError(store.get("problem").decode())
    return None
