"""Which of several processes does which piece of work, where all take pieces as they become free."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from detectron2.utils import comm

from selftrain_d2.processes import wait_until

logger = logging.getLogger(__name__)


class Claims:
    """Pieces of work, by number, are claimed in torch.distributed's store.

    Claims only save work: a piece that two processes do must come out the same. So one that was claimed by a process
    which died, hangs, or is slow is simply done once more, when nothing else is left to do and no piece was finished
    for ``patience`` seconds. Should the store be gone (its process died), each of the others does what is still
    missing, starting at different places.

    Args:
        store: the same in all processes; see :func:`~selftrain_d2.processes.shared_store`.
        patience: in seconds.
    """

    def __init__(self, store: dist.Store, patience: float):
        self._store = store
        self.patience = patience
        self._alone = False

    def rounds(self, unfinished: Callable[[], Sequence[int]]) -> Iterator[Iterator[int]]:
        """Iterators over pieces for this process, one after the other until nothing is unfinished.

        Each gives pieces that nobody has claimed, and claims one when it is asked for it. It does not wait: work may
        go on while it is asked for the next piece. What waits is this iterator.

        Args:
            unfinished: tells what is to be done and not finished yet, by anybody.
        """
        left = list(unfinished())
        number = 0
        while left:
            yield self._free(left, number, unfinished)
            number += 1
            left = self._waited(unfinished)

    def _free(
        self, pieces: Sequence[int], number: int, unfinished: Callable[[], Sequence[int]]
    ) -> Iterator[int]:
        for piece in pieces:
            if self._ask("add", f"{number}/{piece}", 1) == 1:
                if self._alone:
                    break
                if number == 0 or piece in unfinished():  # finished late, but finished
                    yield piece
        if self._alone:
            start = len(pieces) * comm.get_rank() // comm.get_world_size()
            yield from (piece for piece in [*pieces[start:], *pieces[:start]] if piece in unfinished())

    def _waited(self, unfinished: Callable[[], Sequence[int]]) -> list[int]:
        """What is still unfinished after nothing was finished for some time."""
        left = list(unfinished())
        while left:
            before = left

            def has_changed() -> bool:
                nonlocal left
                left = list(unfinished())
                return left != before  # noqa: B023 (called in this turn of the loop)

            if not wait_until(has_changed, self.patience):
                logger.warning(
                    f"{len(left)} pieces of the work are unfinished, and none was finished for {self.patience:g} "
                    "seconds: they are done again."
                )
                break
        return left

    def mark(self, piece: int) -> None:
        """Note a piece as finished, for :meth:`unmarked`."""
        self._ask("set", f"finished/{piece}", "")

    def unmarked(self, pieces: Iterable[int]) -> list[int]:
        """Those that nobody has marked."""
        return [piece for piece in pieces if not self._ask("check", [f"finished/{piece}"])]

    def count(self, number: int) -> int:
        """Add to a number that all processes add to; the sum so far."""
        return self._ask("add", "count", number)

    def _ask(self, operation: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, operation)(*arguments)
        except RuntimeError as error:  # torch.distributed's errors are
            if self._alone:
                raise
            logger.warning(
                f"The process that knew who does what is gone ({error}); the others go on without."
            )
            self._store, self._alone = dist.HashStore(), True
            return getattr(self._store, operation)(*arguments)
