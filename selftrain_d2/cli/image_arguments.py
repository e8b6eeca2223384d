"""The arguments that name unlabeled images: a folder, a list, COCO JSON, tar archives, or a registered dataset.

And those on how large images are cut.
"""

from __future__ import annotations

import argparse

from selftrain_d2.data.image_sources import (
    ImageSource,
    check_outside,
    images_of_archives,
    images_of_coco_json,
    images_of_dataset,
    images_of_folder,
    images_of_list,
)
from selftrain_d2.data.tiles import Tiles
from selftrain_d2.errors import InputError

_OVERLAP = 0.2


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--images``, ``--image-list``, ``--coco-json``, ``--archive``, ``--dataset`` and ``--image-root``."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="FOLDER", help="a folder of images, nested or not")
    source.add_argument(
        "--image-list",
        metavar="FILE",
        help="a text file of image paths, one a line; a line that begins with # is a comment",
    )
    source.add_argument("--coco-json", metavar="JSON", help="the images of a COCO JSON, labeled or not")
    source.add_argument(
        "--archive",
        nargs="+",
        metavar="TAR",
        help="uncompressed tar files (WebDataset shards), e.g. 'shard-{000..012}.tar'; before other --arguments",
    )
    source.add_argument("--dataset", metavar="NAME", help="a dataset that detectron2 ships")
    parser.add_argument(
        "--image-root",
        metavar="FOLDER",
        help="what paths in --image-list (default: the list's folder) and --coco-json are relative to",
    )


def add_tile_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add ``--tile`` and ``--overlap``."""
    parser.add_argument(
        "--tile",
        type=int,
        required=required,
        metavar="N",
        help="cut images into tiles of N x N pixels; boxes are those of the whole images"
        if not required
        else "side of a tile, in pixels",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        metavar="F",
        help=f"share of a tile's side that neighbours have in common (default {_OVERLAP})",
    )


def tiles_of(args: argparse.Namespace) -> Tiles | None:
    """What the arguments of :func:`add_tile_arguments` say.

    Raises:
        InputError: a number is out of range, or ``--overlap`` is given alone.
    """
    if args.tile is None:
        if args.overlap is not None:
            raise InputError("--overlap goes with --tile: give the side of a tile as well.")
        return None
    return Tiles(args.tile, _OVERLAP if args.overlap is None else args.overlap)


def given_images(args: argparse.Namespace) -> list[str]:
    """The words that name the images: paths, patterns of archives, or the name of a dataset.

    Raises:
        InputError: ``--image-root`` is missing or out of place.
    """
    if args.coco_json is not None and args.image_root is None:
        raise InputError("--coco-json needs --image-root, the folder that its file names are relative to.")
    if args.image_root is not None and args.image_list is None and args.coco_json is None:
        raise InputError("--image-root goes with --image-list and --coco-json alone: leave it out.")
    return args.archive or [args.images or args.image_list or args.coco_json or args.dataset]


def images_of(args: argparse.Namespace) -> ImageSource:
    """What the arguments of :func:`add_image_arguments` name, for a command that has ``--output`` as well.

    Raises:
        InputError: see :mod:`selftrain_d2.data.image_sources`; ``--image-root`` is missing or out of place; or the
            output folder lies in the folder of images.
    """
    given_images(args)
    if args.image_list is not None:
        return images_of_list(args.image_list, args.image_root)
    if args.coco_json is not None:
        return images_of_coco_json(args.coco_json, args.image_root)
    if args.archive is not None:
        return images_of_archives(args.archive)
    if args.images is not None:
        check_outside(args.output, args.images)
        return images_of_folder(args.images)
    return images_of_dataset(args.dataset)
