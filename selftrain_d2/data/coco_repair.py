"""Annotations of a COCO JSON: checked, and repaired where that takes no guess."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detectron2.utils.logger import log_first_n

from selftrain_d2.errors import InputError

if TYPE_CHECKING:
    from selftrain_d2.data.coco_file import CocoFile

# How far (pixels) a box may stick out of its image. COCO's own files do so by rounding.
_BORDER_TOLERANCE = 1.0

# What stands for a mask that cannot be read: written to another file, it is one there too.
BROKEN: list = [[]]

# What was repaired or left out, in the words of the log; those of _NAMED come with the first annotation.
_NOTES = {
    "id": "numbered all annotations anew ({} without a whole and unique 'id')",
    "area": "set {} missing 'area' to width x height of the box",
    "iscrowd": "set {} missing 'iscrowd' to 0",
    "flat": "put {} 'segmentation' of bare numbers into a list",
    "polygon": "left out the polygons of fewer than three points of {} annotations",
    "mask": "left out {} 'segmentation' that cannot be read; the boxes stay",
    "masked": "left out {} annotations, since masks are learned and their 'segmentation' cannot be read",
    "keypoints": "took the 'keypoints' of {} annotations, missing or unreadable, for not labeled",
    "num_keypoints": "counted {} missing 'num_keypoints'",
    "box": "{} boxes without area will be left out in training",
}

_NAMED = ("polygon", "mask", "masked", "keypoints", "box")


class AnnotationRepair:
    """One pass over the annotations of a file."""

    def __init__(self, file: CocoFile, masks: bool, keypoints: int | None, allow_flat: bool):
        self.file = file
        self.masks = masks
        self.keypoints = keypoints
        self.allow_flat = allow_flat
        self.sizes = {image["id"]: (image["width"], image["height"]) for image in file.content["images"]}
        self.categories = {category["id"] for category in file.content["categories"]}
        self.counts: Counter = Counter()
        self.first: dict[str, str] = {}

    def repair(self) -> None:
        annotations = self.file.content["annotations"]
        kept, without_mask = [], []
        for index, annotation in enumerate(annotations):
            problem = self._problem(annotation)
            if problem:
                raise InputError(f"{self._where(index)}: {problem}.")
            flat, crowd = 0 in annotation["bbox"][2:], bool(annotation["iscrowd"])
            if flat:
                self._note("box", index)
            has_mask = self._repair_mask(index, annotation)
            if self.keypoints or "keypoints" in annotation:
                self._repair_keypoints(index, annotation)
            if self.masks and not has_mask:
                if has_mask is None and not crowd:
                    without_mask.append(index)
                self._note("masked", index)
                continue
            if has_mask is False:
                self._note("mask", index)
            self.file.objects += not (flat or crowd)
            kept.append(annotation)
        if without_mask:
            raise InputError(
                f"{self.file.path}: {len(without_mask)} of {len(annotations)} annotations have no 'segmentation', e.g. "
                f"{self._name(without_mask[0])}, but masks are to be learned: add it, or set MODEL.MASK_ON False."
            )
        self._number(annotations)
        self.file.content["annotations"] = kept
        self._tell()

    def _problem(self, annotation: Any) -> str | None:
        """What cannot be repaired; sets ``area`` and ``iscrowd``."""
        if not isinstance(annotation, dict):
            return f"it is {shown(annotation)}, no object"
        for key, known, what in (
            ("image_id", self.sizes, "image"),
            ("category_id", self.categories, "category"),
        ):
            value = annotation.get(key)
            if value is None or isinstance(value, (list, dict)) or value not in known:
                return f"its {key!r} is {shown(value)}, but no {what} has that id"
        box = annotation.get("bbox")
        problem = self._box_problem(box, self.sizes[annotation["image_id"]])
        if problem:
            return f"its 'bbox' {shown(box)} (x, y, width, height) {problem}"
        if annotation.get("ignore"):
            return (
                f"its 'ignore' is {shown(annotation['ignore'])}: say 'iscrowd': 1, or remove the annotation"
            )
        crowd = annotation.get("iscrowd")
        if crowd is None:
            self.counts["iscrowd"] += 1
        elif isinstance(crowd, (list, dict)) or crowd not in (0, 1):
            return f"its 'iscrowd' is {shown(crowd)}: it must be 0 or 1"
        annotation["iscrowd"] = int(crowd or 0)
        area = annotation.get("area")
        if type(area) not in (int, float) or not 0 < area < math.inf:
            area = box[2] * box[3]
            self.counts["area"] += area > 0 or annotation.get("area") is None
            annotation["area"] = area
        return None

    def _box_problem(self, box: Any, size: tuple[int, int]) -> str | None:
        if not isinstance(box, list) or len(box) != 4 or not _are_finite(box):
            return "is not four finite numbers"
        x, y, width, height = box
        if width < 0 or height < 0:
            return "has a negative size"
        if not self.allow_flat and not (width and height):
            return "has no area"
        excess = max(-x, -y, x + width - size[0], y + height - size[1])
        if excess > _BORDER_TOLERANCE:
            return f"lies {excess:g} pixels outside its image of {size[0]} x {size[1]}"
        return None

    def _repair_mask(self, index: int, annotation: dict[str, Any]) -> bool | None:
        """Whether there is a mask that can be read; None where there is none at all."""
        segmentation = annotation.get("segmentation")
        if not segmentation:
            return None
        if isinstance(segmentation, list) and not isinstance(segmentation[0], (list, dict)):
            if _is_polygon(segmentation):
                annotation["segmentation"] = [segmentation]
                self.counts["flat"] += 1
                return True
        elif isinstance(segmentation, list):
            polygons = [polygon for polygon in segmentation if _is_polygon(polygon)]
            if polygons:
                if len(polygons) < len(segmentation):
                    annotation["segmentation"] = polygons
                    self._note("polygon", index)
                return True
        elif _is_run_lengths(segmentation, self.sizes[annotation["image_id"]]):
            return True
        annotation["segmentation"] = BROKEN
        return False

    def _repair_keypoints(self, index: int, annotation: dict[str, Any]) -> None:
        points, number = annotation.get("keypoints"), self.keypoints
        if (
            not isinstance(points, list)
            or (len(points) != 3 * number if number else len(points) % 3)
            or not _are_finite(points)
        ):
            self._note("keypoints", index)
            annotation["keypoints"] = points = [0] * (3 * (number or 0))
            annotation["num_keypoints"] = 0
        if type(annotation.get("num_keypoints")) is not int:
            self.counts["num_keypoints"] += 1
            annotation["num_keypoints"] = sum(v > 0 for v in points[2::3])

    def _number(self, annotations: Sequence[dict[str, Any]]) -> None:
        ids = [annotation.get("id") for annotation in annotations]
        whole = {i for i in ids if type(i) is int}
        if len(whole) < len(ids):
            self.counts["id"] = len(ids) - len(whole)
            for number, annotation in enumerate(annotations, start=1):
                annotation["id"] = number

    def _note(self, key: str, index: int) -> None:
        self.counts[key] += 1
        if key not in self.first:  # now: ids may be given anew later
            self.first[key] = self._name(index)

    def _tell(self) -> None:
        said = [
            text.format(self.counts[key]) + (f", e.g. {self.first[key]}" if key in _NAMED else "")
            for key, text in _NOTES.items()
            if self.counts[key]
        ]
        if said:  # once: a file is read again for every stage
            log_first_n(
                logging.WARNING, f"{self.file.path}: {'; '.join(said)}.", key="message", name=__name__
            )

    def _where(self, index: int) -> str:
        return f"{self.file.path}, {self._name(index)}"

    def _name(self, index: int) -> str:
        annotation = self.file.content["annotations"][index]
        keys = ("id", "image_id") if isinstance(annotation, dict) else ()
        ids = ", ".join(f"{key} {shown(annotation[key])}" for key in keys if key in annotation)
        return f"annotations[{index}]" + (f" ({ids})" if ids else "")


def _are_finite(values: Sequence[Any]) -> bool:
    try:
        return math.isfinite(sum(values))  # one pass in C
    except (TypeError, OverflowError):
        return False


def _is_polygon(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and _are_finite(polygon)


def _is_run_lengths(segmentation: Any, size: tuple[int, int]) -> bool:
    width, height = size
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return False
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        return counts != "" and counts.isascii()
    return (
        isinstance(counts, list)
        and all(type(c) is int and c >= 0 for c in counts)
        and sum(counts) == width * height
    )


def shown(value: Any) -> str:
    """A value as JSON has it, short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
