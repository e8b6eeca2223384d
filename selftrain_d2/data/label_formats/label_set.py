"""Labels that were read, and what the readers of single formats share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selftrain_d2.data.coco_file import CocoFile, check_coco
from selftrain_d2.data.image_files import read_image_size
from selftrain_d2.errors import InputError

logger = logging.getLogger(__name__)

#: Box in pixels (x, y, width, height), class, and further keys of a COCO annotation.
Objects = list[dict[str, Any]]


@dataclass
class LabelSet:
    """Labels of any format, checked and repaired.

    Attributes:
        file: the COCO dictionary; file names are relative to ``image_root``.
        image_root: folder of the images; None where the format does not know it.
        has_validation: whether the same path also has a split "val".
        is_coco: whether it was read from COCO JSON, so that the path can be used as it is.
    """

    file: CocoFile
    image_root: str | None
    has_validation: bool = False
    is_coco: bool = False


@dataclass
class CocoBuilder:
    """A COCO dictionary, image by image.

    Attributes:
        source: what is read, for messages.
        classes: names in the order of their ids, from 1.
        image_root: what file names become relative to.
    """

    source: str
    classes: Sequence[str]
    image_root: str
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def add(self, image: Path, size: tuple[int, int], objects: Objects) -> None:
        """Add an image of (height, width) with annotations whose ``category_id`` counts from 0."""
        image_id = len(self.images) + 1
        name = Path(os.path.relpath(image, self.image_root)).as_posix()
        self.images.append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
        for found in objects:
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    **found,
                    "category_id": found["category_id"] + 1,
                    "area": found["bbox"][2] * found["bbox"][3],
                }
            )

    def finish(self) -> LabelSet:
        """Through the checks that COCO files go through."""
        content = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.classes, start=1)],
        }
        return LabelSet(check_coco(self.source, content), self.image_root)


def image_size(image: Path) -> tuple[int, int]:
    """(height, width) in pixels, upright.

    Raises:
        InputError: the image cannot be read.
    """
    try:
        return read_image_size(image)
    except OSError as error:
        raise InputError(f"Image {image} cannot be read ({error}): repair it, or remove it.") from error


def without_doubles(images: Iterable[Path], what: str) -> list[Path]:
    """Images, sorted, of which no two have one label file.

    Raises:
        InputError: two differ in their ending alone.
    """
    images = sorted(images)
    seen: dict[Path, Path] = {}
    for image in images:
        other = seen.setdefault(image.with_suffix(""), image)
        if other is not image:
            raise InputError(
                f"{other} and {image.name} differ in their ending alone, and so share one {what}: rename one."
            )
    return images


def read_text(file: Path) -> str:
    """Text of a file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: it is not UTF-8, or cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error}): save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}).") from error


def inside(box: tuple[float, float, float, float], size: tuple[int, int], where: str, tolerance=1.0) -> list:
    """A box (left, top, right, bottom) as XYWH, cut at the border of its image of (height, width).

    Raises:
        InputError: it is turned round, or lies more than ``tolerance`` pixels outside.
    """
    left, top, right, bottom = box
    height, width = size
    if right < left or bottom < top:
        raise InputError(f"{where}: the box has a negative size; correct it.")
    excess = max(-left, -top, right - width, bottom - height)
    if excess > tolerance:
        raise InputError(
            f"{where}: the box lies {excess:g} pixels outside its image of {width} x {height}; correct it."
        )
    left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)
    return [left, top, max(right - left, 0.0), max(bottom - top, 0.0)]
