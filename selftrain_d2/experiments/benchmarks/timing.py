"""Fair timings: contestants take turns in one process on one core, and only ratios of a turn are compared."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm


def use_one_core() -> None:
    """Keep this process, OpenCV and torch to one thread."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def time_in_turns(
    contestants: Mapping[str, Callable[[], object]],
    items: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time contestants round by round, in a new random order each round.

    Args:
        contestants: by name, what to time. Each is called once before, unmeasured.
        items: how many items a call handles.
        rounds: how often each is measured.
        clock: seconds. ``time.process_time``: those that this process had a core, which other programs change less.

    Returns:
        For each name ``rounds`` speeds in items per second; equal places belong to the same round.
    """
    order = np.random.RandomState(0)
    for contestant in contestants.values():
        contestant()
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    with tqdm(total=rounds * len(names), disable=None, leave=False) as progress:
        for _ in range(rounds):
            for index in order.permutation(len(names)):
                start = clock()
                contestants[names[index]]()
                speeds[names[index]].append(items / (clock() - start))
                progress.update()
    return speeds


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, smallest and largest of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(speeds: Mapping[str, Sequence[float]], one: str, other: str) -> dict[str, float]:
    """How many times faster ``one`` is than ``other``, over the ratios of each round."""
    return spread([a / b for a, b in zip(speeds[one], speeds[other])])


def machine() -> dict[str, str | int]:
    """What the timings were taken on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": model,
        "cores": os.cpu_count() or 1,
        **gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as docs/benchmarks.md has them."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
