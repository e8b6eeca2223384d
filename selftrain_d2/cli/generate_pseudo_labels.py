"""Write pseudo labels on unlabeled images with a trained teacher.

The output folder holds every box above a low score floor, with its score; the threshold for training is
applied when the labels are loaded. Stop it at any time: the same command goes on from there.

    selftrain-d2 label --config-file neon_trees/lite0_256.yaml --images photos --output pseudo_labels \\
        MODEL.WEIGHTS output/teacher/model_final.pth
"""

from __future__ import annotations

import argparse
import os

from detectron2.data import DatasetCatalog, MetadataCatalog

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.cli.common import add_config_arguments, add_launch_arguments, processes_of, setup_config
from selftrain_d2.data.datasets import list_images
from selftrain_d2.engine.launch import run_in_processes
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.generate import generate_pseudo_labels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="FOLDER", help="a folder of images, nested or not")
    source.add_argument("--dataset", metavar="NAME", help="a dataset that detectron2 ships")
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
    if args.images is not None:
        image_root, file_names = args.images, list_images(args.images)
    else:
        image_root, file_names = _images_of(args.dataset)
    run_in_processes(_label, processes_of(args), (cfg, image_root, file_names, args))


def _label(cfg, image_root, file_names, args) -> None:
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


def _images_of(dataset: str) -> tuple[str, list[str]]:
    if dataset not in DatasetCatalog:
        raise InputError(f"There is no dataset named {dataset!r}; known: {', '.join(DatasetCatalog.list())}.")
    try:
        paths = [d["file_name"] for d in DatasetCatalog.get(dataset)]
    except FileNotFoundError as error:
        raise InputError(f"The files of dataset {dataset!r} are not there: {error}.") from error
    image_root = MetadataCatalog.get(dataset).get("image_root") or os.path.commonpath(paths)
    return image_root, [os.path.relpath(path, image_root) for path in paths]
