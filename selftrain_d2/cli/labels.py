"""Convert labels between COCO JSON, YOLO and PASCAL VOC; cut a data set of large images into tiles.

    selftrain-d2 labels convert my_yolo/data.yaml labels.json
    selftrain-d2 labels convert labels.json my_voc --to voc --images photos
    selftrain-d2 labels convert predictions labels.json --images photos --classes tree car
    selftrain-d2 labels tile labels.json tiles --images photos --tile 640 --overlap 0.2

Formats are told apart by what is there. Scores of pseudo labels go along.
"""

from __future__ import annotations

import argparse
from collections import Counter

from selftrain_d2.cli.image_arguments import add_tile_arguments, tiles_of
from selftrain_d2.data.label_formats.convert import FORMATS, format_of, write_labels
from selftrain_d2.data.label_formats.detect import read_labels
from selftrain_d2.data.label_formats.label_set import LabelSet
from selftrain_d2.data.tiled_labels import IMAGES, LABELS, tile_labels
from selftrain_d2.engine.logs import log_to_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_tile(commands)


def when_stopped(args: argparse.Namespace) -> str:
    """How to go on."""
    return "the same command goes on from here" if args.subcommand == "tile" else f"delete {args.destination}"


def run(args: argparse.Namespace) -> None:
    """Run the sub-command."""
    log_to_console()
    args.run(args)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="write labels in another format")
    _add_paths(parser, "a .json file, or a new folder")
    parser.add_argument("--to", choices=FORMATS, help="format of DST, if its ending does not tell")
    parser.add_argument("--copy-images", action="store_true", help="copy the images instead of linking them")
    parser.set_defaults(run=_convert)


def _add_paths(parser: argparse.ArgumentParser, destination: str) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="COCO JSON, a YOLO data.yaml or folder, or a VOC folder"
    )
    parser.add_argument("destination", metavar="DST", help=destination)
    parser.add_argument("--images", metavar="FOLDER", help="the images, where the format does not know them")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="class names by id; after SRC and DST")
    parser.add_argument("--split", default="train", metavar="SPLIT", help="train (the default), val or test")


def _read(args: argparse.Namespace) -> LabelSet:
    labels = read_labels(args.source, images=args.images, classes=args.classes, split=args.split)
    if labels.has_validation:
        print(f"{args.source}: split {args.split}; the others are left (--split val).")
    return labels


def _convert(args: argparse.Namespace) -> None:
    to = format_of(args.destination, args.to)
    labels = _read(args)
    counts = write_labels(labels, args.destination, to, copy_images=args.copy_images)
    print(f"{args.destination}: {_said(counts, 'images', 'boxes')}")
    if to == "coco" and labels.image_root is not None:
        print(f"Image folder: {labels.image_root}")


def _add_tile(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("tile", help="cut large images and their labels into tiles, to train on")
    _add_paths(parser, f"folder: {IMAGES}/ and {LABELS} (COCO); a stopped command goes on there")
    add_tile_arguments(parser, required=True)
    parser.add_argument(
        "--min-visible",
        type=float,
        default=0.5,
        metavar="F",
        help="a tile that shows less of a box's area has a region to ignore (iscrowd) there (default 0.5)",
    )
    parser.add_argument("--drop-empty", action="store_true", help="leave out tiles without an object")
    parser.set_defaults(run=_tile)


def _tile(args: argparse.Namespace) -> None:
    tiles = tiles_of(args)
    counts = tile_labels(
        _read(args), args.destination, tiles, min_visible=args.min_visible, drop_empty=args.drop_empty
    )
    print(f"{args.destination}: {_said(counts, 'images', 'tiles', 'objects')}")


def _said(counts: Counter, *always: str) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items() if number or what in always)
