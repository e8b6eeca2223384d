"""Who does which piece of work, of those that share a store."""

import time

import pytest
import torch.distributed as dist

from selftrain_d2.labeling import claims as claims_module
from selftrain_d2.labeling.claims import Claims

PIECES = list(range(40))


class _Work:
    """What was done by whom; ``work(claims, who)`` is one process."""

    def __init__(self):
        self.done = []

    def unfinished(self):
        there = {piece for piece, _ in self.done}
        return [piece for piece in PIECES if piece not in there]

    def __call__(self, claims, who):
        for pieces in claims.rounds(self.unfinished):
            for piece in pieces:
                self.done.append((piece, who))


def test_each_piece_is_done_once_and_a_slow_one_holds_nobody_up():
    store, work = dist.HashStore(), _Work()
    slow, fast = (Claims(store, 60).rounds(work.unfinished) for _ in range(2))
    of_slow, of_fast = next(slow), next(fast)
    its = next(of_slow)
    others = list(of_fast)  # while the slow one is at its first
    assert sorted([its, *others]) == PIECES
    work.done = [(piece, "fast") for piece in others] + [(its, "slow")]
    assert not list(of_slow) and not list(slow) and not list(fast)


def test_pieces_of_one_that_died_are_done_after_the_stated_time():
    store, work = dist.HashStore(), _Work()
    taken = next(Claims(store, 60).rounds(work.unfinished))
    lost = [next(taken), next(taken)]
    start = time.monotonic()
    work(Claims(store, 0.3), "other")
    assert time.monotonic() - start >= 0.3
    assert sorted(piece for piece, _ in work.done) == PIECES
    assert [piece for piece, _ in work.done[-2:]] == lost  # when nothing else was left


def test_two_share_what_one_left_and_a_late_one_is_not_done_twice():
    store, work = dist.HashStore(), _Work()
    gone = next(Claims(store, 60).rounds(work.unfinished))
    for _ in PIECES:
        next(gone)
    ours, theirs = (Claims(store, 0.2).rounds(work.unfinished) for _ in range(2))
    assert list(next(ours)) == list(next(theirs)) == []
    ours, theirs = next(ours), next(theirs)  # 0.2 seconds later each
    assert [next(ours), next(theirs), next(ours)] == [0, 1, 2]
    work.done.append((3, "gone"))  # it was only slow
    assert next(theirs) == 4


def test_it_waits_as_long_as_others_finish_something(monkeypatch):
    store, work = dist.HashStore(), _Work()
    gone = next(Claims(store, 60).rounds(work.unfinished))
    slow = [next(gone) for _ in PIECES]

    def wait_until(condition, seconds):
        """The time in which the slow one finishes one piece."""
        assert seconds == 0.5
        work.done.append((slow.pop(0), "slow"))
        return condition()

    monkeypatch.setattr(claims_module, "wait_until", wait_until)
    work(Claims(store, 0.5), "other")
    assert not slow and all(who == "slow" for _, who in work.done) and not work.unfinished()


class _Gone:
    """A store whose process dies after some claims."""

    def __init__(self, claims):
        self.store, self.left = dist.HashStore(), claims

    def __getattr__(self, name):
        self.left -= 1
        if self.left < 0:
            raise dist.DistNetworkError("Broken pipe")
        return getattr(self.store, name)


@pytest.mark.parametrize("rank", [0, 3])
def test_without_the_store_each_does_what_is_missing(rank, monkeypatch):
    monkeypatch.setattr(claims_module.comm, "get_rank", lambda: rank)
    monkeypatch.setattr(claims_module.comm, "get_world_size", lambda: 4)
    work = _Work()
    work.done = [(piece, "other") for piece in range(35, 40)]
    work(Claims(_Gone(5), 60), "this")
    order = [piece for piece, who in work.done if who == "this"]
    assert order[:5] == [0, 1, 2, 3, 4] and sorted(order) == list(range(35))
    start = 35 * rank // 4
    assert order[5] == max(start, 5)  # the others begin elsewhere


def test_marks_and_counts():
    store = dist.HashStore()
    ours, theirs = Claims(store, 1), Claims(store, 1)
    ours.mark(2)
    assert theirs.unmarked([1, 2, 3]) == [1, 3]
    assert [ours.count(4), theirs.count(3), ours.count(0)] == [4, 7, 7]
