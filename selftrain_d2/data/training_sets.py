"""The data sets of a training run: read, stamped with the source of their labels, and checked against each other."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.structures import BoxMode
from torch.utils.data import ConcatDataset

from selftrain_d2.data.coco_datasets import reading_coco
from selftrain_d2.data.coco_file import nothing_to_learn
from selftrain_d2.data.datasets import check_same_classes, class_names
from selftrain_d2.data.pseudo_labels.counts import HumanCounts
from selftrain_d2.data.pseudo_labels.dataset import PseudoImageDataset
from selftrain_d2.errors import InputError

logger = logging.getLogger(__name__)


def get_human_dicts(cfg) -> list[dict[str, Any]]:
    """Dataset dicts of DATASETS.TRAIN, stamped as human-labeled.

    Raises:
        InputError: a dataset is not registered, or has other classes than the first; a COCO file cannot be used (see
            :func:`selftrain_d2.data.coco_file.read_coco`); there is no object to learn from, or none of the kind
            that MODEL.MASK_ON and MODEL.KEYPOINT_ON ask for.
    """
    names = cfg.DATASETS.TRAIN
    check_registered("DATASETS.TRAIN", names)
    check_classes(names[0], names[1:], "human-labeled")
    with reading_coco(names, masks=cfg.MODEL.MASK_ON):
        dicts = get_detection_dataset_dicts(names, filter_empty=False, check_consistency=False)
    check_classes(names[0], names[1:], "human-labeled")  # those that were unknown before they were read
    if "annotations" in dicts[0]:
        _check_objects(cfg, dicts)
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            dicts = filter_images_with_only_crowd_annotations(dicts)
        if class_names(names[0]):
            print_instances_class_histogram(dicts, class_names(names[0]))
    return [{**d, "label_source": "human"} for d in dicts]


def labeled_in_the_step(cfg) -> bool:
    """Whether a run's pseudo-labeled images are plain ones, which get their labels in each training step."""
    return cfg.SELFTRAIN.TEACHER == "moving_average" and bool(cfg.DATASETS.PSEUDO_TRAIN)


def count_human_boxes(cfg) -> HumanCounts:
    """The boxes of DATASETS.TRAIN by class, and its images, those without boxes included.

    Crowd regions and boxes without area are not counted: nothing learns them.

    Raises:
        InputError: a dataset is not registered, is none of boxes, or its COCO file cannot be used.
    """
    names = cfg.DATASETS.TRAIN
    check_registered("DATASETS.TRAIN", names)
    with reading_coco(names, masks=cfg.MODEL.MASK_ON):
        dicts = [(name, d) for name in names for d in DatasetCatalog.get(name)]
    boxes: Counter = Counter()
    for name, d in dicts:
        if "annotations" not in d or not class_names(name):
            raise InputError(
                f"DATASETS.TRAIN names {name!r}, in which no boxes of named classes can be counted: set "
                "SELFTRAIN.THRESHOLDS fixed."
            )
        boxes.update(
            class_names(name)[annotation["category_id"]]
            for annotation in d["annotations"]
            if not annotation.get("iscrowd", 0) and _has_area(annotation)
        )
    return HumanCounts(boxes, len(dicts))


def _check_objects(cfg, dicts: Sequence[dict[str, Any]]) -> None:
    """Raise InputError unless there are objects to learn from, with masks and keypoints where they are learned."""
    objects = (a for d in dicts for a in d.get("annotations", ()) if not a.get("iscrowd", 0))
    if not any(_has_area(annotation) for annotation in objects):
        annotations = [a for d in dicts for a in d.get("annotations", ())]
        raise InputError(nothing_to_learn(f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}", annotations))
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        for d in dicts:
            if any(
                isinstance(a.get("segmentation"), dict) and not a.get("iscrowd", 0) for a in d["annotations"]
            ):
                raise InputError(
                    f"Image {d['file_name']} (id {d['image_id']}) has a mask in run lengths, which INPUT.MASK_FORMAT "
                    "'polygon' does not take: set INPUT.MASK_FORMAT bitmask."
                )
    if cfg.MODEL.KEYPOINT_ON:
        check_keypoints(cfg, cfg.DATASETS.TRAIN)


def _has_area(annotation: dict[str, Any]) -> bool:
    x0, y0, x1, y1 = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return x1 > x0 and y1 > y0


def check_keypoints(cfg, names: Sequence[str]) -> None:
    """Raise InputError unless registered datasets name the keypoints that MODEL.ROI_KEYPOINT_HEAD learns, all alike."""
    number, expected = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, None
    for name in names:
        points = MetadataCatalog.get(name).get("keypoint_names")
        if not points:
            raise InputError(
                f"MODEL.KEYPOINT_ON needs the names of the keypoints of {name!r}: a COCO JSON has them in each of its "
                "'categories', as 'keypoints'."
            )
        if len(points) != number:
            raise InputError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}, but {name!r} has {len(points)} keypoints."
            )
        expected = expected or points
        if list(points) != list(expected):
            raise InputError(f"{name!r} has other keypoints than {names[0]!r}: {points} against {expected}.")


def get_pseudo_dicts(cfg) -> Sequence[dict[str, Any]]:
    """Dataset dicts of DATASETS.PSEUDO_TRAIN, stamped as pseudo-labeled.

    Pseudo-label folders stay as small as they are loaded: their dicts are made when asked for. Images without
    boxes stay: the paper trains on them as all-negative.

    Raises:
        InputError: a dataset is not registered, is empty, or has other classes than DATASETS.TRAIN.
    """
    check_registered("DATASETS.PSEUDO_TRAIN", cfg.DATASETS.PSEUDO_TRAIN)
    parts = [_one_pseudo_dataset(name) for name in cfg.DATASETS.PSEUDO_TRAIN]
    check_classes(cfg.DATASETS.TRAIN[0], cfg.DATASETS.PSEUDO_TRAIN, "pseudo-labeled")
    return parts[0] if len(parts) == 1 else ConcatDataset(map(shared, parts))


# FiftyOne and Label Studio write classes by the alphabet.
_IN_ORDER = (
    "they must be in the same order, which `selftrain-d2 import --classes NAME ...` gives to pseudo labels of other "
    "tools"
)


def check_classes(human: str, others: Sequence[str], kind: str) -> None:
    """Raise InputError unless registered datasets have the classes of the human-labeled one.

    Those registered by ``register_coco_instances`` are known by their classes only once they were read: until then
    they pass.

    Args:
        kind: what the others are, for the message.
    """
    expected = class_names(human)
    for name in others:
        found = class_names(name)
        if expected is not None and found is not None:
            where, reference = f"The {kind} dataset {name!r}", f"the human-labeled dataset {human!r}"
            check_same_classes(expected, found, where, reference, advice=_IN_ORDER)


def _one_pseudo_dataset(name: str) -> Sequence[dict[str, Any]]:
    """With the checks of detectron2's ``get_detection_dataset_dicts``, which would make all dicts at once."""
    dicts = DatasetCatalog.get(name)
    if not len(dicts):
        raise InputError(f"The pseudo-labeled dataset {name!r} has no image.")
    names = class_names(name) or []
    if isinstance(dicts, PseudoImageDataset):
        logger.info(f"{name}: {len(dicts)} images, {dicts.described(names)}")
        return dicts
    if names and "annotations" in dicts[0]:
        print_instances_class_histogram(dicts, names)
    return [{**d, "label_source": "pseudo"} for d in dicts]


def check_registered(key: str, names: Sequence[str]) -> None:
    """Raise InputError if a config key names no dataset, or one that detectron2's catalog does not have."""
    if not names:
        raise InputError(f"{key} is empty: name at least one registered dataset.")
    for name in names:
        if name not in DatasetCatalog:
            raise InputError(
                f"{key} names {name!r}, which is not registered; known: {DatasetCatalog.list()}."
            )


def check_sources(cfg) -> None:
    """Check, before anything is read, that a config's sources of images fit together.

    Raises:
        InputError: a source has datasets but no images a step, or the other way round; a dataset is not registered.
    """
    if bool(cfg.DATASETS.PSEUDO_TRAIN) != bool(cfg.SOLVER.PSEUDO_IMS_PER_BATCH):
        raise InputError(
            "DATASETS.PSEUDO_TRAIN and SOLVER.PSEUDO_IMS_PER_BATCH belong together: set both to train a "
            f"student, neither to train a teacher (now {cfg.DATASETS.PSEUDO_TRAIN} and "
            f"{cfg.SOLVER.PSEUDO_IMS_PER_BATCH})."
        )
    if bool(cfg.DATASETS.CLASSIFICATION_TRAIN) != bool(cfg.SOLVER.CLASSIFICATION_IMS_PER_BATCH):
        raise InputError(
            "DATASETS.CLASSIFICATION_TRAIN and SOLVER.CLASSIFICATION_IMS_PER_BATCH belong together: set both for joint "
            f"training, or neither (now {cfg.DATASETS.CLASSIFICATION_TRAIN} and "
            f"{cfg.SOLVER.CLASSIFICATION_IMS_PER_BATCH})."
        )
    if labeled_in_the_step(cfg) and cfg.DATALOADER.PSEUDO_SAMPLER_TRAIN != "TrainingSampler":
        raise InputError(
            f"DATALOADER.PSEUDO_SAMPLER_TRAIN is {cfg.DATALOADER.PSEUDO_SAMPLER_TRAIN}, which needs the boxes of all "
            "images, but with SELFTRAIN.TEACHER moving_average these are made step by step: set it to TrainingSampler."
        )
    check_registered("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    for key in ("PSEUDO_TRAIN", "CLASSIFICATION_TRAIN"):
        if cfg.DATASETS[key]:
            check_registered(f"DATASETS.{key}", cfg.DATASETS[key])


def shared(dicts: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Workers would copy the Python objects of a list when they touch them."""
    return DatasetFromList(dicts, copy=False) if isinstance(dicts, list) and dicts else dicts
