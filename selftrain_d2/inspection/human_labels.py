"""Human labels to compare with: a COCO file, its classes matched with the teacher's by name.

Unlike for training, the image files need not be there, and classes that the teacher does not know are no
mistake: they are counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.structures import BoxMode

from selftrain_d2.data.coco_file import CocoFile
from selftrain_d2.data.label_formats.detect import read_labels
from selftrain_d2.errors import InputError


class HumanLabels(NamedTuple):
    """Human labels under the teacher's category ids."""

    dicts: list[dict[str, Any]]  # detectron2 dataset dicts; file names as in the file
    classes: set[str]  # those of the file that the teacher knows
    unknown_classes: dict[str, int]  # those that it does not know, with their boxes


def read_human_labels(
    json_file: str | os.PathLike,
    class_names: Sequence[str],
    *,
    images: str | None = None,
    label_classes: Sequence[str] | None = None,
) -> HumanLabels:
    """Read a COCO JSON, or labels in another format.

    Args:
        json_file: labels that ``data.label_formats`` reads.
        class_names: the teacher's, by contiguous category id.
        images, label_classes: see :func:`selftrain_d2.data.label_formats.detect.read_labels`.

    Raises:
        InputError: see :func:`selftrain_d2.data.coco_file.read_coco`; or the file shares no class with the teacher.
    """
    file = read_labels(json_file, images=images, classes=label_classes).file
    known = set(file.class_names) & set(class_names)
    if not known:
        raise InputError(
            f"{json_file} has none of the teacher's classes: {', '.join(sorted(file.class_names)[:5])} there, "
            f"{', '.join(class_names[:5])} in the pseudo labels; classes are matched by name."
        )
    dicts, unknown = _parse(file, {name: i for i, name in enumerate(class_names)})
    return HumanLabels(dicts, known, unknown)


def _parse(file: CocoFile, ids: dict[str, int]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    names = {category["id"]: category["name"] for category in file.content["categories"]}
    unknown: Counter = Counter()
    dicts = {
        image["id"]: {
            "file_name": image["file_name"],
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
        for image in file.content["images"]
    }
    for annotation in file.annotations:
        name = names[annotation["category_id"]]
        if name in ids:
            x, y, width, height = map(float, annotation["bbox"])
            dicts[annotation["image_id"]]["annotations"].append(
                {
                    "bbox": [x, y, x + width, y + height],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": ids[name],
                    "iscrowd": annotation["iscrowd"],
                }
            )
        else:
            unknown[name] += 1
    return list(dicts.values()), dict(unknown)
