"""Draw what the augmentation policies make of a data set: a picture with boxes and masks.

One row a policy, one column an image; --operations draws every operation of AutoAugment and RandAugment at
rising levels instead.

    selftrain-d2 visualize-augmentations --config-file neon_trees/lite0_256.yaml \\
        --json labels.json --images photos --output sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from selftrain_d2.cli.common import add_config_arguments, setup_config
from selftrain_d2.data.augmentation.contact_sheet import operation_sheet, policy_sheet
from selftrain_d2.data.augmentation.registry import operation_settings
from selftrain_d2.data.coco_datasets import reading_coco
from selftrain_d2.data.datasets import register_human_labels, unregister
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper
from selftrain_d2.errors import InputError

_NAME = "visualize_augmentations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", metavar="NAME", help="a registered data set")
    source.add_argument("--json", metavar="FILE", help="labels as COCO JSON, with --images")
    parser.add_argument("--images", metavar="FOLDER", help="where the images of --json are")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG", help="picture to write")
    parser.add_argument("--columns", type=int, default=6, metavar="N", help="images a row (default 6)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of images and draws (default 0)")
    parser.add_argument(
        "--policies", default="S1,S2,S3,S4", metavar="NAME,...", help="rows (default S1,S2,S3,S4)"
    )
    parser.add_argument("--operations", action="store_true", help="all operations on one image, by level")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Write the picture."""
    if args.columns < 1:
        raise InputError(f"--columns is {args.columns}: give at least 1.")
    cfg = setup_config(args)
    records = _labeled_records(args)
    chosen = np.random.RandomState(args.seed).permutation(len(records))
    records = [records[chosen[column % len(records)]] for column in range(args.columns)]
    if args.operations:
        figure = _operations(cfg, records[0], args.seed)
    else:
        mappers = {
            policy: SelfTrainingDatasetMapper(_with_policy(cfg, policy), True)
            for policy in args.policies.split(",")
        }
        figure = policy_sheet(mappers, records, cfg.INPUT.FORMAT, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(args.output)
    except ValueError as error:
        raise InputError(f"--output {args.output}: {error}; use the suffix .png.") from error
    print(args.output)


def _labeled_records(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.json is not None:
        if args.images is None:
            raise InputError("--json needs --images, the folder of its images.")
        register_human_labels(_NAME, args.json, args.images)
        try:
            records = DatasetCatalog.get(_NAME)
        finally:
            unregister(_NAME)
    elif args.dataset in DatasetCatalog:
        with reading_coco([args.dataset]):
            records = DatasetCatalog.get(args.dataset)
    else:
        raise InputError(f"No data set {args.dataset!r} is registered; use --json and --images for files.")
    records = [record for record in records if record.get("annotations")]
    if not records:
        raise InputError(f"{args.json or args.dataset} has no image with a box to draw.")
    return records


def _with_policy(cfg: CfgNode, policy: str) -> CfgNode:
    cfg = cfg.clone()
    cfg.INPUT.AUGMENTATION.POLICY = policy
    return cfg


def _operations(cfg: CfgNode, record: dict[str, Any], seed: int):
    """The operations on the image as a test image is resized, with its boxes."""
    mapper = SelfTrainingDatasetMapper(_with_policy(cfg, "S1"), True)
    mapper.augmentations = SelfTrainingDatasetMapper(cfg, False).augmentations
    sample = mapper(record)
    image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
    return operation_sheet(image, sample["instances"].gt_boxes.tensor.numpy(), operation_settings(cfg), seed)
