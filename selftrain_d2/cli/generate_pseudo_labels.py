"""Write pseudo labels on unlabeled images with a trained teacher.

The output folder holds every box above a low score floor, with its score; the threshold for training is
applied when the labels are loaded. Images that cannot be read are skipped; manifest.json has their names
and the reasons. Stop it at any time: the same command goes on from there.

    selftrain-d2 label --config-file neon_trees/lite0_256.yaml --images photos --output pseudo_labels \\
        MODEL.WEIGHTS output/teacher/model_final.pth
"""

from __future__ import annotations

import argparse

from detectron2.utils import comm

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.cli.common import add_config_arguments, add_launch_arguments, processes_of, setup_config
from selftrain_d2.data.image_sources import (
    ImageSource,
    images_of_archives,
    images_of_coco_json,
    images_of_dataset,
    images_of_folder,
    images_of_list,
)
from selftrain_d2.engine.launch import run_in_processes
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.generate import generate_pseudo_labels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="FOLDER", help="a folder of images, nested or not")
    source.add_argument(
        "--image-list", metavar="FILE", help="a text file of image paths, one a line; # begins a comment"
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
    parser.add_argument("--output", required=True, metavar="DIR", help="the pseudo-label folder to write")
    parser.add_argument(
        "--score-floor",
        type=float,
        default=0.05,
        metavar="S",
        help="write only boxes of at least this score (default 0.05)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="images per forward pass (default 8)"
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="class names in the order of training, for weights that do not carry them",
    )
    add_launch_arguments(parser)
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Label the images."""
    log_to_console()
    cfg = setup_config(args)
    cfg.freeze()
    image_root, file_names = _images(args)
    run_in_processes(_label, processes_of(args), (cfg, image_root, file_names, args))


def _images(args: argparse.Namespace) -> ImageSource:
    if args.image_list is not None:
        return images_of_list(args.image_list, args.image_root)
    if args.coco_json is not None:
        if args.image_root is None:
            raise InputError(
                "--coco-json needs --image-root, the folder that its file names are relative to."
            )
        return images_of_coco_json(args.coco_json, args.image_root)
    if args.image_root is not None:
        raise InputError("--image-root goes with --image-list and --coco-json alone: leave it out.")
    if args.archive is not None:
        return images_of_archives(args.archive)
    if args.images is not None:
        return images_of_folder(args.images)
    return images_of_dataset(args.dataset)


def _label(cfg, image_root, file_names, args) -> None:
    if comm.get_world_size() > 1 and comm.is_main_process():  # a new process
        log_to_console()
    generate_pseudo_labels(
        cfg,
        image_root,
        file_names,
        args.output,
        score_floor=args.score_floor,
        batch_size=args.batch_size,
        thing_classes=args.classes,
        allow_unsafe=args.allow_unsafe,
    )
