"""A grid of tiles over an image that is larger than a network's input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selftrain_d2.errors import InputError

#: Tiles cover less of each other than this: nearly equal ones would be seen again and again.
MOST_OVERLAP = 0.9


@dataclass(frozen=True)
class Tiles:
    """Square tiles, of which neighbours share a strip.

    Args:
        size: side of a tile, in pixels of the image.
        overlap: share of the side that neighbours have in common at least, from 0 to 0.9.

    Raises:
        InputError: a number is out of range.
    """

    size: int
    overlap: float

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"The side of a tile must be at least 1 pixel, not {self.size}.")
        if not 0 <= self.overlap <= MOST_OVERLAP:
            raise InputError(f"The overlap of tiles must be from 0 to {MOST_OVERLAP}, not {self.overlap}.")

    @property
    def overlap_pixels(self) -> int:
        """What neighbours share at least, in pixels."""
        return int(self.overlap * self.size)

    def grid(self, height: int, width: int) -> np.ndarray:
        """(T, 4) int64, XYXY in pixels: the tiles of an image, row by row.

        All have the full size, so that they share batches: the last of a row or column is moved back into the image,
        and shares more. Where the image is smaller than a tile, tiles are as small.
        """
        corners = [(x, y) for y in self._starts(height) for x in self._starts(width)]
        size = min(self.size, width), min(self.size, height)
        return np.array([(x, y, x + size[0], y + size[1]) for x, y in corners])

    def _starts(self, length: int) -> list[int]:
        last = max(length - self.size, 0)
        return [*range(0, last, self.size - self.overlap_pixels), last]
