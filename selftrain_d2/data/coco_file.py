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

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from pycocotools.coco import COCO

from selftrain_d2.data.coco_repair import BROKEN, AnnotationRepair, shown
from selftrain_d2.errors import InputError
from selftrain_d2.files import read_json
from selftrain_d2.storage import is_file, is_folder, join, normalized

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
    return check_coco(
        path, _load(path), masks=masks, keypoints=keypoints, allow_flat=allow_flat, mend_image=mend_image
    )


def check_coco(
    path: str,
    coco: Any,
    *,
    masks: bool = False,
    keypoints: int | None = None,
    allow_flat: bool = True,
    mend_image: Callable[[dict[str, Any]], None] | None = None,
) -> CocoFile:
    """:func:`read_coco` of what was read already, from whatever format.

    Args:
        path: where it is from, for messages.
        coco: changed in place where it is repaired.
    """
    _check_lists(path, coco, ("categories", "images"))
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
            f"{path} is not a COCO file: its 'annotations' are {shown(coco['annotations'])}, no list."
        )
    names = file.keypoint_names
    AnnotationRepair(file, masks, keypoints or (len(names) if names else None), allow_flat).repair()
    return file


def read_coco_images(json_file: str | os.PathLike) -> list[dict[str, Any]]:
    """The images of a COCO JSON, labeled or not: see :func:`read_coco_listing`."""
    return read_coco_listing(json_file)["images"]


def read_coco_listing(json_file: str | os.PathLike) -> dict[str, Any]:
    """A COCO JSON that lists images, labeled or not; annotations and categories are not looked at, nor sizes.

    Raises:
        InputError: not JSON, no images, or an image without a file name, or with that of another.
    """
    path = os.fspath(json_file)
    coco = _load(path)
    _check_lists(path, coco, ("images",))
    _check_unique(path, "images", coco["images"], but=("id",))
    return coco


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
            "file_name": join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": annotations[image["id"]],
        }
        for image in sorted(file.content["images"], key=lambda image: image["id"])
    ]


def has_mask(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation that was read has a mask."""
    return bool(annotation.get("segmentation")) and annotation["segmentation"] != BROKEN


def contiguous_ids(file: CocoFile) -> dict[int, int]:
    """Category id to place among the classes."""
    return {category: i for i, category in enumerate(sorted(c["id"] for c in file.content["categories"]))}


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed RLE of a mask (H, W), as JSON holds it."""
    encoded = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


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


def _load(path: str) -> Any:
    if not is_file(path):
        if is_folder(path):
            raise InputError(
                f"{path} is a folder, not COCO JSON: YOLO and PASCAL VOC are taken by --labels {path}, where the "
                "command has it, and turned into COCO JSON by selftrain-d2 labels convert."
            )
        raise InputError(f"COCO JSON {path} does not exist.")
    try:
        return read_json(path)
    except OSError as error:
        raise InputError(f"COCO JSON {path} cannot be read ({error.strerror or error}).") from error


def _check_lists(path: str, coco: Any, keys: Iterable[str]) -> None:
    if not isinstance(coco, dict):
        raise InputError(f"{path} is not a COCO file: its top level is {shown(coco)}, not an object.")
    for key in keys:
        if not isinstance(coco.get(key), list) or not coco[key]:
            raise InputError(f"{path} is not a COCO file of labels: it has no {key!r}.")


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
                    f"{path}, {key}[{index}]: its {field!r} is {shown(value)}: it must be {words}."
                )
            if field == "file_name":
                value = normalized(value)
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
        f"{path}, images[{index}]: its {key!r} is {shown(value)}: it must be a number of pixels."
    )


def _compressed(segmentation: Any) -> Any:
    """Plain run lengths as COCO's compressed ones."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, *map(int, segmentation["size"]))
    return segmentation
