"""Synthetic pseudo labels for benchmarks of the store, and the memory of processes that write and read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selftrain_d2.data.pseudo_labels.shards import make_row

BOXES_PER_IMAGE = 10  # on average, from the floor up
FLOOR, THRESHOLD, SHARE_ABOVE = 0.05, 0.5, 0.3  # so 3 boxes an image are trained on
CLASSES = 80

#: Of a writer of such records.
IDENTITY = {
    "thing_classes": [f"class {i}" for i in range(CLASSES)],
    "score_floor": FLOOR,
    "image_root": "/photos",
}


class ImageNames(Sequence):
    """Names of so many images, each made when it is asked for: they take no memory."""

    def __init__(self, number: int):
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.number:
            raise IndexError(index)
        return f"train/{index % 1000:04d}/image_{index:09d}.jpg"


def records(names: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the store for some images."""
    rng = np.random.default_rng(seed)
    ends = rng.poisson(BOXES_PER_IMAGE, len(names)).cumsum()
    total = int(ends[-1])
    corners = rng.uniform(0, 400, (total, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 240, (total, 2))], axis=1).astype(np.float32)
    above = rng.random(total) < SHARE_ABOVE
    # Rounded to float32, a score may reach the threshold from below: one in millions.
    scores = np.where(above, rng.uniform(THRESHOLD, 1, total), rng.uniform(FLOOR, THRESHOLD, total))
    scores, category_ids = scores.astype(np.float32), rng.integers(0, CLASSES, total, dtype=np.int32)
    start = 0
    for name, end in zip(names, ends.tolist()):
        yield make_row(name, 480, 640, boxes[start:end], scores[start:end], category_ids[start:end])
        start = end


def memory() -> dict[str, float]:
    """MB that this process has in memory, now and at most so far."""
    fields = _kilobytes("/proc/self/status")
    return {"resident": fields["VmRSS"] / 1e3, "peak": fields["VmHWM"] / 1e3}


def own_memory(pid: int | str = "self") -> float:
    """MB that a process shares with no other."""
    fields = _kilobytes(f"/proc/{pid}/smaps_rollup")
    return (fields["Private_Clean"] + fields["Private_Dirty"]) / 1e3


def _kilobytes(file: str) -> dict[str, int]:
    lines = (line.split() for line in Path(file).read_text(encoding="utf-8").splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}
