"""Operations on pixel values: pure functions of a uint8 image, and the transform that carries them.

They agree with Pillow's ``ImageOps`` and ``ImageEnhance`` within one grey level, by look-up tables and
OpenCV's vector code. Images are (H, W), (H, W, 1) or (H, W, 3), uint8; no function changes its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from fvcore.transforms.transform import NoOpTransform, Transform

from selftrain_d2.errors import InputError

# The fill of [TF] wherever an operation leaves no image.
FILL_VALUE = 128

# Weights of the channels in grey (ITU-R 601, as Pillow and [TF]).
_GREY_WEIGHTS = {"RGB": (0.299, 0.587, 0.114), "BGR": (0.114, 0.587, 0.299)}

# Added before OpenCV rounds, to truncate as Pillow does. A little less than 0.5, so that whole numbers
# survive the error of the arithmetic.
_TRUNCATE = -0.49


class PixelTransform(Transform):
    """An operation that changes pixel values and moves nothing."""

    def __init__(self, function: Callable[..., np.ndarray], **arguments: Any):
        """
        Args:
            function: one of this module, called as ``function(image, **arguments)``.
            arguments: its further arguments, which fix it: the same image gives the same result.
        """
        super().__init__()
        self.function = function
        self.arguments = arguments

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """
        Args:
            image: (H, W), (H, W, 1) or (H, W, 3), uint8.

        Returns:
            A uint8 array of the same shape.

        Raises:
            InputError: for another type of pixels, or another number of channels.
        """
        if image.dtype != np.uint8 or (image.ndim == 3 and image.shape[2] not in (1, 3)):
            raise InputError(
                f"{self.function.__name__} needs a uint8 image of 1 or 3 channels, not {image.dtype} "
                f"{image.shape}; set INPUT.FORMAT to RGB, BGR or L, or INPUT.AUGMENTATION.POLICY to S1."
            )
        return self.function(image, **self.arguments).reshape(image.shape)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        return box

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def apply_rotated_box(self, box: np.ndarray) -> np.ndarray:
        return box

    def inverse(self) -> Transform:
        return NoOpTransform()

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"PixelTransform({self.function.__name__}{', ' if arguments else ''}{arguments})"


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretch each channel to 0 - 255 (``ImageOps.autocontrast``)."""
    return _per_channel(image, _autocontrast_table)


def equalize(image: np.ndarray) -> np.ndarray:
    """Make each channel's histogram flat (``ImageOps.equalize``)."""
    return _per_channel(image, _equalize_table)


def invert(image: np.ndarray) -> np.ndarray:
    """Negative (``ImageOps.invert``)."""
    return cv2.bitwise_not(image)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keep the ``bits`` (0 to 8) highest bits of each value (``ImageOps.posterize``)."""
    return image & np.uint8(256 - 2 ** (8 - bits))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Invert the values from ``threshold`` (0 to 256) on (``ImageOps.solarize``)."""
    values = np.arange(256)
    return _apply_table(image, np.where(values < threshold, values, 255 - values))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Add ``addition`` grey levels to the values below 128 [TF]."""
    values = np.arange(256)
    return _apply_table(image, np.where(values < 128, values + addition, values))


def color(image: np.ndarray, factor: float, image_format: str) -> np.ndarray:
    """Saturation (``ImageEnhance.Color``): 0 is grey, 1 the image, above 1 more colorful."""
    if factor == 1 or image.ndim == 2 or image.shape[2] == 1:
        return image
    # factor * image + (1 - factor) * grey, as one matrix (3, 4) on each pixel's colors. OpenCV computes with
    # 10 fractional bits: rounded to these beforehand, rows still add up to 1 and grey pixels stay as they are.
    from_grey = np.rint((1 - factor) * np.array(_GREY_WEIGHTS[image_format]) * 1024) / 1024
    matrix = np.full((3, 4), _TRUNCATE)
    matrix[:, :3] = from_grey + (1 - from_grey.sum()) * np.eye(3)
    return cv2.transform(image, matrix)


def contrast(image: np.ndarray, factor: float, image_format: str) -> np.ndarray:
    """Distance from the mean grey (``ImageEnhance.Contrast``): 0 is all grey, 1 the image.

    The mean is the image's own; [TF] computes it from a mistaken pixel count.
    """
    if factor == 1:
        return image
    means = cv2.mean(image)
    is_grey = image.ndim == 2 or image.shape[2] == 1
    mean = means[0] if is_grey else np.dot(means[:3], _GREY_WEIGHTS[image_format])
    mean = int(mean + 0.5)
    return _apply_table(image, mean + factor * (np.arange(256) - mean))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the values (``ImageEnhance.Brightness``): 0 is black, 1 the image."""
    return image if factor == 1 else _apply_table(image, factor * np.arange(256))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Distance from the smoothed image (``ImageEnhance.Sharpness``): 0 is smooth, 1 the image.

    The smoothing kernel is a 3 x 3 of ones with 5 in the middle, over 13. The outermost pixels stay.
    """
    height, width = image.shape[:2]
    if factor == 1 or height < 3 or width < 3:
        return image
    # smooth = (9 * mean of 3 x 3 + 4 * image) / 13: a box filter is faster than any kernel.
    mean_weight = (1 - factor) * 9 / 13
    result = cv2.blur(image, (3, 3))
    cv2.addWeighted(image, 1 - mean_weight, result, mean_weight, _TRUNCATE, dst=result)
    result = result.reshape(image.shape)
    for edge in (0, -1):
        result[edge] = image[edge]
        result[:, edge] = image[:, edge]
    return result


def cutout(image: np.ndarray, center_x: int, center_y: int, half_side: int) -> np.ndarray:
    """Cover a square of side ``2 * half_side`` pixels, as much of it as lies in the image, with grey."""
    result = image.copy()
    rows = slice(max(center_y - half_side, 0), center_y + half_side)
    columns = slice(max(center_x - half_side, 0), center_x + half_side)
    result[rows, columns] = FILL_VALUE
    return result


def _apply_table(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look values up in a table (256,), or (256, C) for each channel its own; truncated, 0 - 255."""
    table = (table + 1e-6).clip(0, 255).astype(np.uint8)
    return cv2.LUT(image, table.reshape(1, 256, -1))


def _per_channel(image: np.ndarray, make_table: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply to each channel the table (256,) made from its histogram (256,)."""
    channels = 1 if image.ndim == 2 else image.shape[2]
    counts = [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(channels)]
    return _apply_table(image, np.stack([make_table(c.astype(np.int64)) for c in counts], axis=1))


def _autocontrast_table(counts: np.ndarray) -> np.ndarray:
    used = np.flatnonzero(counts)
    low, high = used[0], used[-1]
    return np.arange(256) if low == high else (np.arange(256) - low) * (255 / (high - low))


def _equalize_table(counts: np.ndarray) -> np.ndarray:
    used = counts[counts > 0]
    # The last used value does not count: as in Pillow, it always goes to (about) 255.
    step = (counts.sum() - used[-1]) // 255
    if len(used) == 1 or step == 0:
        return np.arange(256)
    below = np.cumsum(counts) - counts
    return (below + step // 2) // step
