"""Measure speed on this machine: augmentation, backbone, training, labeling, export or the pseudo-label store.

Contestants take turns in one process, so that ratios hold even where other programs run beside it. Prints
a table; --output also writes every figure as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from selftrain_d2.errors import InputError
from selftrain_d2.experiments.benchmarks.timing import machine, use_one_core

# Task -> module with run(rounds) -> a dict of figures, whose "table" is Markdown.
TASKS = {
    "augmentation": "selftrain_d2.experiments.benchmarks.augmentation",
    "backbone": "selftrain_d2.experiments.benchmarks.backbone",
    "export": "selftrain_d2.experiments.benchmarks.export",
    "label": "selftrain_d2.experiments.benchmarks.label",
    "store": "selftrain_d2.experiments.benchmarks.store",
    "train": "selftrain_d2.experiments.benchmarks.train",
    "writers": "selftrain_d2.experiments.benchmarks.writers",
}
# Option -> the task whose run() takes it.
OPTIONS = {"images": "writers", "processes": "writers", "models": "backbone"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, choices=sorted(TASKS), help="what to measure")
    parser.add_argument(
        "--rounds", type=_positive, default=7, metavar="N", help="measurements of each contestant (default 7)"
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these of --task backbone")
    parser.add_argument("--images", type=_positive, metavar="N", help="records of --task writers")
    parser.add_argument("--processes", type=_positive, metavar="N", help="those of --task writers")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file for the figures")


def run(args: argparse.Namespace) -> None:
    options = {key: value for key in OPTIONS if (value := getattr(args, key)) is not None}
    for key in options:
        if args.task != OPTIONS[key]:
            raise InputError(f"--{key} goes with --task {OPTIONS[key]}: leave it out.")
    use_one_core()
    results = importlib.import_module(TASKS[args.task]).run(args.rounds, **options)
    results["machine"] = machine()
    results["command"] = " ".join(["selftrain-d2 benchmark", *sys.argv[1:]])
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(results["table"])
    print("\n" + ", ".join(f"{name} {value}" for name, value in results["machine"].items()))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number
