"""Levels of AutoAugment and RandAugment, and the argument each operation makes of them.

A level is a strength: 0 to 10 in AutoAugment's tables, any number from 0 in RandAugment (the paper used 10
and 15). The ranges given are for levels 0 to 10 and go on linearly above.

Sources: [TF] tensorflow/tpu, models/official/detection, autoaugment_utils.py; [MG] tensorflow/models,
official/vision/ops/augment.py.
"""

from __future__ import annotations

from dataclasses import dataclass

# The longer side, in pixels, of the images for which lengths in pixels were chosen (COCO's).
REFERENCE_SIDE = 640


@dataclass(frozen=True)
class PixelLengths:
    """The arguments that are lengths, at level 10.

    Attributes:
        translate: shift in pixels.
        cutout: half the side of the square in pixels.
    """

    translate: float
    cutout: float

    def scaled(self, factor: float) -> PixelLengths:
        return PixelLengths(self.translate * factor, self.cutout * factor)


AUTOAUGMENT_LENGTHS = PixelLengths(translate=250.0, cutout=100.0)  # [TF]
RANDAUGMENT_LENGTHS = PixelLengths(translate=100.0, cutout=40.0)  # [MG]
BOX_LENGTHS = PixelLengths(translate=120.0, cutout=50.0)  # [TF], inside boxes


def rotate_degrees(level: float, _: PixelLengths) -> float:
    """0 to 30 degrees."""
    return level / 10 * 30.0


def shear_factor(level: float, _: PixelLengths) -> float:
    """0 to 0.3 pixels of shift per pixel of distance."""
    return level / 10 * 0.3


def translate_pixels(level: float, lengths: PixelLengths) -> int:
    """0 to ``lengths.translate``, rounded: whole pixels move without interpolation."""
    return round(level / 10 * lengths.translate)


def cutout_pixels(level: float, lengths: PixelLengths) -> int:
    """0 to ``lengths.cutout``, rounded."""
    return round(level / 10 * lengths.cutout)


def enhance_factor(level: float, _: PixelLengths) -> float:
    """0.1 to 1.9 for Color, Contrast, Brightness and Sharpness; 1 (level 5) leaves the image as it is."""
    return level / 10 * 1.8 + 0.1


def posterize_bits(level: float, _: PixelLengths) -> int:
    """1 to 4 bits kept of 8: a *higher* level is weaker, as in [TF].

    [TF] keeps 0 bits below level 2.5, which makes the image black; at least 1 bit is kept here.
    """
    return min(max(int(level / 10 * 4), 1), 8)


def solarize_threshold(level: float, _: PixelLengths) -> int:
    """0 (all is inverted) to 256 (nothing is): a *higher* level is weaker, as in [TF]."""
    return min(int(level / 10 * 256), 256)


def solarize_addition(level: float, _: PixelLengths) -> int:
    """0 to 110 grey levels, added to the values below 128."""
    return min(int(level / 10 * 110), 255)
