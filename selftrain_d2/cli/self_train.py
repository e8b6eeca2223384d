"""The whole loop on your own data: train a teacher, label the unlabeled images, train a student on both.

Stages are folders under --output: teacher/, pseudo_labels/, student/. Stop it at any time: the same command
goes on from there and redoes nothing that is finished. summary.md and summary.json come last.

    selftrain-d2 self-train --config-file neon_trees/lite0_256.yaml \\
        --labeled-json labeled.json --labeled-images photos --unlabeled-images more_photos \\
        --val-json val.json --val-images val_photos --output output
"""

from __future__ import annotations

import argparse

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.cli.common import add_config_arguments, add_launch_arguments, processes_of, setup_config
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.engine.pipeline import SelfTrainingData, self_train
from selftrain_d2.engine.summary import to_markdown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("--labeled-json", required=True, metavar="JSON", help="human labels, in COCO JSON")
    parser.add_argument("--labeled-images", required=True, metavar="FOLDER", help="the images it names")
    parser.add_argument(
        "--unlabeled-images", required=True, metavar="FOLDER", help="images without labels, nested or not"
    )
    parser.add_argument("--val-json", metavar="JSON", help="human labels to evaluate on, in COCO JSON")
    parser.add_argument("--val-images", metavar="FOLDER", help="the images it names")
    parser.add_argument(
        "--unlabeled-truth-json",
        metavar="JSON",
        help="labels of the unlabeled images, if there are any: only to judge the pseudo labels by",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the stages and the summary")
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="with N > 1 the student becomes the teacher"
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="also train the teacher on for the student's steps on human labels alone, to compare with",
    )
    parser.add_argument(
        "--score-floor",
        type=float,
        default=0.05,
        metavar="S",
        help="write only pseudo boxes of at least this score",
    )
    add_launch_arguments(parser)
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the loop and print its summary."""
    log_to_console()
    cfg = setup_config(args)
    data = SelfTrainingData(
        labeled_json=args.labeled_json,
        labeled_images=args.labeled_images,
        unlabeled_images=args.unlabeled_images,
        validation_json=args.val_json,
        validation_images=args.val_images,
        unlabeled_truth_json=args.unlabeled_truth_json,
    )
    summary = self_train(
        cfg,
        data,
        args.output,
        rounds=args.rounds,
        control=args.control,
        score_floor=args.score_floor,
        allow_unsafe=args.allow_unsafe,
        processes=processes_of(args),
    )
    print("\n" + to_markdown(summary))
