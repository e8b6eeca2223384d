"""The geometry every policy ends with: resize by a random scale, crop or pad to the target size."""

from __future__ import annotations

import math

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from selftrain_d2.data.augmentation.geometric import ResizeCropPadTransform
from selftrain_d2.errors import InputError


def _resized(height: int, width: int, scale: float) -> tuple[tuple[int, int], tuple[float, float]]:
    """The size (height, width) after scaling, at least one pixel, and the exact factors it implies."""
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    return size, (size[0] / height, size[1] / width)


class ScaleJitterCrop(T.Augmentation):
    """Resize by one random scale, then crop at random or pad, to a square.

    The scale is ``s * size / longer side`` with s drawn uniformly (Table 1: 0.8 - 1.2, or 0.5 - 2.0), so the
    aspect ratio stays.
    """

    def __init__(
        self,
        size: int,
        scale_range: tuple[float, float],
        *,
        pad_value: tuple[float, ...] = (128.0,),
        min_area_fraction: float = 0.1,
        ignore_label: int = 255,
    ):
        """
        Args:
            size: side of the result in pixels.
            scale_range: smallest and largest s.
            pad_value: one value a channel, in the image's channel order; the mean colour is 0 after
                normalization.
            min_area_fraction: a box of which the crop keeps less than this share (0 to 1) is lost.
            ignore_label: the padding of a semantic segmentation.

        Raises:
            InputError: for a size below 1 or a range that is not 0 < smallest <= largest.
        """
        super().__init__()
        smallest, largest = scale_range
        if size < 1 or not 0 < smallest <= largest:
            raise InputError(
                f"INPUT.AUGMENTATION.IMAGE_SIZE {size} with SCALE_RANGE {tuple(scale_range)} is not "
                "possible: give a size from 1 and a range of 0 < smallest <= largest."
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the transform for an image (H, W) or (H, W, C)."""
        height, width = image.shape[:2]
        jitter = np.random.uniform(*self.scale_range)
        place = np.random.uniform(size=2)
        resized, scale = _resized(height, width, jitter * self.size / max(height, width))
        content = min(resized[0], self.size), min(resized[1], self.size)
        # The crop starts at a whole source pixel, so that only its own pixels need resizing.
        last = [
            side - math.ceil(kept / factor - 1e-6)
            for side, kept, factor in zip((height, width), content, scale)
        ]
        origin = int(place[0] * (last[0] + 1)), int(place[1] * (last[1] + 1))
        return ResizeCropPadTransform(
            scale,
            origin,
            content,
            (self.size, self.size),
            self.pad_value,
            min_area_fraction=self.min_area_fraction,
            ignore_label=self.ignore_label,
        )


class FitLongerSide(T.ResizeShortestEdge):
    """Resize so that the longer side has the given length: test images.

    detectron2's own transform, pixel for pixel, with both of its sides the same: its predictor, demo and test loader
    do as much where INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST are ``size``.
    """

    def __init__(self, size: int):
        """
        Args:
            size: the longer side of the result in pixels.

        Raises:
            InputError: for a size below 1.
        """
        if size < 1:
            raise InputError(f"INPUT.AUGMENTATION.IMAGE_SIZE is {size}: give a size from 1.")
        super().__init__(size, size)
        self.size = size

    def get_transform(self, image: np.ndarray) -> Transform:
        """The transform for an image (H, W) or (H, W, C)."""
        height, width = image.shape[:2]
        resized = self.get_output_shape(height, width, self.size, self.size)
        return T.ResizeTransform(height, width, *(max(side, 1) for side in resized))
