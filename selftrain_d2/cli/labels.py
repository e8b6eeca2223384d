"""Convert labels between COCO JSON, YOLO and PASCAL VOC.

    selftrain-d2 labels convert my_yolo/data.yaml labels.json
    selftrain-d2 labels convert labels.json my_voc --to voc --images photos
    selftrain-d2 labels convert predictions labels.json --images photos --classes tree car

Formats are told apart by what is there. Scores of pseudo labels go along.
"""

from __future__ import annotations

import argparse

from selftrain_d2.data.label_formats.convert import FORMATS, format_of, write_labels
from selftrain_d2.data.label_formats.detect import read_labels
from selftrain_d2.engine.logs import log_to_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    _add_convert(commands)


def run(args: argparse.Namespace) -> None:
    """Run the sub-command."""
    log_to_console()
    args.run(args)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="write labels in another format")
    parser.add_argument(
        "source", metavar="SRC", help="COCO JSON, a YOLO data.yaml or folder, or a VOC folder"
    )
    parser.add_argument("destination", metavar="DST", help="a .json file, or a new folder")
    parser.add_argument("--to", choices=FORMATS, help="format of DST, if its ending does not tell")
    parser.add_argument("--images", metavar="FOLDER", help="the images, where the format does not know them")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="class names by id; after SRC and DST")
    parser.add_argument("--split", default="train", metavar="SPLIT", help="train (the default), val or test")
    parser.add_argument("--copy-images", action="store_true", help="copy the images instead of linking them")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    to = format_of(args.destination, args.to)
    labels = read_labels(args.source, images=args.images, classes=args.classes, split=args.split)
    if labels.has_validation:
        print(f"{args.source}: split {args.split}; the others are left (--split val).")
    counts = write_labels(labels, args.destination, to, copy_images=args.copy_images)
    said = ", ".join(
        f"{number} {what}" for what, number in counts.items() if number or what in ("images", "boxes")
    )
    print(f"{args.destination}: {said}")
    if to == "coco" and labels.image_root is not None:
        print(f"Image folder: {labels.image_root}")
