"""The pseudo-label folder written by many processes at once: synthetic records, memory, and what was written verified.

Each process takes the next shard that nobody has taken. They are forked from the process that holds the folder, so that
the list of images is hashed once; ranks of a real run do that each for itself.
"""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from selftrain_d2.data.pseudo_labels.manifest import NameHash
from selftrain_d2.data.pseudo_labels.reader import verify_pseudo_labels
from selftrain_d2.data.pseudo_labels.writer import SHARD_SIZE, PseudoLabelWriter
from selftrain_d2.experiments.benchmarks.records import IDENTITY, ImageNames, memory, own_memory, records
from selftrain_d2.experiments.benchmarks.timing import markdown_table

IMAGES, PROCESSES = 12_000_000, 64
_POLL_SECONDS = 0.5
_HASHED = 1_000_000  # names, to time it


def run(rounds: int = 1, images: int = IMAGES, processes: int = PROCESSES) -> dict[str, Any]:
    """Write ``images`` records with ``processes`` processes, count and verify them. All is measured once.

    Returns:
        ``table`` (Markdown), ``writers`` (what each process says of itself: its own memory in MB after so many shards
        among it), and seconds, MB and counts by name.
    """
    folder = tempfile.mkdtemp(prefix="pseudo_labels_")
    try:
        figures = _write(folder, images, processes)
    finally:
        shutil.rmtree(folder)
    return {"table": _table(figures), **figures}


def _write(folder: str, images: int, processes: int) -> dict[str, Any]:
    names = ImageNames(images)
    some = [names[i] for i in range(min(images, _HASHED))]
    start = time.process_time()
    NameHash(some)
    hash_seconds, some = time.process_time() - start, len(some)
    with PseudoLabelWriter(folder, IDENTITY, names) as writer:
        start = time.perf_counter()
        writers = _run_writers(writer, processes)
        write_seconds = time.perf_counter() - start
        before, start = memory()["resident"], time.process_time()
        manifest = writer.finish()
        finish_seconds = time.process_time() - start
    start = time.process_time()
    verified = verify_pseudo_labels(folder)
    if verified["listed"] != images or verified["boxes"] != sum(w["boxes"] for w in writers):
        raise RuntimeError(f"{folder}: {verified['listed']} images and {verified['boxes']} boxes were found.")
    return {
        "images": images,
        "processes": processes,
        "writers": writers,
        "names_hashed_a_second": some / hash_seconds,
        "write_seconds": write_seconds,
        "write_cpu_seconds": sum(w["cpu_seconds"] for w in writers),
        "finish_cpu_seconds": finish_seconds,
        "verify_cpu_seconds": time.process_time() - start,
        "finish_and_verify_growth": memory()["resident"] - before,
        "growth_bytes_a_record": _growth([w for w in writers if w["shards"]]),
        "boxes": verified["boxes"],
        "files": len(manifest["shards"]),
        "shard_megabytes": sum(manifest["shards"].values()) / 1e6,
        "manifest_megabytes": (Path(folder) / "manifest.json").stat().st_size / 1e6,
    }


def _run_writers(writer: PseudoLabelWriter, processes: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("fork")
    taken, results = context.Value("q", 0), context.SimpleQueue()
    total = len(writer.missing_shards())
    workers = [
        context.Process(target=_work, args=(writer, taken, total, processes, results), daemon=True)
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    with tqdm(total=total, desc=f"{processes} writers", unit="shard", disable=None) as progress:
        while any(worker.is_alive() for worker in workers):
            time.sleep(_POLL_SECONDS if total > processes else 0.01)
            progress.update(min(taken.value, total) - progress.n)
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"A writer ended with the exit codes {sorted({w.exitcode for w in workers})}.")
    return [results.get() for _ in workers]


def _work(writer: PseudoLabelWriter, taken: Any, total: int, processes: int, results: Any) -> None:
    written, boxes, samples, start = 0, 0, [], time.process_time()
    # So that each takes about ten samples of its memory beside the first and the last.
    period = max(1, total // (10 * processes))
    while True:
        with taken.get_lock():
            shard = taken.value
            taken.value += 1
        if shard >= total:
            break
        rows = list(records([writer.file_names[i] for i in writer.shard_range(shard)], seed=shard))
        boxes += sum(len(row["scores"]) for row in rows)
        writer.write_shard(shard, rows)
        written += 1
        if written == 1 or written % period == 0:
            samples.append((written, own_memory()))
    samples.append((written, own_memory()))
    results.put(
        {
            "shards": written,
            "boxes": boxes,
            "cpu_seconds": time.process_time() - start,
            "megabytes": samples,
            "peak_resident": memory()["peak"],
        }
    )


def _megabytes_at(writer: dict[str, Any], share: float) -> float:
    """Memory of its own that a writer had when it had written that share of its shards, or a little more."""
    return next(mb for shards, mb in writer["megabytes"] if shards >= share * writer["shards"])


def _growth(writers: list[dict[str, Any]]) -> float:
    """Bytes by which a writer's own memory grows with each record: slope of the line through all their samples, the
    first tenth left out; 0 where there is nothing to fit."""
    shards, megabytes = [], []  # about each writer's own mean
    for writer in writers:
        samples = np.array([x for x in writer["megabytes"] if 10 * x[0] >= writer["shards"]], float)
        shards.extend(samples[:, 0] - samples[:, 0].mean())
        megabytes.extend(samples[:, 1] - samples[:, 1].mean())
    square = np.dot(shards, shards)
    return float(np.dot(shards, megabytes) / square * 1e6 / SHARD_SIZE) if square else 0.0


def _table(figures: dict[str, Any]) -> str:
    images, writers = figures["images"], [w for w in figures["writers"] if w["shards"]]
    own = {
        "after its first shard": [w["megabytes"][0][1] for w in writers],
        "after a tenth": [_megabytes_at(w, 0.1) for w in writers],
        "after half": [_megabytes_at(w, 0.5) for w in writers],
        "at the end": [w["megabytes"][-1][1] for w in writers],
    }
    of_shards = [w["shards"] for w in writers]
    rows = [
        [
            "hash the list",
            f"{figures['names_hashed_a_second']:,.0f} names a second",
            "of one core; each rank does",
        ],
        [
            "write",
            f"{figures['write_seconds']:.0f} s",
            f"{images / figures['write_seconds']:,.0f} records a second together; of processor time "
            f"{images / figures['write_cpu_seconds']:,.0f} a second of one core, making the records included",
        ],
        [
            "a writer",
            f"{min(of_shards)} to {max(of_shards)} shards",
            "memory of its own, median (most): "
            + ", ".join(
                f"{statistics.median(values):.1f} ({max(values):.1f}) MB {when}"
                for when, values in own.items()
            )
            + f"; growth from the tenth on {_growth(writers):.1f} bytes a record; resident at most "
            f"{max(w['peak_resident'] for w in writers):.0f} MB, most of it shared",
        ],
        [
            "on disk",
            f"{figures['shard_megabytes']:,.0f} MB",
            f"{figures['shard_megabytes'] * 1e6 / images:.0f} bytes a record; {figures['files']:,} files of "
            f"{SHARD_SIZE} records, manifest {figures['manifest_megabytes']:.1f} MB",
        ],
        [
            "count and finish, verify",
            f"{figures['finish_cpu_seconds']:.1f} s, {figures['verify_cpu_seconds']:.1f} s",
            f"of one core; {figures['boxes']:,} boxes found are those written; memory grows by "
            f"{figures['finish_and_verify_growth']:.0f} MB",
        ],
    ]
    return markdown_table([f"{images:,} records, {figures['processes']} processes", "", ""], rows)
