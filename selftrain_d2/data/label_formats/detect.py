"""Labels of any format at a path, told apart by what is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from selftrain_d2.data.coco_file import read_coco
from selftrain_d2.data.label_formats import voc, yolo
from selftrain_d2.data.label_formats.label_set import LabelSet
from selftrain_d2.errors import InputError


def read_labels(
    path: str | os.PathLike,
    *,
    images: str | None = None,
    classes: Sequence[str] | None = None,
    other_classes: Sequence[str] | None = None,
    split: str = "train",
    empty: bool = False,
) -> LabelSet:
    """Read COCO JSON, a YOLO data set or folder, or a PASCAL VOC folder.

    Args:
        path: a ``.json`` file; a ``data.yaml`` or a folder with one; a folder of ``.txt`` files, or with ``images`` and
            ``labels``; a folder of ``.xml`` files or with ``Annotations``, or a list in its ``ImageSets/Main``.
        images: folder of the images; by default where the format has them.
        classes: names in the order of ids; needed by a folder of ``.txt`` files without ``classes.txt``.
        other_classes: of other labels, whose order these take where they have no names, or no order, of their own.
        split: of a data.yaml, or of the lists in ImageSets.
        empty: whether images without a file of labels count as showing no object (a folder of predictions), not as
            unlabeled.

    Raises:
        InputError: nothing that is known is there, or a file has a fault.
    """
    place = Path(path)
    if "://" in os.fspath(path) or place.suffix.lower() == ".json":
        return LabelSet(read_coco(path), images, is_coco=True)
    if not place.exists():
        raise InputError(f"Labels {path} do not exist.")
    if place.suffix.lower() in (".yaml", ".yml"):
        return yolo.read_yaml(place, split, images, empty, classes)
    if place.is_file() and place.parts[-3:-1] == ("ImageSets", "Main"):
        return voc.read(place.absolute(), split, images, classes or other_classes, empty)
    if place.is_dir():
        data = next((place / name for name in yolo.DATA_YAML if (place / name).is_file()), None)
        if data is not None:
            return yolo.read_yaml(data, split, images, empty, classes)
        has_voc, has_yolo = voc.is_labels(place), yolo.is_labels(place)
        if has_voc and (has_yolo and not (place / "Annotations").is_dir()):
            raise InputError(f"{path} has labels in .xml and in .txt files: name the folder of one of them.")
        if has_voc:
            return voc.read(place, split, images, classes or other_classes, empty)
        if has_yolo:
            return yolo.read_folder(place, images, classes, empty, other_classes)
        parent = place.absolute().parent
        if place.name in ("images", "JPEGImages") and (voc.is_labels(parent) or yolo.is_labels(parent)):
            raise InputError(
                f"{path} has no labels, but images alone; the labels are beside it: name {place.parent}."
            )
    raise InputError(
        f"{path} has no labels of a known format: give a COCO .json, a YOLO data.yaml or folder of .txt files, or a "
        "folder of PASCAL VOC .xml files."
    )
