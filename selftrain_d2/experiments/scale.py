"""What self-training costs on very many images: ``python -m selftrain_d2.experiments.scale [IMAGES GPUS]``.

Each figure is computed from :data:`RATES`, whose entries say where they were measured, or that they are assumed. Rates
of a core are those of the machine of docs/benchmarks.md; nothing here was run at this size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import NamedTuple

from selftrain_d2.data.pseudo_labels.writer import SHARD_SIZE
from selftrain_d2.experiments.benchmarks.timing import markdown_table
from selftrain_d2.experiments.cost import ASSUMED_TFLOPS, PASSES


class Rate(NamedTuple):
    """A number and where it is from."""

    value: float
    unit: str
    source: str


_ASSUMED = "assumed"
_STORE, _WRITERS = "`benchmark --task store`", "`benchmark --task writers`"

RATES: dict[str, Rate] = {
    "gpu_tflops": Rate(ASSUMED_TFLOPS, "TFLOP/s that a GPU sustains", _ASSUMED),
    "gflops": Rate(
        102.5, "GFLOPs an image, RetinaNet on EfficientNet-B7, 640 px", "counted: reproduce_paper.md"
    ),
    "image_bytes": Rate(150e3, "bytes an image", _ASSUMED),
    "decode": Rate(423, "images of 1000 x 750 a second and core, decoded", "`benchmark --task augmentation`"),
    "augment": Rate(259, "the same with decoding and S1 to 640 px", "`benchmark --task augmentation`"),
    "request_seconds": Rate(0.03, "seconds for one answer of object storage", _ASSUMED),
    "requests": Rate(32, "requests at a time", "`storage.REQUESTS`"),
    "listed": Rate(20e3, "names a second in a listing", _ASSUMED),
    "network": Rate(1e9, "bytes a second into a node", _ASSUMED),
    "name_bytes": Rate(87, "bytes for a name of 30 letters in a list", "CPython 3.11"),
    "distinct_bytes": Rate(
        43, "bytes for it in the set that finds names listed twice", "CPython 3.11, 100 million"
    ),
    "hashed": Rate(8.6e6, "names a second hashed", _WRITERS),
    "written": Rate(1.2e6 / 10.5, "records a second written by a core", _STORE),
    "record_bytes": Rate(207, "bytes a record on disk", _WRITERS),
    "manifest_bytes": Rate(100, "bytes of the manifest for a shard", _WRITERS),
    "writer_megabytes": Rate(17, "MB of its own that a writer needs, at most", _WRITERS),
    "checked": Rate(1.2e6 / 0.4, "records a second checked on resuming", _STORE),
    "counted": Rate(1.2e6 / 2.1, "records a second counted, or verified", _STORE),
    "loaded": Rate(1.2e6 / 4.3, "records a second loaded by a core", _STORE),
    "label_bytes": Rate(151e6 / 1.2e6, "bytes of an image's labels in memory", _STORE),
    "order_bytes": Rate(
        48, "bytes of an image in TrainingSampler's order: a tensor, a list and its numbers", "CPython 3.11"
    ),
}


class Scale(NamedTuple):
    """How much, on what."""

    images: int = 100_000_000
    gpus: int = 64
    gpus_of_node: int = 8


class Figure(NamedTuple):
    """One result: of what stage, what, how much, and the rates that it follows from."""

    stage: str
    what: str
    value: str
    rates: tuple[str, ...]


def figures(scale: Scale, rates: Mapping[str, Rate] = RATES) -> list[Figure]:
    """All figures of a scale."""
    r = {name: rate.value for name, rate in rates.items()}
    n, gpus, of_node = scale.images, scale.gpus, scale.gpus_of_node
    nodes = math.ceil(gpus / of_node)
    per_gpu = r["gpu_tflops"] * 1e3 / r["gflops"]  # images a second
    label_seconds = n / (gpus * per_gpu)
    shards = math.ceil(n / SHARD_SIZE)
    names, distinct = n * r["name_bytes"], n * r["distinct_bytes"]
    labels, order = n * r["label_bytes"], n * r["order_bytes"]
    gpu = ("gpu_tflops", "gflops")
    return [
        Figure("before", "list a folder, each rank", _time(n / r["listed"]), ("listed",)),
        Figure(
            "before",
            "index tar archives, all bytes for each rank: a node",
            f"{_bytes(of_node * n * r['image_bytes'])}, {_time(of_node * n * r['image_bytes'] / r['network'])}",
            ("image_bytes", "network"),
        ),
        Figure(
            "before",
            "`self-train` asks for the size of each object, to find copies of labeled ones",
            _time(n * r["request_seconds"] / r["requests"]),
            ("request_seconds", "requests"),
        ),
        Figure("before", "names in memory, a rank; a node", _both(names, of_node), ("name_bytes",)),
        Figure(
            "before",
            "names listed twice, while they are looked for, a rank; a node",
            _both(distinct, of_node),
            ("distinct_bytes",),
        ),
        Figure("before", "hash of the list, each rank", _time(n / r["hashed"]), ("hashed",)),
        Figure("label", "the teacher, one view of an image", _time(label_seconds), gpu),
        Figure("label", "images a second, a GPU; all", f"{per_gpu:.0f}; {per_gpu * gpus:,.0f}", gpu),
        Figure(
            "label",
            "bytes read; a second and node",
            f"{_bytes(n * r['image_bytes'])}; {_bytes(n * r['image_bytes'] / label_seconds / nodes)}",
            (*gpu, "image_bytes"),
        ),
        Figure(
            "label",
            "requests under way to object storage, all",
            f"{per_gpu * gpus * r['request_seconds']:,.0f}",
            (*gpu, "request_seconds"),
        ),
        Figure("label", "cores that decode, a GPU", f"{per_gpu / r['decode']:.1f}", (*gpu, "decode")),
        Figure("label", "cores that write, all", f"{per_gpu * gpus / r['written']:.2f}", (*gpu, "written")),
        Figure("label", "memory of a writer", f"{r['writer_megabytes']:.0f} MB", ("writer_megabytes",)),
        Figure(
            "label",
            "shards: files, bytes",
            f"{shards:,}, {_bytes(n * r['record_bytes'])}",
            ("record_bytes",),
        ),
        Figure("label", "manifest", _bytes(shards * r["manifest_bytes"]), ("manifest_bytes",)),
        Figure("label", "redone after a kill, a GPU", _time(SHARD_SIZE / per_gpu), gpu),
        Figure("label", "checked on resuming, one core", _time(n / r["checked"]), ("checked",)),
        Figure("label", "counted at the end, one core", _time(n / r["counted"]), ("counted",)),
        Figure("student", "labels loaded, each rank", _time(n / r["loaded"]), ("loaded",)),
        Figure("student", "labels in memory, a rank; a node", _both(labels, of_node), ("label_bytes",)),
        Figure("student", "order of a pass, a rank; a node", _both(order, of_node), ("order_bytes",)),
        Figure(
            "student",
            "one pass over all, with as many human images",
            _time(2 * PASSES * label_seconds),
            gpu,
        ),
        Figure(
            "student",
            "cores that augment, a GPU",
            f"{per_gpu / PASSES / r['augment']:.1f}",
            (*gpu, "augment"),
        ),
    ]


def scale_table(scale: Scale, rates: Mapping[str, Rate] = RATES) -> str:
    """The figures as Markdown; the last column says "assumed" where any of their rates is."""
    rows = [
        [
            figure.stage,
            figure.what,
            figure.value,
            ", ".join(
                f"{name} (assumed)" if rates[name].source == _ASSUMED else name for name in figure.rates
            ),
        ]
        for figure in figures(scale, rates)
    ]
    return markdown_table(
        ["", f"{scale.images:,} images, {scale.gpus} GPUs, {scale.gpus_of_node} a node", "", "from"], rows
    )


def rates_table(rates: Mapping[str, Rate] = RATES) -> str:
    """The rates as Markdown."""
    rows = [
        [name, f"{rate.value:,.0f}" if rate.value >= 1000 else f"{rate.value:g}", rate.unit, rate.source]
        for name, rate in rates.items()
    ]
    return markdown_table(["rate", "", "", "source"], rows)


def _time(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e6:.0f} MB"


def _both(of_rank: float, ranks: int) -> str:
    return f"{_bytes(of_rank)}; {_bytes(of_rank * ranks)}"


if __name__ == "__main__":
    print(scale_table(Scale(*map(int, sys.argv[1:3]))), rates_table(), sep="\n\n")
