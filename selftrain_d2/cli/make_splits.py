"""Draw labeled fractions of a COCO file: nested, without replacement, the same on every machine.

Writes labeled_F.json for each fraction F and unlabeled_F.txt, the file names of the images outside it. The sample
depends on the seed and the file names alone, not on the order of the file or on the other fractions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from selftrain_d2.cli.dry_run import Plan
from selftrain_d2.cli.label_arguments import add_image_and_class_arguments, add_labels_argument
from selftrain_d2.data.splits import make_splits, parse_fractions, read_labels, split_sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("json", nargs="?", type=Path, metavar="JSON", help="detections in COCO format")
    add_labels_argument(source)
    add_image_and_class_arguments(parser)
    parser.add_argument(
        "--fractions",
        nargs="+",
        required=True,
        metavar="PERCENT",
        help="of the images, e.g. 1 5 10 20 50 100; 0.5 is half a percent",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default 0)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--stratified", action="store_true", help="keep the shares of the classes, and show each class early"
    )


def plan(args: argparse.Namespace) -> Plan:
    """What :func:`run` would do."""
    args.json = args.json or Path(args.labels)
    plan = Plan()
    fractions = parse_fractions(args.fractions)
    plan.say("split", f"{args.json}, seed {args.seed}{', stratified' if args.stratified else ''}")
    labels = plan.read([args.json], lambda: read_labels(args.json, args.labeled_images, args.classes))
    if labels is not None:
        split_sizes(fractions, len(labels.file.content["images"]), args.json)
    plan.say("output", ", ".join(str(args.output / f"labeled_{name}.json") for name in fractions))
    return plan


def run(args: argparse.Namespace) -> None:
    manifest = make_splits(
        args.json or Path(args.labels),
        args.output,
        args.fractions,
        seed=args.seed,
        stratified=args.stratified,
        images=args.labeled_images,
        classes=args.classes,
    )
    print(f"{args.output}:")
    for name, counts in manifest["splits"].items():
        present = sum(number > 0 for number in counts["objects"].values())
        print(
            f"  {f'labeled_{name}.json':18} {counts['images']:6} images, "
            f"{sum(counts['objects'].values())} objects of {present} classes"
        )
