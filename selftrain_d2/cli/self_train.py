"""The whole loop on your own data: train a teacher, label the unlabeled images, train a student on both.

Stages are folders under --output: teacher/, pseudo_labels/, student/, with --control and --oracle what to compare the
student with; with --seeds a folder of them for each seed. Stop it at any time: the same command
goes on from there and redoes nothing that is finished. summary.md and summary.json come last.

    selftrain-d2 self-train --config-file neon_trees/lite0_256.yaml \\
        --labeled-json labeled.json --labeled-images photos --unlabeled-images more_photos \\
        --val-json val.json --val-images val_photos --output output

    selftrain-d2 self-train --config-file neon_trees/lite0_256.yaml \\
        --labels my_yolo/data.yaml --unlabeled-images more_photos --output output

    selftrain-d2 self-train --task segmentation --config-file aerial_digits/segmentor_lite0_128.yaml \\
        --classes background road tree --labeled-images photos --labeled-masks masks \\
        --unlabeled-images more_photos --val-images val_photos --val-masks val_masks --output output

Does self-training gain on data like yours? Label all, draw a few anew for each seed, and withhold the other labels:

    selftrain-d2 self-train --config-file neon_trees/lite0_256.yaml --labels my_yolo/data.yaml \\
        --draw 20 --seeds 0 1 2 3 4 --control --oracle --output output
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path

from detectron2.config import CfgNode

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.cli.common import (
    add_config_arguments,
    add_fit_anchors_argument,
    add_launch_arguments,
    processes_of,
    setup_config,
)
from selftrain_d2.cli.jobs import add_jobs_arguments, devices_of, run_seeds
from selftrain_d2.cli.label_arguments import add_labels_argument, add_val_labels_argument, labels_as_coco
from selftrain_d2.data.image_sources import check_outside
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.engine.loop.options import LoopOptions
from selftrain_d2.engine.loop.pipeline import self_train
from selftrain_d2.engine.loop.seeds import (
    seed_folder,
    seeds_to_markdown,
    self_train_seeds,
    with_draw,
    with_seed,
)
from selftrain_d2.engine.loop.summary import to_markdown
from selftrain_d2.engine.loop.tasks import TASKS, Task
from selftrain_d2.engine.process_group import in_torchrun, main_process_leads
from selftrain_d2.errors import InputError

# Arguments of one task alone -> its field.
_OWN_ARGUMENTS = {
    "detection": {
        "--labeled-json": "labeled_json",
        "--val-json": "validation_json",
        "--unlabeled-truth-json": "unlabeled_truth_json",
    },
    "segmentation": {
        "--labeled-masks": "labeled_masks",
        "--classes": "classes",
        "--val-masks": "validation_masks",
        "--unlabeled-truth-masks": "unlabeled_truth_masks",
    },
}
_TEACHERS = {"labels": "labels", "moving-average": "moving_average"}  # -> SELFTRAIN.TEACHER
_NEEDED = {"detection": ("--labeled-json",), "segmentation": ("--labeled-masks", "--classes")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument(
        "--task", choices=list(TASKS), default="detection", help="boxes (the default) or masks of pixels"
    )
    parser.add_argument(
        "--labeled-images",
        metavar="FOLDER",
        help="images with human labels; YOLO and VOC know theirs",
    )
    parser.add_argument(
        "--unlabeled-images",
        nargs="+",
        metavar="PLACE",
        help="images without labels: folders, lists (.txt), COCO files (.json), tar archives; those among them that "
        "are labeled or of validation are left out; before another --argument",
    )
    parser.add_argument(
        "--unlabeled-root",
        metavar="FOLDER",
        help="what paths in lists and COCO files of --unlabeled-images are relative to (default: the file's folder)",
    )
    parser.add_argument("--val-images", metavar="FOLDER", help="images with human labels to evaluate on")
    boxes = parser.add_argument_group("detection")
    add_labels_argument(boxes)
    add_val_labels_argument(boxes)
    boxes.add_argument("--labeled-json", metavar="JSON", help="human labels, in COCO JSON")
    boxes.add_argument("--val-json", metavar="JSON", help="those of --val-images")
    boxes.add_argument(
        "--unlabeled-truth-json",
        metavar="JSON",
        help="labels of the unlabeled images, if there are any: to judge the pseudo labels by, and for --oracle",
    )
    masks = parser.add_argument_group(
        "segmentation",
        "The mask of images/a/b.jpg is masks/a/b.png: class ids from 0, 255 to ignore a pixel.",
    )
    masks.add_argument("--labeled-masks", metavar="FOLDER", help="human masks, as PNG")
    masks.add_argument("--val-masks", metavar="FOLDER", help="those of --val-images")
    masks.add_argument(
        "--unlabeled-truth-masks",
        metavar="FOLDER",
        help="masks of the unlabeled images, if there are any: to judge the pseudo masks by, and for --oracle",
    )
    masks.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="class names by id, the first that of 0, of masks, or of --labels in a folder of .txt files; before "
        "another --argument",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the stages and the summary")
    parser.add_argument(
        "--teacher",
        choices=list(_TEACHERS),
        help="labels (the default): label the unlabeled images once; moving-average: a moving average of the student "
        "labels those of each training step (SELFTRAIN.TEACHER)",
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="with N > 1 the student becomes the teacher"
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="make all rounds, also after one whose teacher labels the labeled images worse than the one before",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="also train the teacher on for the student's steps on human labels alone, to compare with",
    )
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="also train a student on the true labels of the unlabeled images in place of the pseudo labels: the "
        "ceiling of what these can give",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        metavar="N",
        help="run the loop for each of these seeds, in DIR/seed_N, and sum up means and intervals; before another "
        "--argument",
    )
    parser.add_argument(
        "--draw",
        type=int,
        metavar="N",
        help="with --seeds: each seed draws N of the labeled images; the others are its unlabeled images, and their "
        "labels are withheld (--oracle has them)",
    )
    add_jobs_arguments(parser, "seeds")
    parser.add_argument("--one-seed", type=int, help=argparse.SUPPRESS)  # of --seeds: what --jobs starts
    parser.add_argument(
        "--score-floor",
        type=float,
        default=0.05,
        metavar="S",
        help="write only pseudo boxes, or pixels, of at least this score",
    )
    add_fit_anchors_argument(parser)
    add_launch_arguments(parser)
    add_config_arguments(parser)


def when_stopped(args: argparse.Namespace) -> str:
    """How to go on."""
    return "the same command goes on from here"


def run(args: argparse.Namespace) -> None:
    """Run the loop and print its summary."""
    log_to_console()
    cfg = setup_config(args)
    with main_process_leads(cfg.MODEL.DEVICE) as leads:
        if leads:
            _run(args, cfg)


def _run(args: argparse.Namespace, cfg: CfgNode) -> None:
    task = _task(args)
    seeds, devices = _seeds(args), devices_of(args)
    if args.teacher is not None:
        cfg.SELFTRAIN.TEACHER = _TEACHERS[args.teacher]
    options = LoopOptions(
        rounds=args.rounds,
        control=args.control,
        oracle=args.oracle,
        keep_going=args.keep_going,
        score_floor=args.score_floor,
        fit_anchors=args.fit_anchors,
        allow_unsafe=args.allow_unsafe,
        processes=processes_of(args),
    )
    if args.one_seed is not None:
        seed = args.one_seed
        task = task if args.draw is None else with_draw(task, args.output, seed, args.draw)
        self_train(with_seed(cfg, seed), task, seed_folder(args.output, seed), options)
    elif seeds:
        run_all = functools.partial(run_seeds, args.words, args.output, devices) if devices.jobs > 1 else None
        summary = self_train_seeds(
            cfg, task, args.output, seeds, run_all, jobs=devices.jobs, draw=args.draw, options=options
        )
        print("\n" + seeds_to_markdown(summary))
    else:
        print("\n" + to_markdown(self_train(cfg, task, args.output, options)))


def _seeds(args: argparse.Namespace) -> list[int]:
    """Those of --seeds; none without it.

    Raises:
        InputError: one is no seed or is named twice, or another argument says otherwise.
    """
    words = args.seeds or []
    seeds = [int(word) for word in words if word.isdecimal()]
    for word in words:
        if not word.isdecimal():
            raise InputError(
                f"--seeds took {word} for a seed, which is no whole number from 0: put another --argument, or --, "
                "after the seeds."
            )
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise InputError(f"--seeds names {seed} twice.")
    if words and "SEED" in args.opts:
        raise InputError("--seeds sets SEED for each of its runs: leave one of the two out.")
    if in_torchrun() and (args.jobs is not None or args.devices is not None):
        raise InputError(
            "torchrun's processes make one seed after the other: leave out --jobs and --devices, or torchrun."
        )
    if not words and (args.jobs is not None or args.devices is not None):
        raise InputError("--jobs and --devices are about several seeds: give --seeds, or leave them out.")
    return seeds


def _fill_in_labels(args: argparse.Namespace) -> None:
    """Put what ``--labels`` and ``--val-labels`` name in the place of the arguments for COCO JSON.

    Raises:
        InputError: they do not go with the others, or have a fault.
    """
    if args.task != "detection":
        raise InputError("--labels and --val-labels go with --task detection.")
    for name, other in (("--labels", args.labeled_json), ("--val-labels", args.val_labels and args.val_json)):
        if other is not None:
            raise InputError(f"{name} takes COCO JSON as well: leave the other argument out.")
    for place in filter(os.path.isdir, args.unlabeled_images or []):  # before anything is written there
        check_outside(args.output, place)
    use_split = args.val_json is None
    labeled, validation = labels_as_coco(
        args, Path(args.output, "labels"), classes=args.classes, use_split=use_split
    )
    args.labeled_json, args.labeled_images = labeled
    args.classes = None
    if validation is not None:
        args.val_json, args.val_images = validation


def _check_draw(args: argparse.Namespace) -> None:
    """Raise InputError where ``--draw`` does not go with other arguments, or unlabeled images are missing."""
    if args.draw is None:
        if not args.unlabeled_images:
            raise InputError(
                "--unlabeled-images is missing: the images without labels; or draw them from the labeled ones with "
                "--draw N --seeds 0 1 2."
            )
        return
    if args.task != "detection":
        raise InputError("--draw goes with --task detection.")
    if args.seeds is None and args.one_seed is None:
        raise InputError("--draw draws labeled images for each of several seeds: give --seeds.")
    for name in ("unlabeled_images", "unlabeled_root", "unlabeled_truth_json"):
        if getattr(args, name) is not None:
            raise InputError(
                f"--draw takes the labeled images that are not drawn as the unlabeled ones: leave "
                f"--{name.replace('_', '-')} out."
            )


def _task(args: argparse.Namespace) -> Task:
    """The task with its data.

    Raises:
        InputError: an argument is missing, or is one of the other task.
    """
    _check_draw(args)
    if args.labels is not None or args.val_labels is not None:
        _fill_in_labels(args)
    if args.labeled_images is None:
        raise InputError("--labeled-images is missing: the folder of the images with human labels.")
    given = vars(args)
    values = {}
    for task, arguments in _OWN_ARGUMENTS.items():
        for argument, field in arguments.items():
            value = given[argument.lstrip("-").replace("-", "_")]
            if task == args.task:
                if value is None and argument in _NEEDED[task]:
                    other = ", or --labels" if task == "detection" else ""
                    raise InputError(f"--task {task} needs {argument}{other}.")
                values[field] = value
            elif value is not None:
                raise InputError(f"{argument} goes with --task {task}, not with {args.task}.")
    images = args.labeled_images, args.unlabeled_images or [], args.val_images, args.unlabeled_root
    return TASKS[args.task](*images, **values)
