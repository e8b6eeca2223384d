"""Make a pseudo-label folder of a COCO JSON, such as an exported one that people corrected.

Boxes keep their scores; those without one, which people drew, get 1. To train on the file as human labels,
give it to `train` or `self-train` as it is.

    selftrain-d2 import corrected.json --images photos --output corrected_labels
"""

from __future__ import annotations

import argparse

from selftrain_d2.data.pseudo_labels.exchange import import_coco
from selftrain_d2.engine.logs import log_to_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("json", metavar="JSON", help="boxes in COCO JSON")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="the images that it names")
    parser.add_argument("--output", required=True, metavar="DIR", help="the pseudo-label folder to write")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="class names in the order of training, if the file has them in another order or not all of them",
    )


def run(args: argparse.Namespace) -> None:
    """Write the folder."""
    log_to_console()
    manifest = import_coco(args.json, args.images, args.output, thing_classes=args.classes)
    print(
        f"{args.output}: {manifest['labeled']} images with {manifest['boxes']} boxes, {manifest['empty']} without"
    )
