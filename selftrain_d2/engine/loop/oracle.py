"""The ceiling of self-training: the withheld truth of the unlabeled images, in place of their pseudo labels."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.data import MetadataCatalog

from selftrain_d2.data.datasets import register_dataset
from selftrain_d2.data.label_maps import VOID
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.pseudo_labels.selection import class_names_of
from selftrain_d2.engine.launch import DatasetSpec
from selftrain_d2.engine.loop.tasks import Task

#: Name of the registered dataset, known while the oracle is trained and at no other time.
ORACLE = "selftrain_oracle"


def true_labels(task: Task, folder: Path, masks: bool) -> DatasetSpec:
    """The truth of the images of a pseudo-label folder, for :func:`~selftrain_d2.engine.launch.registered`.

    Args:
        masks: whether masks of objects are learned.
    """
    return ORACLE, register_true_labels, (task, os.path.abspath(folder), masks)


def register_true_labels(name: str, task: Task, folder: str, masks: bool) -> None:
    """Register the images of a pseudo-label folder, in its order, with people's labels.

    So a student of the one and a student of the other draw the same images in each step.
    """
    manifest = read_manifest(folder)
    register_dataset(name, lambda: task.truth_of(load_pseudo_labels(folder, manifest["score_floor"]), masks))
    metadata, classes = MetadataCatalog.get(name).set(evaluator_type="none"), class_names_of(manifest)
    if "stuff_classes" in manifest:
        metadata.set(stuff_classes=list(classes), ignore_label=VOID)
    else:
        metadata.set(thing_classes=list(classes))
