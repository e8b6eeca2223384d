"""A human data set of large images cut into tiles once, to train on at full resolution.

The folder::

    tiles.json    how it was cut; written first
    images/       a/b.jpg_512_0.png: the tile of a/b.jpg whose left upper corner is at x = 512, y = 0
    labels.json   COCO; written last, so that a folder that has it is complete

What a tile shows of an object is an object if it is at least ``min_visible`` of the area of its box; else it is a
region with ``iscrowd`` 1, neither object nor background for trainings that ignore these. Crowd regions stay what they
are. Boxes are cut at the border of the tile; masks and keypoints are left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from selftrain_d2.data.coco_file import has_mask
from selftrain_d2.data.image_files import UNREADABLE, read_image
from selftrain_d2.data.image_sources import check_outside
from selftrain_d2.data.label_formats.label_set import LabelSet
from selftrain_d2.data.pseudo_labels.masks import mask_path
from selftrain_d2.data.tiles import Tiles
from selftrain_d2.errors import InputError
from selftrain_d2.files import check_unchanged, is_empty, read_json, whole_file, write_json, writing

logger = logging.getLogger(__name__)

IMAGES, LABELS, RECORD = "images", "labels.json", "tiles.json"


def tile_labels(
    labels: LabelSet,
    destination: str | os.PathLike,
    tiles: Tiles,
    *,
    min_visible: float = 0.5,
    drop_empty: bool = False,
) -> Counter:
    """Cut images and labels. Work that was stopped goes on where it stopped when called again.

    Args:
        destination: a folder, new or begun by the same call.
        min_visible: least share of a box's area that makes an object of what a tile shows, in (0, 1].
        drop_empty: leave out tiles without an object; by default they are kept, as images of background.

    Returns:
        What there is: see :func:`tiled_content`.

    Raises:
        InputError: a number is out of range; the folder of the images is not known; an image cannot be read, or is not
            of the size that the labels say; the destination has something else, or tiles that were cut otherwise.
    """
    if not 0 < min_visible <= 1:
        raise InputError(f"The visible share of an object must be above 0, up to 1, not {min_visible}.")
    if labels.image_root is None:
        raise InputError(f"{labels.file.path} does not know the folder of its images: give --images.")
    destination = Path(destination)
    check_outside(destination, labels.image_root)
    content, counts = tiled_content(
        labels.file.content, tiles, min_visible=min_visible, drop_empty=drop_empty
    )
    settings = {
        "labels_sha256": hashlib.sha256(json.dumps(labels.file.content).encode()).hexdigest(),
        "tile": tiles.size,
        "overlap": tiles.overlap,
        "min_visible": min_visible,
        "drop_empty": drop_empty,
    }
    _begin(destination, settings)
    if not (destination / LABELS).exists():
        _cut_images(labels, content["images"], destination / IMAGES)
        write_json(destination / LABELS, content)
    return counts


def tiled_content(
    coco: Mapping[str, Any], tiles: Tiles, *, min_visible: float, drop_empty: bool
) -> tuple[dict[str, Any], Counter]:
    """The COCO dictionary of the tiles. Images and annotations are numbered from 1; categories stay.

    Args:
        coco: a checked one. ``annotations`` may be missing.

    Returns:
        The dictionary, whose images also have ``source`` (file name) and ``tile`` (XYXY, pixels of the source), whose
        annotations ``source_id``; and the numbers of ``images``, ``tiles``, ``objects``, ``cut objects`` (among the
        former), ``ignored parts``, ``crowd regions``, ``empty tiles``, and of objects that no tile shows enough of,
        and of what is left out.
    """
    counts: Counter = Counter(images=len(coco["images"]), tiles=0, objects=0)
    annotations = defaultdict(list)
    for annotation in coco.get("annotations", ()):
        annotations[annotation["image_id"]].append(annotation)
    result: dict[str, Any] = {"images": [], "annotations": [], "categories": coco["categories"]}
    for image in sorted(coco["images"], key=lambda image: image["id"]):
        grid = tiles.grid(image["height"], image["width"])
        shown: list[list[dict[str, Any]]] = [[] for _ in grid]
        for annotation in annotations[image["id"]]:
            _place(annotation, image, grid, shown, min_visible, counts)
        for corners, parts in zip(grid.tolist(), shown):
            empty = all(part["iscrowd"] for part in parts)
            counts["empty tiles left out" if drop_empty else "empty tiles"] += empty
            if not (empty and drop_empty):
                _add(result, image, corners, parts, counts)
    return result, counts


def _place(
    annotation: Mapping[str, Any],
    image: Mapping[str, Any],
    grid: np.ndarray,
    shown: Sequence[list[dict[str, Any]]],
    min_visible: float,
    counts: Counter,
) -> None:
    """Add what each tile shows of an annotation."""
    x, y, width, height = annotation["bbox"]
    box = np.array(
        [max(x, 0), max(y, 0), min(x + width, image["width"]), min(y + height, image["height"])], float
    )
    counts["masks left out"] += has_mask(annotation)
    counts["keypoints left out"] += bool(annotation.get("keypoints"))
    if not (box[:2] < box[2:]).all():
        counts["boxes without area left out"] += 1
        return
    parts = np.concatenate([np.maximum(grid[:, :2], box[:2]), np.minimum(grid[:, 2:], box[2:])], axis=1)
    sides = (parts[:, 2:] - parts[:, :2]).clip(min=0)
    shares = sides.prod(axis=1) / (box[2:] - box[:2]).prod()
    for tile in np.flatnonzero(shares):
        crowd, cut = bool(annotation["iscrowd"]), bool(shares[tile] < min_visible)
        kind = "crowd regions" if crowd else "ignored parts" if cut else "objects"
        counts[kind] += 1
        counts["cut objects"] += kind == "objects" and bool(shares[tile] < 1)
        part = {
            "category_id": annotation["category_id"],
            "bbox": [*(parts[tile, :2] - grid[tile, :2]).tolist(), *sides[tile].tolist()],
            "area": annotation["area"] * float(shares[tile]),
            "iscrowd": int(crowd or cut),
            "source_id": annotation["id"],
        }
        if annotation.get("score") is not None:
            part["score"] = annotation["score"]
        shown[tile].append(part)
    counts["objects of which no tile shows enough"] += not annotation["iscrowd"] and bool(
        shares.max() < min_visible
    )


def _add(
    result: dict[str, Any],
    image: Mapping[str, Any],
    corners: Sequence[int],
    parts: Sequence[dict[str, Any]],
    counts: Counter,
) -> None:
    """Add a tile as an image."""
    counts["tiles"] += 1
    x0, y0, x1, y1 = corners
    place = Path(*Path(mask_path(image["file_name"])).parts[1:]).with_suffix("").as_posix()
    result["images"].append(
        {
            "id": counts["tiles"],
            "file_name": f"{place}_{x0}_{y0}.png",
            "height": y1 - y0,
            "width": x1 - x0,
            "source": image["file_name"],
            "tile": list(corners),
        }
    )
    for part in parts:
        number = len(result["annotations"]) + 1
        result["annotations"].append({"id": number, "image_id": counts["tiles"], **part})


def _begin(destination: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or see that it was begun with the same settings."""
    record = destination / RECORD
    if record.is_file():
        check_unchanged(destination, read_json(record), settings)
        for unfinished in destination.glob(f"{IMAGES}/**/.*.png.[0-9]*"):  # of a run that was killed
            unfinished.unlink()
        return
    if not is_empty(destination, RECORD):
        raise InputError(f"{destination} is not empty and has no {RECORD}: choose another folder.")
    with writing(destination):
        destination.mkdir(parents=True, exist_ok=True)
    write_json(record, settings)


def _cut_images(labels: LabelSet, entries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the tiles that are not there yet."""
    missing = defaultdict(list)
    for entry in entries:
        if not (folder / entry["file_name"]).exists():
            missing[entry["source"]].append(entry)
    sizes = {image["file_name"]: (image["height"], image["width"]) for image in labels.file.content["images"]}
    with tqdm(desc="cut tiles", unit="tile", total=sum(map(len, missing.values()))) as progress:
        for source, tiles in missing.items():
            path = os.path.join(labels.image_root, source)
            try:
                pixels = read_image(path, "BGR", large=True)
            except UNREADABLE as error:
                raise InputError(
                    f"Image {path} cannot be read ({error}): repair it, or remove it from {labels.file.path}."
                ) from error
            if pixels.shape[:2] != sizes[source]:
                raise InputError(
                    f"Image {path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, but {labels.file.path} says "
                    f"{sizes[source][1]} x {sizes[source][0]}: correct the labels."
                )
            for entry in tiles:
                x0, y0, x1, y1 = entry["tile"]
                _write_png(folder / entry["file_name"], pixels[y0:y1, x0:x1])
                progress.update()


def _write_png(file: Path, pixels: np.ndarray) -> None:
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        temporary.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
