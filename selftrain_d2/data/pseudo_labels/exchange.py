"""Pseudo labels as COCO JSON, for tools that show and correct boxes (FiftyOne, CVAT, Label Studio), and back."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import PurePath
from typing import Any, TextIO
from urllib.parse import unquote

import numpy as np
import pycocotools.mask as mask_util

from selftrain_d2.data.datasets import check_coco_json, coco_class_names, read_image_size
from selftrain_d2.data.image_sources import absolute_root, check_distinct
from selftrain_d2.data.label_formats.results import is_results, read_predictions
from selftrain_d2.data.pseudo_labels.dataset import PseudoLabelDataset
from selftrain_d2.data.pseudo_labels.manifest import read_manifest_of_boxes
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.pseudo_labels.selection import ScoreThreshold
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.errors import InputError
from selftrain_d2.files import whole_file
from selftrain_d2.storage import is_file, missing_files, read_bytes

logger = logging.getLogger(__name__)

#: What Label Studio puts before the names of files on its machine's disk.
LABEL_STUDIO_PREFIX = "/data/local-files/?d="


def export_coco(
    folder: str | os.PathLike,
    json_file: str | os.PathLike,
    score_thresh: ScoreThreshold = 0.5,
    *,
    top_k: int | None = None,
    boxes_per_image: float | None = None,
) -> dict[str, int]:
    """Write pseudo labels as COCO JSON, image by image: memory holds none of it.

    Category ids are 1, 2, ... in the order of the classes, file names are relative to the image root (which
    ``info`` names), and each annotation has its ``score``. Images without boxes are there, skipped ones are not.
    Masks are compressed RLE; boxes without one have the ``segmentation`` ``[]``, because CVAT and datumaro refuse files
    without that key, or without ``licenses``.

    Args:
        folder: what ``generate_pseudo_labels`` wrote.
        json_file: to write, whole or not at all.
        score_thresh, top_k, boxes_per_image: which boxes, see ``load_pseudo_labels``.

    Returns:
        How many ``images`` and ``annotations`` were written.

    Raises:
        InputError: as ``load_pseudo_labels``; or the disk is full.
    """
    manifest = read_manifest_of_boxes(folder)
    labels = load_pseudo_labels(folder, score_thresh, top_k=top_k, boxes_per_image=boxes_per_image)
    info = {
        "description": "Pseudo labels: boxes of a detector, with scores",
        "image_root": manifest["image_root"],
        "teacher_weights_sha256": manifest.get("teacher_weights_sha256"),
    }
    categories = [{"id": i, "name": name} for i, name in enumerate(manifest["thing_classes"], start=1)]
    with whole_file(json_file) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f'{{"info": {json.dumps(info)},\n"licenses": [],\n')
        file.write(f'"categories": {json.dumps(categories)},\n"images": ')
        images = _write_list(file, _coco_images(labels))
        file.write(',\n"annotations": ')
        annotations = _write_list(file, _coco_annotations(labels))
        file.write("}\n")
    return {"images": images, "annotations": annotations}


def _write_list(file: TextIO, items: Iterable[dict[str, Any]]) -> int:
    number = 0
    for number, item in enumerate(items, start=1):
        file.write("[\n" if number == 1 else ",\n")
        file.write(json.dumps(item))
    file.write("]" if number else "[]")
    return number


def _coco_images(labels: PseudoLabelDataset) -> Iterator[dict[str, Any]]:
    for image_id, image in enumerate(labels, start=1):
        yield {
            "id": image_id,
            "file_name": image["image_id"],
            "height": image["height"],
            "width": image["width"],
        }


def _coco_annotations(labels: PseudoLabelDataset) -> Iterator[dict[str, Any]]:
    ids = itertools.count(1)
    for image_id, image in enumerate(labels, start=1):
        for annotation in image["annotations"]:
            left, top, right, bottom = annotation["bbox"]
            width, height = right - left, bottom - top
            yield {
                "id": next(ids),
                "image_id": image_id,
                "category_id": annotation["category_id"] + 1,
                "bbox": [left, top, width, height],
                "area": width * height,
                "iscrowd": 0,
                "segmentation": annotation.get("segmentation", []),
                # As short as float32 can be told: 0.7, where double precision has 0.699999988079071.
                "score": float(str(np.float32(annotation["score"]))),
            }


def import_coco(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    thing_classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Make a pseudo-label folder of a COCO JSON, such as an exported one that people corrected.

    Boxes keep their ``score``; those without one, which people drew, get 1. Annotations with ``iscrowd`` 1 are objects
    like the others: CVAT and datumaro mark RLE masks so. The log says how many there are of both. Masks, polygons or
    RLE, are kept if every box has one. Label Studio's names of local files (``/data/local-files/?d=...``) are made
    relative to the image root, and the sizes that it leaves out are read from the images.

    Args:
        json_file: COCO JSON. Read into memory as a whole.
        image_root: folder of the images that it names.
        folder: to write. Called again, it goes on where it was stopped.
        thing_classes: class names in the order of training, by which the file's categories are told; tools may
            have changed their ids or left some out. None: the file's own, by category id.

    Returns:
        The manifest.

    Raises:
        InputError: see ``check_coco_json``; a category that is not in ``thing_classes``; a score that is no number
            from 0 to 1; a mask for some boxes alone; ``folder`` holds other pseudo labels.
    """
    coco = check_coco_json(
        json_file, image_root, allow_flat=False, mend_image=lambda image: _mend_image(image, image_root)
    )
    sha256 = hashlib.sha256(read_bytes(json_file)).hexdigest()
    return _import(coco, sha256, json_file, image_root, folder, thing_classes)


def import_predictions(
    path: str | os.PathLike,
    image_root: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    thing_classes: Sequence[str] | None = None,
    image_json: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """:func:`import_coco` for someone else's predictions: COCO results, YOLO, VOC, or COCO JSON with scores.

    Args:
        path, image_json: see :func:`~selftrain_d2.data.label_formats.results.read_predictions`.
        thing_classes: class names; of a YOLO folder by the ids of its files, else in the order of training.

    Raises:
        InputError: see there, and :func:`import_coco`.
    """
    if os.fspath(path).lower().endswith(".json") and image_json is None and not is_results(path):
        return import_coco(path, image_root, folder, thing_classes=thing_classes)
    coco = read_predictions(path, os.fspath(image_root), image_json=image_json, classes=thing_classes)
    missing = missing_files(image_root, (image["file_name"] for image in coco["images"]))
    if missing:
        raise InputError(f"{path} names images that are not in {image_root}, e.g. {missing[0]}.")
    sha256 = hashlib.sha256(json.dumps(coco).encode()).hexdigest()
    return _import(coco, sha256, path, image_root, folder, thing_classes)


def _import(
    coco: dict[str, Any],
    sha256: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    folder: str | os.PathLike,
    thing_classes: Sequence[str] | None,
) -> dict[str, Any]:
    names = list(coco_class_names(coco) if thing_classes is None else thing_classes)
    check_distinct(names, "--classes")
    identity = {
        "thing_classes": names,
        "imported_json_sha256": sha256,
        "score_floor": 0.0,
        "image_root": absolute_root(image_root),
    }
    rows = _Rows(os.fspath(json_file), coco, names)
    with PseudoLabelWriter(folder, identity, [image["file_name"] for image in coco["images"]]) as writer:
        missing = writer.missing_shards()
        if writer.finished and not missing:
            return writer.manifest
        for shard in missing:
            writer.write_shard(shard, (rows[position] for position in writer.shard_range(shard)))
        return writer.finish(
            imported_json=absolute_root(json_file),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )


class _Rows:
    """The images of a COCO JSON as rows of the store, by position."""

    def __init__(self, json_file: str, coco: dict[str, Any], class_names: Sequence[str]):
        self.json_file = json_file
        self.images = coco["images"]
        unknown = [c["name"] for c in coco["categories"] if c["name"] not in class_names]
        if unknown:
            raise InputError(
                f"{json_file} has the category {unknown[0]!r}, which is not among {list(class_names)}: "
                "correct --classes, or the file."
            )
        self.contiguous = {c["id"]: class_names.index(c["name"]) for c in coco["categories"]}
        self.annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        annotations = coco.get("annotations", [])
        for annotation in annotations:
            self._check_score(annotation)
            self.annotations[annotation["image_id"]].append(annotation)
        boxes = len(annotations)
        masks = sum(bool(a.get("segmentation")) for a in annotations)
        if 0 < masks < boxes:
            raise InputError(
                f"{json_file} has masks for {masks} of its {boxes} boxes: add the others, or remove every "
                "'segmentation' to import boxes alone."
            )
        self.has_masks = masks > 0
        unscored = sum(a.get("score") is None for a in annotations)
        crowd = sum(bool(a.get("iscrowd")) for a in annotations)
        logger.info(
            f"{json_file}: {len(self.images)} images, {boxes} boxes, {unscored} of them without a score, which get 1"
            + (f", {crowd} of them with iscrowd 1, taken as objects." if crowd else ".")
        )
        logger.info(f"Classes, in the order of training: {', '.join(class_names)}.")

    def __getitem__(self, position: int) -> dict[str, Any]:
        image = self.images[position]
        annotations = self.annotations.get(image["id"], [])
        corners = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]  # XYWH to XYXY, rounded to float32 only afterwards
        return make_row(
            image["file_name"],
            image["height"],
            image["width"],
            corners,
            [_score(a) for a in annotations],
            [self.contiguous[a["category_id"]] for a in annotations],
            [self._mask(a, image["height"], image["width"]) for a in annotations] if self.has_masks else None,
        )

    def _check_score(self, annotation: Mapping[str, Any]) -> None:
        score = _score(annotation)
        if not isinstance(score, Real) or not 0 <= score <= 1:
            raise InputError(f"{self._where(annotation)}: the score {score!r} is no number from 0 to 1.")

    def _mask(self, annotation: Mapping[str, Any], height: int, width: int) -> str:
        try:
            rle = _run_lengths(annotation["segmentation"], height, width)
            size = list(rle["size"])
        except Exception as error:  # pycocotools raises that very class
            raise InputError(
                f"{self._where(annotation)}: the segmentation cannot be read ({error})."
            ) from error
        if size != [height, width]:
            raise InputError(
                f"{self._where(annotation)}: the mask is of {size} pixels, its image of {[height, width]}."
            )
        counts = rle["counts"]
        return counts if isinstance(counts, str) else counts.decode("ascii")

    def _where(self, annotation: Mapping[str, Any]) -> str:
        return f"{self.json_file}, annotation {annotation.get('id')}, image {annotation['image_id']}"


def _score(annotation: Mapping[str, Any]) -> float:
    score = annotation.get("score")
    return 1.0 if score is None else score


def _run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed RLE of polygons, or of RLE in any form."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def _mend_image(image: dict[str, Any], image_root: str | os.PathLike) -> None:
    """Undo what Label Studio did to an image's entry."""
    image["file_name"] = _local_name(image["file_name"], image_root)
    path = os.path.join(image_root, image["file_name"])
    # It knows those of boxes alone.
    if None in (image.get("height"), image.get("width")) and is_file(path):
        try:
            image["height"], image["width"] = read_image_size(path)
        except OSError as error:
            raise InputError(
                f"Image {path} has no size in the COCO JSON and cannot be read ({error}): leave it out of the file."
            ) from error


def _local_name(file_name: str, image_root: str | os.PathLike) -> str:
    """A file name without what Label Studio made of it."""
    _, prefix, quoted = file_name.partition(LABEL_STUDIO_PREFIX)
    if not prefix:
        return file_name
    name = unquote(quoted)
    # It begins at Label Studio's document root, in which the image root may lie deeper.
    root, parts = PurePath(absolute_root(image_root)).parts, PurePath(name).parts
    inside = (os.path.join(*parts[n:]) for n in range(len(parts)) if parts[:n] == root[len(root) - n :])
    return next((path for path in inside if is_file(os.path.join(image_root, path))), name)
