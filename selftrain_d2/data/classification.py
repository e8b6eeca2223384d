"""Images with one class each, for joint training: a folder with a sub-folder for each class, as ImageNet has."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from torchvision.transforms import v2

from selftrain_d2.data.datasets import check_same_classes, read_image_size, register_dataset
from selftrain_d2.data.image_files import UNREADABLE, read_image
from selftrain_d2.data.image_sources import absolute_root, list_images
from selftrain_d2.data.mapper import image_to_tensor
from selftrain_d2.data.random_state import torch_seeded_by_numpy
from selftrain_d2.errors import InputError

logger = logging.getLogger(__name__)


def list_classes(folder: str | os.PathLike) -> list[str]:
    """Class names of a folder: its sub-folders, sorted. Hidden ones (``.cache``) are none.

    Raises:
        InputError: the folder is missing, or has fewer than two sub-folders.
    """
    folder = os.fspath(folder)
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise InputError(f"Classification folder {folder} cannot be listed: {error.strerror}.") from error
    if len(names) < 2:
        raise InputError(
            f"Classification folder {folder} needs a sub-folder of images for each of at least two classes, and has "
            f"{f'only {names[0]!r}' if names else 'none'}."
        )
    return names


def load_classification_folder(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Dataset dicts of a folder of classes.

    Returns:
        Dicts with ``file_name`` and ``class_id``, the place of the image's class in :func:`list_classes`. Images may
        lie deeper below the folder of their class. Only their names are read.

    Raises:
        InputError: see :func:`list_classes`; or a class has no image.
    """
    dicts = []
    for class_id, name in enumerate(list_classes(folder)):
        of_class = os.path.join(folder, name)
        dicts += [
            {"file_name": os.path.join(of_class, i), "class_id": class_id} for i in list_images(of_class)
        ]
    return dicts


def register_classification_folder(name: str, folder: str | os.PathLike) -> None:
    """Register a folder ``CLASS/*.jpg`` for DATASETS.CLASSIFICATION_TRAIN.

    ``MetadataCatalog.get(name).classification_classes`` has the class names. A dataset of one's own needs that too,
    and the dicts of :func:`load_classification_folder`.

    Raises:
        InputError: see :func:`load_classification_folder`; no image of some class can be read; the name is taken.
    """
    folder = absolute_root(folder)
    classes = list_classes(folder)
    dicts = load_classification_folder(folder)
    for class_id, of_class in itertools.groupby(dicts, key=lambda d: d["class_id"]):  # a mistake is told now
        if not any(_is_readable(d["file_name"]) for d in of_class):
            where = os.path.join(folder, classes[class_id])
            raise InputError(f"None of the images of class {classes[class_id]!r} in {where} can be read.")
    register_dataset(name, lambda: dicts)
    MetadataCatalog.get(name).set(image_root=folder, evaluator_type="none", classification_classes=classes)


def _is_readable(file: str) -> bool:
    try:
        read_image_size(file)
    except OSError:
        return False
    return True


def classification_classes(cfg: CfgNode) -> list[str]:
    """Class names of DATASETS.CLASSIFICATION_TRAIN; none where that is empty.

    Raises:
        InputError: a dataset is not registered, has no classes, or others than the first.
    """
    names = cfg.DATASETS.CLASSIFICATION_TRAIN
    classes = [_classes_of(name) for name in names]
    for name, found in zip(names[1:], classes[1:]):
        check_same_classes(classes[0], found, f"The classification dataset {name!r}", f"{names[0]!r}")
    return classes[0] if names else []


def _classes_of(name: str) -> list[str]:
    if name not in DatasetCatalog:
        raise InputError(
            f"DATASETS.CLASSIFICATION_TRAIN names {name!r}, which is not registered: register it with "
            "--classification-images or register_classification_folder."
        )
    classes = MetadataCatalog.get(name).get("classification_classes")
    if not classes:
        raise InputError(
            f"DATASETS.CLASSIFICATION_TRAIN names {name!r}, which is no classification dataset: its metadata have no "
            "classification_classes."
        )
    return list(classes)


def get_classification_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """Dataset dicts of DATASETS.CLASSIFICATION_TRAIN, stamped ``label_source`` "classification".

    Raises:
        InputError: see :func:`classification_classes`; or a class id that none of the classes has.
    """
    classes = classification_classes(cfg)
    dicts = []
    for name in cfg.DATASETS.CLASSIFICATION_TRAIN:
        for d in DatasetCatalog.get(name):
            if not 0 <= d["class_id"] < len(classes):
                raise InputError(
                    f"Dataset {name!r} has class_id {d['class_id']} for {d['file_name']}, but {len(classes)} classes, "
                    "numbered from 0."
                )
            dicts.append({**d, "label_source": "classification"})
    logger.info(f"{len(dicts)} classification images of {len(classes)} classes: {_first(classes)}")
    return dicts


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


class ClassificationMapper:
    """Reads an image, and takes a random part of it to one square size.

    The usual augmentation for ImageNet: a part of 8 to 100 % of the area with sides 3:4 to 4:3, resized, and in half of
    the cases flipped. Numbers are drawn from NumPy's global random state, as those of detectron2's augmentations.
    """

    @configurable
    def __init__(self, *, image_size: int, image_format: str):
        """
        Args:
            image_size: side of the square, in pixels.
            image_format: as detectron2's ``read_image`` has it.

        Raises:
            InputError: a negative size.
        """
        if image_size < 1:
            raise InputError(f"INPUT.CLASSIFICATION_IMAGE_SIZE must be >= 0, not {image_size}.")
        self.image_format = image_format
        self.transform = v2.Compose(
            [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "image_size": cfg.INPUT.CLASSIFICATION_IMAGE_SIZE or cfg.INPUT.AUGMENTATION.IMAGE_SIZE,
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Returns:
            The dict with ``image``, (C, S, S) uint8.

        Raises:
            InputError: the image cannot be read.
        """
        file_name = dataset_dict["file_name"]
        try:
            image = image_to_tensor(read_image(file_name, self.image_format))
        except UNREADABLE as error:
            raise InputError(
                f"Classification image {file_name} cannot be read ({error}); repair or remove it."
            ) from error
        with torch_seeded_by_numpy():
            return {**dataset_dict, "image": self.transform(image)}
