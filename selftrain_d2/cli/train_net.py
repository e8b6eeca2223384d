"""Train a teacher or a student from a config file, or evaluate one.

A config with DATASETS.PSEUDO_TRAIN describes a student, one without it a teacher. Datasets are those that
detectron2 ships, and those registered by the options below.

    selftrain-d2 train --config-file neon_trees/lite0_256.yaml \\
        --human-labels trees data/trees.json data/images DATASETS.TRAIN "('trees',)" OUTPUT_DIR output/teacher
"""

from __future__ import annotations

import argparse

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.cli.common import add_config_arguments, add_launch_arguments, processes_of, setup_config
from selftrain_d2.engine.launch import evaluate, human_labels, pseudo_labels, train
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument(
        "--human-labels",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help="register a COCO JSON and its image folder under a name; may be repeated",
    )
    parser.add_argument(
        "--pseudo-labels",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FOLDER"),
        help="register a pseudo-label folder under a name, with the boxes that SELFTRAIN.SCORE_THRESH, "
        "SCORE_THRESH_BY_CLASS, TOP_K and BOXES_PER_IMAGE select; may be repeated",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    add_launch_arguments(parser)
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Train, or evaluate."""
    log_to_console()
    cfg = setup_config(args)
    cfg.freeze()
    datasets = [human_labels(*words) for words in args.human_labels]
    datasets += [pseudo_labels(*words, cfg) for words in args.pseudo_labels]
    if args.eval_only:
        if not cfg.DATASETS.TEST or not cfg.MODEL.WEIGHTS:
            raise InputError("--eval-only needs DATASETS.TEST and MODEL.WEIGHTS.")
        evaluate(cfg, datasets, allow_unsafe=args.allow_unsafe, processes=processes_of(args))
    else:
        train(cfg, datasets, resume=args.resume, allow_unsafe=args.allow_unsafe, processes=processes_of(args))
