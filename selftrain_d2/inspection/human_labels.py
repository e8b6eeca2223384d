"""Human labels to compare with: a COCO file, its classes matched with the teacher's by name.

Unlike for training, the image files need not be there, and classes that the teacher does not know are no
mistake: they are counted.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.structures import BoxMode

from selftrain_d2.errors import InputError
from selftrain_d2.files import read_json


class HumanLabels(NamedTuple):
    """Human labels under the teacher's category ids."""

    dicts: list[dict[str, Any]]  # detectron2 dataset dicts; file names as in the file
    classes: set[str]  # those of the file that the teacher knows
    unknown_classes: dict[str, int]  # those that it does not know, with their boxes


def read_human_labels(json_file: str | os.PathLike, class_names: Sequence[str]) -> HumanLabels:
    """Read a COCO JSON.

    Args:
        json_file: boxes XYWH in pixels, as COCO has them.
        class_names: the teacher's, by contiguous category id.

    Raises:
        InputError: the file is missing or not COCO, shares no class with the teacher, or an annotation
            belongs to no image or class of the file or has no box of four finite numbers.
    """
    if not Path(json_file).is_file():
        raise InputError(f"COCO JSON {json_file} does not exist.")
    coco = read_json(json_file)
    try:
        dicts, names, unknown = _parse(coco, {name: i for i, name in enumerate(class_names)})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{json_file} is not a COCO file of boxes: {type(error).__name__} {error}; it needs images "
            "(id, file_name, height, width), categories (id, name) and annotations (image_id, category_id, bbox)."
        ) from error
    if not dicts:
        raise InputError(f"{json_file} has no images: there is nothing to compare with.")
    known = names & set(class_names)
    if not known:
        raise InputError(
            f"{json_file} has none of the teacher's classes: {', '.join(sorted(names)[:5]) or 'none'} there, "
            f"{', '.join(class_names[:5])} in the pseudo labels; classes are matched by name."
        )
    return HumanLabels(dicts, known, unknown)


def _parse(coco: Any, ids: dict[str, int]) -> tuple[list[dict[str, Any]], set[str], dict[str, int]]:
    names = {category["id"]: category["name"] for category in coco["categories"]}
    unknown: Counter = Counter()
    dicts = {
        image["id"]: {
            "file_name": image["file_name"],
            "image_id": image["id"],
            "height": int(image["height"]),
            "width": int(image["width"]),
            "annotations": [],
        }
        for image in coco["images"]
    }
    for annotation in coco.get("annotations", []):
        name, image = names[annotation["category_id"]], dicts[annotation["image_id"]]
        box = [float(v) for v in annotation["bbox"]]
        if len(box) != 4 or not all(map(math.isfinite, box)):
            raise ValueError(f"in annotation {annotation.get('id')}: its box is {annotation['bbox']}")
        if name in ids:
            x, y, width, height = box
            image["annotations"].append(
                {
                    "bbox": [x, y, x + width, y + height],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": ids[name],
                    "iscrowd": int(annotation.get("iscrowd", 0)),
                }
            )
        else:
            unknown[name] += 1
    return list(dicts.values()), set(names.values()), dict(unknown)
