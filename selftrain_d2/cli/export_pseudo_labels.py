"""Write pseudo labels as COCO JSON, to look at and correct them in FiftyOne, CVAT or Label Studio.

`selftrain-d2 import` brings the corrected file back as pseudo labels; as human labels it is taken as it is.

    selftrain-d2 export pseudo_labels pseudo_labels.json --score-thresh 0.5
"""

from __future__ import annotations

import argparse

from selftrain_d2.data.pseudo_labels.exchange import export_coco
from selftrain_d2.data.pseudo_labels.manifest import read_manifest_of_boxes
from selftrain_d2.data.pseudo_labels.selection import with_exceptions
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("folder", metavar="DIR", help="a pseudo-label folder")
    parser.add_argument("json", metavar="JSON", help="the file to write")
    parser.add_argument(
        "--score-thresh",
        type=float,
        default=0.5,
        metavar="S",
        help="boxes of at least this score (default 0.5)",
    )
    parser.add_argument(
        "--class-thresh",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "S"),
        help="another score for one class; may be repeated",
    )
    parser.add_argument(
        "--boxes-per-image",
        type=float,
        metavar="N",
        help="in place of scores: so many boxes an image on average, the best of the folder",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="only the best K boxes of each image")


def run(args: argparse.Namespace) -> None:
    """Write the file."""
    log_to_console()
    class_names = read_manifest_of_boxes(args.folder)["thing_classes"]
    by_class = {name: _number(name, text) for name, text in args.class_thresh}
    written = export_coco(
        args.folder,
        args.json,
        with_exceptions(args.score_thresh, by_class, class_names),
        top_k=args.top_k,
        boxes_per_image=args.boxes_per_image,
    )
    print(f"{args.json}: {written['images']} images, {written['annotations']} boxes")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--class-thresh {name} {text}: {text!r} is no number.") from None
