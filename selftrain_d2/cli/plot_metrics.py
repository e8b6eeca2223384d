"""Draw the course of training runs: losses, weights, labels, speed and evaluation against the step.

selftrain-d2 plot-metrics output/student --output student.png
selftrain-d2 plot-metrics output/student output/control --output both.png
"""

from __future__ import annotations

import argparse
import os

from selftrain_d2.engine.metrics_plot import plot_metrics
from selftrain_d2.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("runs", nargs="+", metavar="DIR", help="OUTPUT_DIR of a run, with its metrics.json")
    parser.add_argument(
        "--output", metavar="FILE", help="PNG, SVG or PDF (default: metrics.png in the first DIR)"
    )


def run(args: argparse.Namespace) -> None:
    """Draw the picture."""
    output = args.output or os.path.join(args.runs[0], "metrics.png")
    if os.path.splitext(output)[1].lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--output {output} must end in .png, .svg or .pdf.")
    plot_metrics(args.runs, output)
    print(output)
