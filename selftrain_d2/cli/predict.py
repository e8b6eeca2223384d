"""Detect objects, or label pixels, in images or a video with a trained model.

DIR has predictions.json (COCO results), predictions.csv and pictures; of a video, a video.

    selftrain-d2 predict output/student --images photos more/a.jpg --output predictions
    selftrain-d2 predict output/student --images clip.mp4 --output predictions
    selftrain-d2 predict output/student --images aerial.tif --tile 640 --output predictions
"""

from __future__ import annotations

import argparse

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.cli.common import add_run_arguments, config_of_run
from selftrain_d2.cli.image_arguments import add_tile_arguments, tiles_of
from selftrain_d2.deployment.detector import Detector
from selftrain_d2.deployment.predict import predict
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument(
        "--images",
        required=True,
        nargs="+",
        metavar="PLACE",
        help="image files, folders, lists (.txt), COCO files (.json; a single one gives the ids), tar archives, or one "
        "video file",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--image-root", metavar="FOLDER", help="what paths in lists and COCO files are relative to"
    )
    parser.add_argument(
        "--score-thresh",
        type=float,
        default=0.5,
        metavar="S",
        help="pictures show boxes of at least this score (default 0.5); the files have all that evaluation counts",
    )
    parser.add_argument("--no-pictures", action="store_true", help="write the files alone")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="images per forward pass (default 8)"
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="class names by id, for weights that do not carry them"
    )
    add_tile_arguments(parser)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Predict, and say how much was found.

    Raises:
        InputError: see :func:`selftrain_d2.deployment.predict.predict`.
    """
    log_to_console()
    if not 0 <= args.score_thresh <= 1:
        raise InputError(f"--score-thresh must be in [0, 1], not {args.score_thresh}.")
    detector = Detector(
        config_of_run(args),
        batch_size=args.batch_size,
        class_names=args.classes,
        tiles=tiles_of(args),
        allow_unsafe=args.allow_unsafe,
    )
    found = predict(
        detector,
        args.images,
        args.output,
        image_root=args.image_root,
        pictures=not args.no_pictures,
        score_thresh=args.score_thresh,
    )
    print(
        f"{args.output}: {found['predictions']} predictions of {found['images']} images, {len(found['skipped'])} "
        "skipped."
    )
