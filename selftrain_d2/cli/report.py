"""Draw and tabulate what grids of experiments found.

Writes to --output: report.html (one file, no network), report.md, figures/ (PNG and SVG), and metrics.json: all
that the page is made of, small enough to commit. From it the page is made again without the runs. What is drawn
says the report section of each grid file.

    selftrain-d2 report output/loss_normalization --output docs/loss_normalization
    selftrain-d2 report --metrics docs/loss_normalization/metrics.json --output docs/loss_normalization
"""

from __future__ import annotations

import argparse
from pathlib import Path

from selftrain_d2.errors import InputError
from selftrain_d2.experiments.report.report import write_report
from selftrain_d2.experiments.report.results import read_experiment, read_metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="--output folders of grids")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="metrics.json files of earlier reports, in place of or beside folders",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write to")


def run(args: argparse.Namespace) -> None:
    """Write the report."""
    if not args.folders and not args.metrics:
        raise InputError("There is nothing to report on: give folders of grids, or --metrics files.")
    experiments = [read_experiment(folder) for folder in args.folders]
    experiments += [experiment for file in args.metrics for experiment in read_metrics(file)]
    args.output.mkdir(parents=True, exist_ok=True)
    print(write_report(experiments, args.output))
