"""Someone else's predictions as labels with scores: COCO results, or files of any format."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import pycocotools.mask as mask_util

from selftrain_d2.data.coco_file import check_coco, read_coco
from selftrain_d2.data.label_formats.detect import read_labels
from selftrain_d2.errors import InputError
from selftrain_d2.files import read_json
from selftrain_d2.storage import is_file, open_file

logger = logging.getLogger(__name__)


def read_predictions(
    path: str | os.PathLike,
    image_root: str,
    *,
    image_json: str | os.PathLike | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Predictions in YOLO, VOC or COCO results, as a checked COCO dictionary.

    Boxes of results are cut at the border of their image; what then has no area is left out, with a line of the log.

    Args:
        image_root: folder of the images; those of YOLO and VOC without a file of labels have no box.
        image_json: for COCO results, which have ids alone: a COCO JSON with their images and categories.
        classes: names by id, for a YOLO folder.

    Raises:
        InputError: a fault, with the file and line or entry.
    """
    if not is_results(path):
        if image_json is not None:
            raise InputError(f"--image-json goes with COCO results, which {path} is not: leave it out.")
        content = read_labels(path, images=image_root, classes=classes, empty=True).file.content
        return {**content, "annotations": _with_area(content["annotations"], path)}
    if image_json is None:
        raise InputError(
            f"{path} is a list of COCO results, which has ids alone: give --image-json, the COCO JSON with their "
            "images and categories."
        )
    known = read_coco(image_json)
    sizes = {image["id"]: (image["width"], image["height"]) for image in known.content["images"]}
    annotations = []
    for index, result in enumerate(read_json(path)):
        where = f"{path}, entry {index}"
        image_id = result.get("image_id") if isinstance(result, dict) else None
        if not isinstance(image_id, (int, str)) or image_id not in sizes:
            raise InputError(f"{where}: its 'image_id' is none of {image_json}'s images.")
        if "score" not in result:
            raise InputError(f"{where}: it has no 'score'.")
        box = _box(result, where)
        x, y, w, h = box
        width, height = sizes[image_id]
        left, top = max(x, 0.0), max(y, 0.0)
        box = [left, top, max(min(x + w, width) - left, 0.0), max(min(y + h, height) - top, 0.0)]
        kept = {key: result[key] for key in ("image_id", "category_id", "score") if key in result}
        mask = {"segmentation": result["segmentation"]} if result.get("segmentation") else {}
        annotations.append(
            {"id": index + 1, **kept, **mask, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        )
    content = {key: known.content[key] for key in ("images", "categories")}
    content["annotations"] = _with_area(annotations, path)
    return check_coco(os.fspath(path), content).content


def is_results(path: str | os.PathLike) -> bool:
    """Whether a path is a JSON file of COCO results, which is a list where COCO's labels are an object."""
    if not (os.fspath(path).lower().endswith(".json") and is_file(path)):
        return False
    with open_file(path) as file:  # not parsed: that is done once, by whoever reads it
        while chunk := file.read(4096):
            if text := chunk.lstrip():
                return text.startswith(b"[")
    return False


def _box(result: dict[str, Any], where: str) -> list[float]:
    box = result.get("bbox")
    if box is None and isinstance(result.get("segmentation"), dict):
        try:
            box = mask_util.toBbox(result["segmentation"]).tolist()
        except Exception as error:  # pycocotools raises that very class
            raise InputError(f"{where}: its 'segmentation' cannot be read ({error}).") from error
    numbers = isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)
    if not numbers or not all(map(math.isfinite, box)):
        raise InputError(f"{where}: its 'bbox' is not four finite numbers (x, y, width, height).")
    return box


def _with_area(annotations: list[dict[str, Any]], path: str | os.PathLike) -> list[dict[str, Any]]:
    kept = [a for a in annotations if a["bbox"][2] > 0 and a["bbox"][3] > 0]
    if len(kept) < len(annotations):
        logger.warning(
            f"{path}: left out {len(annotations) - len(kept)} boxes without area inside their image."
        )
    return kept
