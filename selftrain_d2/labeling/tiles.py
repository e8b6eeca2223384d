"""A teacher over large images: cut into tiles, which share batches as images do; boxes are put together again.

Of an image only its pixels are in memory at full size, once more while the next one is read: tiles are cut out and
resized when their turn comes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import nn
from tqdm import tqdm

from selftrain_d2.data.image_files import read_image
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.tiles import Tiles
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.inference import Sample, box_row, label_in_order, make_sample
from selftrain_d2.labeling.segment import makes_masks
from selftrain_d2.labeling.tile_merge import merge_tiles

#: An image: ``file_name``, and either ``pixels`` (H, W, C) uint8 or ``skipped``, the reason.
Picture = dict
#: Images of fewer tiles have no progress of their own.
_MANY_TILES = 100


def check_tiles(tiles: Tiles, model: nn.Module) -> None:
    """Raise InputError if a model's output cannot be put together from tiles, or the tiles do not allow it."""
    if makes_masks(model):
        raise InputError("Tiles are for boxes, and this model labels pixels: leave --tile out.")
    if getattr(getattr(model, "roi_heads", None), "mask_on", False):
        raise InputError(
            "Tiles are for boxes, and this model makes masks of objects: set MODEL.MASK_ON False to have its boxes "
            "alone, or leave --tile out."
        )
    if tiles.overlap_pixels < 1:
        raise InputError(
            f"Tiles of {tiles.size} pixels with an overlap of {tiles.overlap:g} share no pixel, and an object that is "
            "cut would be found twice: give a larger --overlap."
        )


def read_pictures(image_root: str, file_names: Iterable[str], image_format: str) -> Iterator[Picture]:
    """Images of files in their order, each read while the one before it is worked on."""

    def read(name: str) -> Picture:
        try:
            path = os.path.join(image_root, name)
            return {"file_name": name, "pixels": read_image(path, image_format, large=True)}
        except Exception as error:  # Pillow's decoders raise anything on a broken file
            return {"file_name": name, "skipped": f"{type(error).__name__}: {error}"}

    with ThreadPoolExecutor(1, "read images") as pool:
        coming = None
        for name in file_names:
            ready, coming = coming, pool.submit(read, name)
            if ready is not None:
                yield ready.result()
            del ready  # or it would keep an image
        if coming is not None:
            yield coming.result()


def label_tiles_in_order(
    pictures: Iterable[Picture],
    teacher: Callable[[Sequence[Sample]], Iterable[Instances]],
    batch_size: int,
    tiles: Tiles,
    augmentations: Sequence[T.AugmentationList],
    labeled_row: Callable[[Sample, Any], Any] = box_row,
    skipped_row: Callable[..., Any] = make_row,
    progress: bool = False,
) -> Iterator[Any]:
    """:func:`~selftrain_d2.labeling.inference.label_in_order` of images that are seen tile by tile.

    Each tile is resized, and its boxes limited in number, as an image of that size is. An image of one tile gets the
    boxes that it gets without tiles.

    Args:
        teacher: gives the boxes of each of some samples.
        augmentations: the resizing at each scale.
        labeled_row: of a sample (``file_name``, ``height``, ``width``) and the ``Instances`` of the whole image, in its
            pixels.
        progress: show one for the tiles of an image that has many.
    """
    found = label_in_order(
        _cut(pictures, tiles, augmentations),
        teacher,
        batch_size,
        labeled_row=lambda sample, instances: (sample["picture"], instances),
        skipped_row=lambda name, skipped: ({"file_name": name, "skipped": skipped}, None),
    )
    for picture, first in found:
        if "skipped" in picture:
            yield skipped_row(picture["file_name"], skipped=picture["skipped"])
            continue
        grid = tiles.grid(picture["height"], picture["width"])
        parts = [first]
        hidden = not progress or len(grid) < _MANY_TILES
        for _ in tqdm(grid[1:], desc=picture["file_name"], unit="tile", leave=False, disable=hidden):
            parts.append(next(found)[1])
        yield labeled_row(picture, put_together(parts, grid, (picture["height"], picture["width"])))


def _cut(
    pictures: Iterable[Picture], tiles: Tiles, augmentations: Sequence[T.AugmentationList]
) -> Iterator[Sample]:
    for picture in pictures:
        if "skipped" in picture:
            yield picture
            continue
        pixels = picture["pixels"]
        whole = {"file_name": picture["file_name"], "height": pixels.shape[0], "width": pixels.shape[1]}
        for x0, y0, x1, y1 in tiles.grid(*pixels.shape[:2]):
            yield {**make_sample(whole["file_name"], pixels[y0:y1, x0:x1], augmentations), "picture": whole}
        del picture, pixels  # before the next one is waited for


def put_together(parts: Sequence[Instances], grid: np.ndarray, size: tuple[int, int]) -> Instances:
    """The boxes of an image of (height, width) from those of its tiles, each in pixels of its tile.

    Args:
        grid: (T, 4) XYXY, the tiles.
    """
    if len(parts) == 1:
        return parts[0]
    tile_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    boxes = (
        np.concatenate([part.pred_boxes.tensor.numpy() for part in parts]) + grid[tile_of][:, [0, 1, 0, 1]]
    )
    scores = np.concatenate([part.scores.numpy() for part in parts])
    classes = np.concatenate([part.pred_classes.numpy() for part in parts])
    boxes, scores, classes = merge_tiles(grid, tile_of, boxes, scores, classes)
    return Instances(
        size,
        pred_boxes=Boxes(torch.from_numpy(boxes).float()),
        scores=torch.from_numpy(scores),
        pred_classes=torch.from_numpy(classes),
    )
