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
from selftrain_d2.cli.dry_run import Plan, files_of_dataset
from selftrain_d2.cli.image_arguments import (
    add_image_arguments,
    add_tile_arguments,
    given_images,
    images_of,
    tiles_of,
)
from selftrain_d2.data.training_sets import check_registered
from selftrain_d2.engine.checks import build_without_memory
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.engine.process_group import run_in_processes
from selftrain_d2.labeling.generate import check_labeling, generate_pseudo_labels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    add_image_arguments(parser)
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
    add_tile_arguments(parser)
    add_launch_arguments(parser)
    add_config_arguments(parser)


def when_stopped(args: argparse.Namespace) -> str:
    """How to go on."""
    return "the same command goes on from here"


def run(args: argparse.Namespace) -> None:
    """Label the images."""
    log_to_console()
    tiles_of(args)
    cfg = setup_config(args)
    cfg.freeze()
    image_root, file_names = images_of(args)
    run_in_processes(_label, processes_of(args), (cfg, image_root, file_names, args), cfg.MODEL.DEVICE)


def plan(args: argparse.Namespace) -> Plan:
    """What :func:`run` would do."""
    cfg, plan = setup_config(args), Plan()
    cfg.freeze()
    check_labeling(cfg, args.score_floor, args.batch_size)
    tiles = tiles_of(args)
    files = given = given_images(args)
    if args.dataset is not None:
        check_registered("--dataset", given)
        files = files_of_dataset(args.dataset)
    elif args.archive is not None:
        files = []  # patterns: what matches none is a mistake
    source = plan.read([*files, *filter(None, [args.image_root])], lambda: images_of(args))
    number = "" if source is None else f", {len(source.file_names):,} images"
    plan.say("config", args.config_file)
    plan.model(cfg, build_without_memory(cfg))
    plan.weights(cfg)
    plan.say("label", f"{' '.join(given)}{number}, with scores of at least {args.score_floor:g}")
    if tiles is not None:
        plan.say("tiles", f"{tiles.size} x {tiles.size} pixels, {tiles.overlap_pixels} of them shared")
    plan.processes(processes_of(args), cfg.MODEL.DEVICE)
    plan.say("output", args.output)
    return plan


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
        tiles=tiles_of(args),
        allow_unsafe=args.allow_unsafe,
    )
