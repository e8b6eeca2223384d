"""Train a teacher or a student from a config file, or evaluate one.

A config with DATASETS.PSEUDO_TRAIN describes a student, one without it a teacher. Datasets are those that
detectron2 ships, and those registered by the options below.

    selftrain-d2 train --config-file neon_trees/lite0_256.yaml \\
        --human-labels trees data/trees.json data/images DATASETS.TRAIN "('trees',)" OUTPUT_DIR output/teacher

    selftrain-d2 train --config-file my_segmentor.yaml --classes background road tree \\
        --human-masks streets photos masks DATASETS.TRAIN "('streets',)" OUTPUT_DIR output/teacher
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
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
from selftrain_d2.cli.dry_run import NamedDataset, Plan
from selftrain_d2.cli.label_arguments import add_labels_argument, add_val_labels_argument, labels_as_coco
from selftrain_d2.data.datasets import class_names
from selftrain_d2.data.image_sources import check_outside
from selftrain_d2.engine.anchor_fitting import with_fitted_anchors
from selftrain_d2.engine.box_reach import box_reach, fit_anchors
from selftrain_d2.engine.checks import build_without_memory, check_training
from selftrain_d2.engine.config_checks import check_number_of_classes, check_test_sets
from selftrain_d2.engine.launch import (
    classification_images,
    evaluate,
    human_labels,
    human_masks,
    pseudo_labels,
    registered,
    train,
    unlabeled_images,
)
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.engine.run_folder import check_run_folder
from selftrain_d2.errors import InputError

#: Name of the data set of --labels, and of the folder in OUTPUT_DIR for its COCO JSON.
LABELS = "labels"


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
    add_labels_argument(parser)
    parser.add_argument(
        "--labeled-images", metavar="FOLDER", help="images of --labels, if not where the format has them"
    )
    add_val_labels_argument(parser)
    parser.add_argument("--val-images", metavar="FOLDER", help="those of --val-labels")
    parser.add_argument(
        "--human-masks",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "IMAGES", "MASKS"),
        help="register a folder of images and one of masks under a name: the mask of IMAGES/a/b.jpg is MASKS/a/b.png, "
        "class ids from 0, 255 to ignore a pixel; may be repeated",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="class names by id, the first that of 0, of --human-masks, or of --labels in a folder of .txt files; "
        "before another --argument",
    )
    parser.add_argument(
        "--pseudo-labels",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FOLDER"),
        help="register a pseudo-label folder under a name, with the boxes that SELFTRAIN.SCORE_THRESH, "
        "SCORE_THRESH_BY_CLASS, TOP_K, BOXES_PER_IMAGE, THRESHOLDS and IGNORE_SCORE_THRESH select; may be repeated",
    )
    parser.add_argument(
        "--unlabeled-images",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FOLDER"),
        help="register a folder of images, nested or not, under a name, for DATASETS.PSEUDO_TRAIN where "
        "SELFTRAIN.TEACHER is moving_average; may be repeated",
    )
    parser.add_argument(
        "--classification-images",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FOLDER"),
        help="register a folder of images, one sub-folder a class, under a name, for DATASETS.CLASSIFICATION_TRAIN "
        "(joint training); may be repeated",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUTPUT_DIR, if there is one; without, the folder of a run is refused",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    parser.add_argument(
        "--weight-average",
        action="store_true",
        help="with --eval-only: evaluate the moving average that the checkpoint MODEL.WEIGHTS carries "
        "(SELFTRAIN.WEIGHT_EMA_DECAY)",
    )
    add_fit_anchors_argument(parser)
    add_launch_arguments(parser)
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Train, or evaluate."""
    log_to_console()
    cfg = _config(args, Path(LABELS))
    datasets = [dataset.make(*dataset.arguments) for dataset in _datasets(args, cfg)]
    if args.eval_only:
        options = {"allow_unsafe": args.allow_unsafe, "averaged": args.weight_average}
        evaluate(cfg, datasets, **options, processes=processes_of(args))
    else:
        if args.fit_anchors:
            cfg = with_fitted_anchors(cfg, datasets)
        train(cfg, datasets, resume=args.resume, allow_unsafe=args.allow_unsafe, processes=processes_of(args))


def when_stopped(args: argparse.Namespace) -> str:
    """How to go on."""
    if args.eval_only:
        return "the same command starts the evaluation again"
    command = "the same command" if args.resume else "the same command with --resume"
    return f"{command} goes on from the last checkpoint, if there is one"


def plan(args: argparse.Namespace) -> Plan:
    """What :func:`run` would do."""
    with tempfile.TemporaryDirectory() as folder:  # for labels that are not COCO's
        return _plan(args, _config(args, Path(folder)), Plan())


def _plan(args: argparse.Namespace, cfg: CfgNode, plan: Plan) -> Plan:
    plan.say("config", args.config_file)
    with registered(plan.datasets(_datasets(args, cfg))):
        if args.eval_only:
            check_test_sets(cfg)
            for name in set(cfg.DATASETS.TEST).difference(plan.unread):
                check_number_of_classes(cfg, name)
            plan.model(cfg, build_without_memory(cfg))
        else:
            model = check_training(cfg, args.num_gpus * args.num_machines, plan.unread)
            plan.model(cfg, model)
            plan.sources(cfg)
            plan.say(
                "augmentation", f"{cfg.INPUT.AUGMENTATION.POLICY}, {cfg.INPUT.AUGMENTATION.IMAGE_SIZE} pixels"
            )
            last = cfg.SELFTRAIN.REFINE_ITERS
            refined = f", the last {last:,} on human labels alone" if last else ""
            plan.say(
                "schedule", f"{cfg.SOLVER.MAX_ITER:,} steps, learning rate {cfg.SOLVER.BASE_LR:g}{refined}"
            )
        if not args.eval_only:
            check_run_folder(cfg.OUTPUT_DIR, args.resume)
        plan.weights(cfg, resumed=args.resume)
        plan.catalog("evaluate on", cfg.DATASETS.TEST)
        humans = plan.labels(cfg, training=not args.eval_only)
        if humans is not None:
            if args.fit_anchors:
                cfg = fit_anchors(cfg, model, humans)
                plan.say("anchor sizes", cfg.MODEL.ANCHOR_GENERATOR.SIZES)
            plan.reach(box_reach(cfg, model, humans, class_names(cfg.DATASETS.TRAIN[0])))
        plan.processes(processes_of(args), cfg.MODEL.DEVICE)
        plan.say("output", cfg.OUTPUT_DIR)
    return plan


def _config(args: argparse.Namespace, folder: Path) -> CfgNode:
    """The config; ``--labels`` become data sets that it names and that ``--human-labels`` registers.

    Args:
        folder: for labels that are not in COCO JSON; relative to OUTPUT_DIR.
    """
    cfg = setup_config(args)
    if any(given is not None for given in (args.labels, args.val_labels, args.labeled_images)):
        _register_labels(args, cfg, folder)
    cfg.freeze()
    if args.eval_only and not (cfg.DATASETS.TEST and cfg.MODEL.WEIGHTS):
        raise InputError("--eval-only needs DATASETS.TEST and MODEL.WEIGHTS.")
    if args.weight_average and not args.eval_only:
        raise InputError("--weight-average goes with --eval-only.")
    if args.eval_only and args.fit_anchors:
        raise InputError(
            "--fit-anchors goes with training: weights are evaluated with the anchors that they were trained with, "
            "which the config.yaml of their run has."
        )
    return cfg


def _register_labels(args: argparse.Namespace, cfg: CfgNode, folder: Path) -> None:
    classes = None if args.human_masks else args.classes
    use_split = "DATASETS.TEST" not in args.opts
    found = labels_as_coco(args, Path(cfg.OUTPUT_DIR) / folder, classes=classes, use_split=use_split)
    if not args.human_masks:
        args.classes = None
    for name, key, paths in zip((LABELS, f"{LABELS}_val"), ("TRAIN", "TEST"), found):
        if paths is not None:
            args.human_labels.append([name, *paths])
            if f"DATASETS.{key}" not in args.opts:
                cfg.DATASETS[key] = (name,)
        elif f"DATASETS.{key}" not in args.opts:
            cfg.DATASETS[key] = ()


def _datasets(args: argparse.Namespace, cfg: CfgNode) -> Iterator[NamedDataset]:
    """Those to register for the run: each with the files it is read from, and what makes its DatasetSpec."""
    human = [
        NamedDataset(name, (json_file, images), human_labels, (name, json_file, images))
        for name, json_file, images in args.human_labels
    ]
    yield from human
    if bool(args.human_masks) != bool(args.classes):
        raise InputError(
            "--human-masks and --classes belong together: the folders, and the names of the masks' class ids from 0."
        )
    for name, images, masks in args.human_masks:
        check_outside(cfg.OUTPUT_DIR, images)
        yield NamedDataset(name, (images, masks), human_masks, (name, images, masks, args.classes))
    counted = [d for d in human if d.name in cfg.DATASETS.TRAIN and cfg.SELFTRAIN.THRESHOLDS == "counts"]
    files, specs = [file for d in counted for file in d.files], [d.make(*d.arguments) for d in counted]
    for name, folder in args.pseudo_labels:
        yield NamedDataset(name, (folder, *files), pseudo_labels, (name, folder, cfg, specs))
    for name, folder in args.unlabeled_images:
        check_outside(cfg.OUTPUT_DIR, folder)
        yield NamedDataset(name, (folder,), unlabeled_images, (name, folder))
    for name, folder in args.classification_images:
        check_outside(cfg.OUTPUT_DIR, folder)  # where it would be a class
        yield NamedDataset(name, (folder,), classification_images, (name, folder))
