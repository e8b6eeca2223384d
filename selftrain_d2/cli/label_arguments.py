"""The arguments that name human labels of any format."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from selftrain_d2.data.label_formats.detect import read_labels
from selftrain_d2.data.label_formats.label_set import LabelSet
from selftrain_d2.errors import InputError
from selftrain_d2.files import write_json, writing

logger = logging.getLogger(__name__)

_FORMATS = "COCO JSON, a YOLO data.yaml or folder, or a PASCAL VOC folder"


class LabelPaths(NamedTuple):
    """A COCO JSON and the folder of its images."""

    json_file: str
    images: str


def add_labels_argument(parser) -> None:
    """Add ``--labels``."""
    parser.add_argument("--labels", metavar="PATH", help=f"human labels: {_FORMATS}")


def add_val_labels_argument(parser) -> None:
    """Add ``--val-labels``."""
    parser.add_argument(
        "--val-labels",
        metavar="PATH",
        help="those to evaluate on, in the same formats (default: the split val of --labels, if it has one)",
    )


def add_image_and_class_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--labeled-images`` and ``--classes``."""
    parser.add_argument(
        "--labeled-images", metavar="FOLDER", help="images of the labels, if not where their format has them"
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="class names by id; before another --argument"
    )


def labels_as_coco(
    args: argparse.Namespace, folder: str | os.PathLike, *, classes: Sequence[str] | None, use_split: bool
) -> tuple[LabelPaths, LabelPaths | None]:
    """What ``--labels`` and ``--val-labels`` name, as COCO JSON, which the trainings read.

    COCO JSON is taken as it is; other formats are written to ``folder/train.json`` and ``folder/val.json``, with the
    same bytes each time, so that a run that goes on finds what it began with.

    Args:
        args: has ``labels``, ``labeled_images``, ``val_labels`` and ``val_images``.
        folder: for what is written.
        classes: names by id, if ``--classes`` are those of the labels.
        use_split: without ``--val-labels``, take the split val of ``--labels``.

    Returns:
        The labels, and those of validation if there are any.

    Raises:
        InputError: one of the arguments without ``--labels``; see also
            :func:`selftrain_d2.data.label_formats.detect.read_labels`.
    """
    labels, val_labels = args.labels, args.val_labels
    if labels is None:
        raise InputError("--val-labels and --labeled-images go with --labels: name the labels.")
    found = read_labels(labels, images=args.labeled_images, classes=classes)
    paths = _written(found, labels, Path(folder, "train.json"), "--labeled-images")
    other = {"classes": classes, "other_classes": None if found.is_coco else found.file.class_names}
    if val_labels is not None:
        validation = read_labels(val_labels, images=args.val_images, split="train", **other)
    elif use_split and found.has_validation:
        logger.info(f"Validation: the split val of {labels}.")
        val_labels = labels
        validation = read_labels(labels, images=args.val_images, split="val", **other)
    else:
        return paths, None
    return paths, _written(validation, val_labels, Path(folder, "val.json"), "--val-images")


def _written(found: LabelSet, path: str, file: Path, argument: str) -> LabelPaths:
    if found.image_root is None:
        raise InputError(
            f"{path} is COCO JSON, which does not know the folder of its images: give {argument}."
        )
    if found.is_coco:
        return LabelPaths(path, found.image_root)
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found.file.content)
    return LabelPaths(str(file), found.image_root)
