"""The operations by name, and the augmentation that draws one.

Names are those of [TF]: ``Rotate_BBox`` moves the image with its boxes, ``Rotate_Only_BBoxes`` the pixels
inside each box, ``Color`` changes pixel values only. Randomness is numpy's global generator, as in
detectron2, and only in ``get_transform``: a drawn transform can be applied again with the same result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data.transforms import Augmentation
from detectron2.utils.logger import log_first_n
from fvcore.transforms.transform import NoOpTransform, Transform

from selftrain_d2.data.augmentation import levels, pixel
from selftrain_d2.data.augmentation.box_only import BoxOnlyTransform
from selftrain_d2.data.augmentation.geometric import AffineTransform
from selftrain_d2.data.augmentation.levels import (
    AUTOAUGMENT_LENGTHS,
    BOX_LENGTHS,
    REFERENCE_SIDE,
    PixelLengths,
)
from selftrain_d2.errors import InputError


@dataclass(frozen=True)
class OperationSettings:
    """What operations must know besides their level.

    Attributes:
        image_format: channel order of the images, RGB or BGR; of no matter to grey images.
        min_area_fraction: a box that keeps less than this share (0 to 1) of its area is lost.
        ignore_label: the fill of a semantic segmentation.
        lengths: the arguments in pixels at level 10, for operations on the whole image.
        scale_lengths: whether all lengths are multiplied by the image's longer side / 640.
    """

    image_format: str = "BGR"
    min_area_fraction: float = 0.1
    ignore_label: int = 255
    lengths: PixelLengths = AUTOAUGMENT_LENGTHS
    scale_lengths: bool = True


DEFAULT_SETTINGS = OperationSettings()


@dataclass(frozen=True)
class _Operation:
    """How a name becomes a transform.

    Attributes:
        build: ``(argument, height, width, settings) -> Transform``, for an image or a box of that size.
        argument: ``(level, lengths) -> argument``; None for operations without one.
        signed: whether the argument gets a random sign, one for all boxes of an image [TF].
    """

    build: Callable[[Any, int, int, OperationSettings], Transform]
    argument: Callable[[float, PixelLengths], Any] | None = None
    signed: bool = False

    def draw_argument(self, level: float, lengths: PixelLengths) -> Any:
        if self.argument is None:
            return None
        argument = self.argument(level, lengths)
        return -argument if self.signed and np.random.uniform() < 0.5 else argument


def _pixel(function: Callable[..., np.ndarray], argument_name: str | None = None, needs_format=False):
    def build(argument, height, width, settings):
        arguments = {argument_name: argument} if argument_name else {}
        if needs_format:
            arguments["image_format"] = settings.image_format
        return pixel.PixelTransform(function, **arguments)

    return build


def _cutout(half_side, height, width, settings):
    center_x, center_y = np.random.randint(width), np.random.randint(height)
    return pixel.PixelTransform(pixel.cutout, center_x=center_x, center_y=center_y, half_side=half_side)


def _affine(constructor: Callable[..., AffineTransform]):
    def build(argument, height, width, settings):
        if argument == 0:
            return NoOpTransform()
        options = {"min_area_fraction": settings.min_area_fraction, "ignore_label": settings.ignore_label}
        return constructor(argument, height, width, **options)

    return build


_SOLARIZE = _Operation(_pixel(pixel.solarize, "threshold"), levels.solarize_threshold)
_EQUALIZE = _Operation(_pixel(pixel.equalize))
_CUTOUT = _Operation(_cutout, levels.cutout_pixels)
_ROTATE = _Operation(_affine(AffineTransform.rotation), levels.rotate_degrees, signed=True)
_SHEAR_X = _Operation(_affine(AffineTransform.shear_x), levels.shear_factor, signed=True)
_SHEAR_Y = _Operation(_affine(AffineTransform.shear_y), levels.shear_factor, signed=True)
_TRANSLATE_X = _Operation(_affine(AffineTransform.translation_x), levels.translate_pixels, signed=True)
_TRANSLATE_Y = _Operation(_affine(AffineTransform.translation_y), levels.translate_pixels, signed=True)

# On the whole image.
IMAGE_OPERATIONS = {
    "AutoContrast": _Operation(_pixel(pixel.autocontrast)),
    "Equalize": _EQUALIZE,
    "Invert": _Operation(_pixel(pixel.invert)),
    "Posterize": _Operation(_pixel(pixel.posterize, "bits"), levels.posterize_bits),
    "Solarize": _SOLARIZE,
    "SolarizeAdd": _Operation(_pixel(pixel.solarize_add, "addition"), levels.solarize_addition),
    "Color": _Operation(_pixel(pixel.color, "factor", needs_format=True), levels.enhance_factor),
    "Contrast": _Operation(_pixel(pixel.contrast, "factor", needs_format=True), levels.enhance_factor),
    "Brightness": _Operation(_pixel(pixel.brightness, "factor"), levels.enhance_factor),
    "Sharpness": _Operation(_pixel(pixel.sharpness, "factor"), levels.enhance_factor),
    "Cutout": _CUTOUT,
    "Rotate_BBox": _ROTATE,
    "ShearX_BBox": _SHEAR_X,
    "ShearY_BBox": _SHEAR_Y,
    "TranslateX_BBox": _TRANSLATE_X,
    "TranslateY_BBox": _TRANSLATE_Y,
}
# Inside each box on its own, where the box stays.
BOX_OPERATIONS = {
    "Solarize_Only_BBoxes": _SOLARIZE,
    "Equalize_Only_BBoxes": _EQUALIZE,
    "Cutout_Only_BBoxes": _CUTOUT,
    "Rotate_Only_BBoxes": _ROTATE,
    "ShearX_Only_BBoxes": _SHEAR_X,
    "ShearY_Only_BBoxes": _SHEAR_Y,
    "TranslateX_Only_BBoxes": _TRANSLATE_X,
    "TranslateY_Only_BBoxes": _TRANSLATE_Y,
    "Flip_Only_BBoxes": _Operation(_affine(AffineTransform.flip_x)),
}
OPERATION_NAMES = (*IMAGE_OPERATIONS, *BOX_OPERATIONS)


class RandomOperation(Augmentation):
    """One operation, done with a probability."""

    def __init__(self, name: str, prob: float, level: float, settings: OperationSettings = DEFAULT_SETTINGS):
        """
        Args:
            name: one of ``OPERATION_NAMES``.
            prob: probability (0 to 1) that it is done. An operation inside boxes is drawn for each box
                with a third of it [TF].
            level: its strength, from 0; the tables have up to 10.
            settings: what else it must know.

        Raises:
            InputError: for an unknown name, a probability outside 0 - 1 or a negative level.
        """
        super().__init__()
        if name not in OPERATION_NAMES:
            raise InputError(f"Unknown operation {name!r}; known are {', '.join(OPERATION_NAMES)}.")
        if not 0 <= prob <= 1 or not level >= 0:
            raise InputError(
                f"{name} got probability {prob} and level {level}; give a probability of 0 to 1 and a "
                "level from 0."
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None = None) -> Transform:
        """Draw the transform.

        Args:
            image: (H, W) or (H, W, C); only its size matters.
            boxes: (N, 4) XYXY in pixels, or None where they are not known; then operations inside
                boxes do nothing.
        """
        height, width = image.shape[:2]
        if self.name in BOX_OPERATIONS:
            return self._inside_boxes(height, width, boxes)
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        operation = IMAGE_OPERATIONS[self.name]
        lengths = self.settings.lengths.scaled(self._length_factor(height, width))
        argument = operation.draw_argument(self.level, lengths)
        return operation.build(argument, height, width, self.settings)

    def _inside_boxes(self, height: int, width: int, boxes: np.ndarray | None) -> Transform:
        if boxes is None:
            log_first_n(
                logging.WARNING,
                f"{self.name} does nothing: this data mapper does not pass boxes to augmentations; "
                "use SelfTrainingDatasetMapper.",
                key="message",
            )
            return NoOpTransform()
        operation = BOX_OPERATIONS[self.name]
        argument = operation.draw_argument(self.level, BOX_LENGTHS.scaled(self._length_factor(height, width)))
        chosen = np.random.uniform(size=len(boxes)) < self.prob / 3
        # All pixels that a box touches.
        regions = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1)
        regions = regions.clip(0, (width, height, width, height)).astype(int)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (regions[:, 2:] > regions[:, :2]).all(axis=1)
        indices = np.flatnonzero(chosen & has_area)
        if len(indices) == 0:
            return NoOpTransform()
        transforms = [
            operation.build(argument, y1 - y0, x1 - x0, self.settings)
            for x0, y0, x1, y1 in regions[indices].tolist()
        ]
        return BoxOnlyTransform(regions[indices], transforms, indices)

    def _length_factor(self, height: int, width: int) -> float:
        return max(height, width) / REFERENCE_SIDE if self.settings.scale_lengths else 1.0
