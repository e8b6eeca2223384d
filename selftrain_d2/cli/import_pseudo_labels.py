"""Make a pseudo-label folder of labels or predictions in files: COCO JSON, COCO results, YOLO or PASCAL VOC.

Boxes keep their scores; those without one, which people drew, get 1. To train on the file as human labels,
give it to `train` or `self-train` as it is.

    selftrain-d2 import corrected.json --images photos --output corrected_labels
    selftrain-d2 import results.json --image-json images.json --images photos --output their_labels
    selftrain-d2 import predict/labels --images photos --output their_labels --classes tree car
"""

from __future__ import annotations

import argparse

from selftrain_d2.data.pseudo_labels.exchange import import_predictions
from selftrain_d2.engine.logs import log_to_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("path", metavar="PATH", help="COCO JSON or results, or a folder of YOLO or VOC files")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="the images that it names")
    parser.add_argument("--output", required=True, metavar="DIR", help="the pseudo-label folder to write")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="class names in the order of training, if the file has them in another order or not all of them; of a "
        "YOLO folder by its ids",
    )
    parser.add_argument(
        "--image-json",
        metavar="JSON",
        help="COCO JSON with the images and categories that COCO results speak of",
    )


def run(args: argparse.Namespace) -> None:
    """Write the folder."""
    log_to_console()
    manifest = import_predictions(
        args.path, args.images, args.output, thing_classes=args.classes, image_json=args.image_json
    )
    print(
        f"{args.output}: {manifest['labeled']} images with {manifest['boxes']} boxes, {manifest['empty']} without"
    )
