"""What a COCO JSON of labels may look like: the one reader of training, evaluation, splits, inspection and import.

A fault has one of three outcomes:

- repaired, where that takes no guess: ``id`` missing, repeated or no whole number (all annotations are numbered anew),
  ``area`` missing or not positive (width x height of the box), ``iscrowd`` missing (0), a polygon as a flat list of
  numbers (put into a list), ``num_keypoints`` missing (counted);
- left out: polygons of fewer than three points, masks that cannot be read (the box stays, unless masks are learned),
  keypoints that cannot be read (they count as not labeled);
- refused with one sentence: everything else.

One line of the log says how many there were of the first two.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from pycocotools.coco import COCO

from selftrain_d2.errors import InputError
from selftrain_d2.files import read_json

# How far (pixels) a box may stick out of its image. COCO's own files do so by rounding.
_BORDER_TOLERANCE = 1.0

# What stands for a mask that cannot be read: written to another file, it is one there too.
_BROKEN: list = [[]]

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

# What must differ in all entries of a list, and its types.
_UNIQUE = {
    "categories": (("id", (int,)), ("name", (str,))),
    "images": (("id", (int, str)), ("file_name", (str,))),
}
_WORDS = {int: "a whole number", str: "a text"}


@dataclass
class CocoFile:
    """A COCO JSON that can be used, repaired.

    Attributes:
        content: the parsed file. ``annotations`` is missing only where the file has none (null counts as none).
        objects: annotations to learn from: no crowd region, a box with an area, with ``masks`` also a mask.
    """

    path: str
    content: dict[str, Any]
    objects: int = 0

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return self.content.get("annotations", [])

    @property
    def class_names(self) -> list[str]:
        return coco_class_names(self.content)

    @property
    def keypoint_names(self) -> list[str] | None:
        """Those that all categories with ``keypoints`` share."""
        named = [c["keypoints"] for c in self.content["categories"] if c.get("keypoints")]
        shared = named and isinstance(named[0], list) and all(names == named[0] for names in named)
        return named[0] if shared else None

    def check_objects(self) -> None:
        """Raise InputError if there is nothing to learn from."""
        if not self.objects:
            raise InputError(nothing_to_learn(self.path, self.annotations))


def nothing_to_learn(where: str, annotations: Sequence[Mapping[str, Any]]) -> str:
    """The sentence on labels without an object, with what they have instead."""
    crowds = sum(bool(annotation.get("iscrowd", 0)) for annotation in annotations)
    return (
        f"{where} has no object to learn from: of the {len(annotations)} annotations that can be used {crowds} are "
        "crowd regions ('iscrowd': 1), and no other has a box with an area; label some objects."
    )


def coco_class_names(coco: Mapping[str, Any]) -> list[str]:
    """Class names in the order of detectron2's contiguous ids, that is by category id."""
    return [c["name"] for c in sorted(coco["categories"], key=lambda c: c["id"])]


def read_coco(
    json_file: str | os.PathLike,
    *,
    masks: bool = False,
    keypoints: int | None = None,
    allow_flat: bool = True,
    mend_image: Callable[[dict[str, Any]], None] | None = None,
) -> CocoFile:
    """Read a COCO JSON of labels: check all that would fail later, and repair what can be.

    Args:
        json_file: a path that detectron2's PathManager knows.
        masks: whether masks are learned or judged. An annotation whose mask cannot be read is then left out, and one
            that has none is refused.
        keypoints: points of an object. None: as many as the categories name.
        allow_flat: only count boxes without width or height. Training drops them, and COCO's own train2017 has two.
        mend_image: called with each image's entry before it is checked, to correct it in place.

    Raises:
        InputError: naming the file, the first offender and the key: not JSON, no categories or images, an entry
            that lacks a key or has it of the wrong kind, an id, class name or image file twice, an unknown category or
            image, a box that is NaN, of negative size, or outside its image, an ``ignore`` (which detectron2 does not
            know).
    """
    path = os.fspath(json_file)
    coco = _read_lists(path, ("categories", "images"))
    for image in coco["images"] if mend_image else ():
        if isinstance(image, dict) and isinstance(image.get("file_name"), str):
            mend_image(image)
    for key in _UNIQUE:
        _check_unique(path, key, coco[key])
    for index, image in enumerate(coco["images"]):
        for key in ("width", "height"):
            image[key] = _pixels(path, index, key, image.get(key))
    file = CocoFile(path, coco)
    if coco.get("annotations") is None:
        coco.pop("annotations", None)
        return file
    if not isinstance(coco["annotations"], list):
        raise InputError(
            f"{path} is not a COCO file: its 'annotations' are {_shown(coco['annotations'])}, no list."
        )
    names = file.keypoint_names
    _Annotations(file, masks, keypoints or (len(names) if names else None), allow_flat).repair()
    return file


def read_coco_images(json_file: str | os.PathLike) -> list[dict[str, Any]]:
    """The images of a COCO JSON, labeled or not; annotations and categories are not looked at, nor sizes.

    Raises:
        InputError: not JSON, no images, or an image without a file name, or with that of another.
    """
    path = os.fspath(json_file)
    images = _read_lists(path, ("images",))["images"]
    _check_unique(path, "images", images, but=("id",))
    return images


def dataset_dicts(file: CocoFile, image_root: str | os.PathLike) -> list[dict[str, Any]]:
    """detectron2's dataset dicts with contiguous class ids, as its ``load_coco_json`` makes them of a sound file."""
    contiguous = contiguous_ids(file)
    annotations: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in file.content["images"]}
    for annotation in file.annotations:
        obj = {key: annotation[key] for key in ("iscrowd", "bbox") if key in annotation}
        if annotation.get("keypoints"):
            # COCO's keypoints are indices of pixels; their centres lie half a pixel further.
            obj["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(annotation["keypoints"])]
        if has_mask(annotation):
            obj["segmentation"] = _compressed(annotation["segmentation"])
        obj["category_id"] = contiguous[annotation["category_id"]]
        obj["bbox_mode"] = BoxMode.XYWH_ABS
        annotations[annotation["image_id"]].append(obj)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": annotations[image["id"]],
        }
        for image in sorted(file.content["images"], key=lambda image: image["id"])
    ]


def has_mask(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation that was read has a mask."""
    return bool(annotation.get("segmentation")) and annotation["segmentation"] != _BROKEN


def contiguous_ids(file: CocoFile) -> dict[int, int]:
    """Category id to place among the classes."""
    return {category: i for i, category in enumerate(sorted(c["id"] for c in file.content["categories"]))}


def evaluation_truth(content: dict[str, Any]) -> COCO:
    """The truth for pycocotools, in memory. Ids of annotations are given anew from 1: it takes 0 for "no match".

    Args:
        content: of a COCO JSON; changed.
    """
    for number, annotation in enumerate(content.get("annotations", []), start=1):
        annotation["id"] = number
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


class _Annotations:
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
            return f"it is {_shown(annotation)}, no object"
        for key, known, what in (
            ("image_id", self.sizes, "image"),
            ("category_id", self.categories, "category"),
        ):
            value = annotation.get(key)
            if value is None or isinstance(value, (list, dict)) or value not in known:
                return f"its {key!r} is {_shown(value)}, but no {what} has that id"
        box = annotation.get("bbox")
        problem = self._box_problem(box, self.sizes[annotation["image_id"]])
        if problem:
            return f"its 'bbox' {_shown(box)} (x, y, width, height) {problem}"
        if annotation.get("ignore"):
            return (
                f"its 'ignore' is {_shown(annotation['ignore'])}: say 'iscrowd': 1, or remove the annotation"
            )
        crowd = annotation.get("iscrowd")
        if crowd is None:
            self.counts["iscrowd"] += 1
        elif isinstance(crowd, (list, dict)) or crowd not in (0, 1):
            return f"its 'iscrowd' is {_shown(crowd)}: it must be 0 or 1"
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
        annotation["segmentation"] = _BROKEN
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
        ids = ", ".join(f"{key} {_shown(annotation[key])}" for key in keys if key in annotation)
        return f"annotations[{index}]" + (f" ({ids})" if ids else "")


def _read_lists(path: str, keys: Iterable[str]) -> dict[str, Any]:
    local = PathManager.get_local_path(path) if "://" in path else path
    if not Path(local).is_file():
        raise InputError(f"COCO JSON {path} does not exist.")
    coco = read_json(local)
    if not isinstance(coco, dict):
        raise InputError(f"{path} is not a COCO file: its top level is {_shown(coco)}, not an object.")
    for key in keys:
        if not isinstance(coco.get(key), list) or not coco[key]:
            raise InputError(f"{path} is not a COCO file of labels: it has no {key!r}.")
    return coco


def _check_unique(path: str, key: str, entries: Sequence[Any], but: Iterable[str] = ()) -> None:
    for field, types in _UNIQUE[key]:
        if field in but:
            continue
        seen: dict[Any, int] = {}
        for index, entry in enumerate(entries):
            value = entry.get(field) if isinstance(entry, dict) else None
            if type(value) not in types or value == "":
                words = " or ".join(_WORDS[t] for t in types)
                raise InputError(
                    f"{path}, {key}[{index}]: its {field!r} is {_shown(value)}: it must be {words}."
                )
            if field == "file_name" and "://" not in value:
                value = os.path.normpath(value)
            if value in seen:
                raise InputError(
                    f"{path} has two {key} of the same {field}: {value!r}, in {key}[{seen[value]}] and "
                    f"{key}[{index}]; give each once."
                )
            seen[value] = index
        if len({type(value) for value in seen}) > 1:
            raise InputError(
                f"{path} has {key} whose {field!r} is a number and others where it is a text: use one."
            )


def _pixels(path: str, index: int, key: str, value: Any) -> int:
    if type(value) is int and value > 0:
        return value
    if type(value) is float and value > 0 and value.is_integer():
        return int(value)
    raise InputError(
        f"{path}, images[{index}]: its {key!r} is {_shown(value)}: it must be a number of pixels."
    )


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


def _compressed(segmentation: Any) -> Any:
    """Plain run lengths as COCO's compressed ones."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, *map(int, segmentation["size"]))
    return segmentation


def _shown(value: Any) -> str:
    """A value as JSON has it, short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
