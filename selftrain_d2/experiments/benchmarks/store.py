"""The pseudo-label folder at size: synthetic records written, verified, loaded, and read at random. No images."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels, verify_pseudo_labels
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.experiments.benchmarks.records import (
    IDENTITY,
    THRESHOLD,
    ImageNames,
    memory,
    own_memory,
    records,
)
from selftrain_d2.experiments.benchmarks.timing import markdown_table, spread, use_one_core

IMAGES = 1_200_000  # ImageNet has 1.28 million
RANDOM_IMAGES, FEW = 300_000, 100
LOADER_BATCH = 512
ESTIMATED_IMAGES = 100_000_000


def run(rounds: int) -> dict[str, Any]:
    """Write, verify and load ``IMAGES`` records; each part in a process of its own, for its memory.

    Args:
        rounds: how often verifying and loading are measured. The rest is measured once.

    Returns:
        ``table`` (Markdown), and ``written``, ``loaded``: seconds, MB and microseconds by name.
    """
    folder = tempfile.mkdtemp(prefix="pseudo_labels_")
    try:
        written = _in_fresh_process(_write, folder, IMAGES)
        loaded = _in_fresh_process(_load, folder, rounds)
    finally:
        shutil.rmtree(folder)
    rows = [
        ["write", f"{written['seconds']:.1f} s", f"{written['megabytes']:.0f} MB on disk"],
        ["count and finish", f"{written['finish_seconds']:.1f} s", ""],
        [
            "memory of the writer",
            f"+{written['growth_at_tenth']:.0f} MB",
            f"after a tenth; at the end +{written['growth']:.0f} MB",
        ],
        ["check on resuming", f"{written['resume_seconds']:.1f} s", "SHA-256 of every shard"],
        ["verify", _seconds(loaded["verify_seconds"]), "SHA-256 and counts"],
        [
            f"load at {THRESHOLD}",
            _seconds(loaded["load_seconds"]),
            f"{statistics.median(loaded['load_cpu_seconds']):.1f} s of one core; {loaded['boxes']} boxes, "
            f"{loaded['column_megabytes']:.0f} MB; the process grows by {loaded['growth']:.0f} MB (at most "
            f"{loaded['peak_growth']:.0f}) to {loaded['resident']:.0f} MB",
        ],
        ["one image at random", f"{loaded['access_microseconds']:.1f} us", "its dict with all annotations"],
        [f"{loaded['random_images']} of them, no workers", f"{loaded['epoch_seconds']:.1f} s", ""],
        [
            f"{loaded['random_images']} of them, 2 workers",
            f"{loaded['epoch_seconds_2_workers']:.1f} s",
            f"{loaded['worker_growth']:.0f} MB of its own each for the labels",
        ],
    ]
    table = markdown_table([f"{IMAGES} images", "", ""], rows)
    return {
        "table": f"{table}\n\n{_estimate(written, loaded)}",
        "images": IMAGES,
        "written": written,
        "loaded": loaded,
    }


def _seconds(values: list[float]) -> str:
    return "{median:.1f} s ({min:.1f} - {max:.1f})".format(**spread(values))


def _estimate(written: dict[str, Any], loaded: dict[str, Any]) -> str:
    factor = ESTIMATED_IMAGES / IMAGES
    write = written["seconds"] * factor / 3600
    verify = statistics.median(loaded["verify_seconds"]) * factor / 60
    load = statistics.median(loaded["load_cpu_seconds"]) * factor / 60
    return (
        f"{ESTIMATED_IMAGES} images by these rates, not measured: {written['megabytes'] * factor / 1e3:.0f} GB on "
        f"disk; on one core {write:.1f} hours to write, {verify:.0f} minutes to verify, {load:.0f} minutes to load; "
        f"{loaded['column_megabytes'] * factor / 1e3:.0f} GB of memory, which all workers of a process share."
    )


def _in_fresh_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _write(folder: str, images: int) -> dict[str, Any]:
    names = list(ImageNames(images))
    before, seconds, growth_at_tenth = memory()["resident"], 0.0, None
    with PseudoLabelWriter(folder, IDENTITY, names) as writer:
        shards = writer.missing_shards()
        for shard in shards:
            rows = list(records([names[i] for i in writer.shard_range(shard)], seed=shard))
            start = time.perf_counter()
            writer.write_shard(shard, rows)
            seconds += time.perf_counter() - start
            if growth_at_tenth is None and 10 * (shard + 1) >= len(shards):
                growth_at_tenth = memory()["resident"] - before
        start = time.perf_counter()
        manifest = writer.finish()
        finish_seconds = time.perf_counter() - start
    growth = memory()["resident"] - before
    start = time.perf_counter()
    PseudoLabelWriter(folder, IDENTITY, names).close()
    return {
        "seconds": seconds,
        "finish_seconds": finish_seconds,
        "resume_seconds": time.perf_counter() - start,
        "megabytes": sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6,
        "boxes": manifest["boxes"],
        "growth_at_tenth": growth_at_tenth,
        "growth": growth,
    }


def _load(folder: str, rounds: int) -> dict[str, Any]:
    use_one_core()
    results: dict[str, Any] = {"verify_seconds": [], "load_seconds": [], "load_cpu_seconds": []}
    before = memory()
    labels = None
    for _ in range(rounds):
        labels = None  # one at a time
        start, cpu_start = time.perf_counter(), time.process_time()
        labels = load_pseudo_labels(folder, THRESHOLD)
        results["load_seconds"].append(time.perf_counter() - start)
        results["load_cpu_seconds"].append(time.process_time() - cpu_start)
        if len(results["load_seconds"]) == 1:
            after = memory()
    results["boxes"] = int(labels.box_counts.sum())
    results["column_megabytes"] = len(pickle.dumps(labels)) / 1e6
    results["resident"] = after["resident"]
    results["growth"] = after["resident"] - before["resident"]
    results["peak_growth"] = after["peak"] - before["resident"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    order = order[:RANDOM_IMAGES]
    start = time.perf_counter()
    for position in order:
        labels[position]
    results["random_images"] = len(order)
    results["access_microseconds"] = (time.perf_counter() - start) / len(order) * 1e6
    results["epoch_seconds"] = _epoch(labels, order, workers=0)[0]
    results["epoch_seconds_2_workers"], own = _epoch(labels, order, workers=2)
    # The same work on a few images: what workers take for themselves anyway.
    few = [position % FEW for position in order]
    results["worker_growth"] = own - _epoch(labels, few, workers=2)[1]
    for _ in range(rounds):
        start = time.perf_counter()
        verify_pseudo_labels(folder)
        results["verify_seconds"].append(time.perf_counter() - start)
    return results


def _epoch(dataset: Sequence, order: list[int], workers: int) -> tuple[float, float]:
    """Seconds to get items through a DataLoader, and at the end the median worker's own memory in MB."""
    loader = DataLoader(dataset, LOADER_BATCH, sampler=order, num_workers=workers, collate_fn=list)
    start, seen, own = time.perf_counter(), 0, [0.0]
    for batch in loader:
        seen += len(batch)
        if seen == len(order) and workers:
            own = [own_memory(process.pid) for process in multiprocessing.active_children()]
    return time.perf_counter() - start, statistics.median(own)
