"""Handwritten digits painted onto a photograph: pixels, exact ink masks, semantic mask.

Shapes: P = height and width of the (square) picture in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

IGNORE = 255

# Where the ink of an object is (its share of a pixel): from here on it counts as the object's pixel ...
HARD_INK = 0.5
# ... and from here on it is the soft edge, where a semantic mask says neither.
SOFT_INK = 0.1

MIN_VISIBLE_SHARE = 0.7  # of an object's ink: the rest may lie under other objects or outside the picture
EMPTY_SHARE = 0.05  # of the pictures have no digit
MAX_DIGITS = 6
MAX_DISTRACTORS = 2
MAX_BOX_OVERLAP = 0.3  # of the smaller of two objects' boxes: no digit sits inside another's loop
LONG_SIDE = (16, 56)  # of the upright ink, pixels; log-uniform
DEGREES = 15  # of rotation at most, either way
ASPECT = 1.2  # stretch at most, either way
CONTRAST = (60, 130)  # grey levels between the ink and the mean of what it covers
TINT = 30  # by which each channel of the ink's colour may differ, grey levels
OPACITY = (0.7, 1.0)
_ATTEMPTS = 30  # to find a place where all objects stay visible


@dataclass(frozen=True)
class PaintedObject:
    """One object of a scene.

    Attributes:
        category: 0 for a distractor.
        index: of its digit.
        box: XYXY in pixels, of all its ink, visible or not.
        ink_pixels: of hard ink, visible or not.
    """

    category: int
    index: int
    box: tuple[int, int, int, int]
    ink_pixels: int


@dataclass
class Scene:
    """A picture in the making; ``paint`` adds objects from bottom to top.

    Attributes:
        pixels: ``(P, P, 3)`` float32, 0-255, BGR.
        semantic: ``(P, P)`` uint8: 0 background, a digit's category, or ``IGNORE`` on soft ink.
        objects: from bottom to top.
        owner: ``(P, P)`` int16: which of ``objects`` has the topmost hard ink there, or -1.
    """

    pixels: np.ndarray
    semantic: np.ndarray = field(init=False)
    owner: np.ndarray = field(init=False)
    objects: list[PaintedObject] = field(default_factory=list)

    def __post_init__(self):
        self.pixels = self.pixels.astype(np.float32)
        self.semantic = np.zeros(self.pixels.shape[:2], np.uint8)
        self.owner = np.full(self.pixels.shape[:2], -1, np.int16)

    def paint(
        self, ink: np.ndarray, x: int, y: int, colour: np.ndarray, opacity: float, category: int, index: int
    ) -> bool:
        """Add an object on top, unless it would hide too much of an earlier one, or too little of it is visible.

        Args:
            ink: ``(h, w)`` float32: the share of each pixel that is ink, 0-1.
            x, y: its left upper corner in pixels of the picture; parts of it may lie outside.
            colour: ``(3,)`` BGR of the ink.
            opacity: 0-1; what is under full ink shines through by the rest.
            category: 0 for a distractor.
            index: of the digit, kept with the object.

        Returns:
            Whether it was painted.
        """
        height, width = self.owner.shape
        top, left = max(y, 0), max(x, 0)
        here = np.s_[top : min(y + ink.shape[0], height), left : min(x + ink.shape[1], width)]
        box = (x, y, x + ink.shape[1], y + ink.shape[0])
        added = PaintedObject(category, index, box, int((ink >= HARD_INK).sum()))
        if any(_overlap(box, painted.box) > MAX_BOX_OVERLAP for painted in self.objects):
            return False
        ink = ink[top - y :, left - x :][: height - top, : width - left]
        hard = ink >= HARD_INK
        owner = self.owner.copy()
        owner[here][hard] = len(self.objects)
        whole = np.array([painted.ink_pixels for painted in (*self.objects, added)])
        visible = np.bincount(owner[owner >= 0], minlength=len(whole))
        if (visible < MIN_VISIBLE_SHARE * whole).any():
            return False
        self.owner = owner
        self.objects.append(added)
        share = (opacity * ink)[..., None]
        self.pixels[here] += share * (colour - self.pixels[here])
        # The soft edge of a distractor is background where no digit is under it.
        soft = (ink >= SOFT_INK) & ~hard & ((category > 0) | (self.semantic[here] > 0))
        self.semantic[here][soft] = IGNORE
        self.semantic[here][hard] = category
        return True


def draw_scene(
    rng: np.random.Generator, photograph: np.ndarray, digits: np.ndarray, categories: np.ndarray
) -> Scene:
    """Paint random digits and distractors onto a photograph.

    Args:
        rng: makes every choice.
        photograph: ``(P, P, 3)`` uint8 BGR.
        digits: ``(D, 28, 28)`` uint8 to draw from, 255 is ink.
        categories: ``(D,)`` of the digits, from 1.
    """
    scene = Scene(photograph)
    count = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, MAX_DIGITS + 1))
    distractors = int(rng.integers(0, MAX_DISTRACTORS + 1))
    for is_digit in rng.permutation([True] * count + [False] * distractors):
        index = int(rng.integers(len(digits)))
        ink = warp_digit(
            digits[index] if is_digit else scramble(rng, digits[index]),
            long_side=np.exp(rng.uniform(*np.log(LONG_SIDE))),
            degrees=rng.uniform(-DEGREES, DEGREES),
            aspect=np.exp(rng.uniform(-np.log(ASPECT), np.log(ASPECT))),
        )
        opacity = rng.uniform(*OPACITY)
        for _ in range(_ATTEMPTS):
            x, y = (_draw_position(rng, length, scene.owner.shape[0]) for length in ink.shape[::-1])
            colour = _draw_colour(rng, _covered(photograph, ink, x, y))
            if scene.paint(ink, x, y, colour, opacity, int(categories[index]) if is_digit else 0, index):
                break
    return scene


def warp_digit(image: np.ndarray, long_side: float, degrees: float, aspect: float) -> np.ndarray:
    """Scale, stretch and turn a digit.

    Args:
        image: ``(28, 28)`` uint8, 255 is ink.
        long_side: of the upright ink's box afterwards, pixels.
        degrees: of rotation, counter-clockwise.
        aspect: how much wider against how much higher it gets; the product of both stays.

    Returns:
        ``(h, w)`` float32, 0-1, cut to where there is ink.
    """
    rows, columns = np.nonzero(image >= 255 * HARD_INK)
    stretch = np.array([np.sqrt(aspect), 1 / np.sqrt(aspect)])
    sides = np.array([np.ptp(columns) + 1, np.ptp(rows) + 1]) * stretch
    scale = long_side / sides.max()
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.diag(scale * stretch)
    side = int(np.ceil(28 * scale * stretch.max() * np.sqrt(2))) + 2
    shift = (side - 1) / 2 - matrix @ [13.5, 13.5]
    warped = cv2.warpAffine(
        image.astype(np.float32) / 255,
        np.column_stack([matrix, shift]),
        (side, side),
        flags=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_LINEAR,
    )
    warped /= warped.max()
    # Enlarging blurs the edges of the strokes: steepen them by about as much.
    ink = np.clip((warped - HARD_INK) * max(1.0, float(scale) / 1.5) + HARD_INK, 0, 1)
    rows, columns = np.nonzero(ink >= SOFT_INK)
    return ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def scramble(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Ink of the same kind that is no digit: the quarters change places, and each is turned.

    Args:
        image: ``(28, 28)`` uint8.
    """
    quarters = [image[:14, :14], image[:14, 14:], image[14:, 14:], image[14:, :14]]
    by = int(rng.integers(1, 4))  # each moves by as many places: none stays
    turned = [np.rot90(quarters[(i + by) % 4], int(rng.integers(1, 4))) for i in range(4)]
    return np.block([[turned[0], turned[1]], [turned[3], turned[2]]])


def _overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Intersection of two XYXY boxes over the area of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(width, 0) * max(height, 0) / smaller


def _draw_position(rng: np.random.Generator, length: int, size: int) -> int:
    """Where an object begins; up to 15 % of its side may lie outside."""
    outside = int(0.15 * length)
    return int(rng.integers(-outside, max(size - length + outside, -outside) + 1))


def _covered(photograph: np.ndarray, ink: np.ndarray, x: int, y: int) -> np.ndarray:
    """``(3,)``: mean colour of the photograph where the ink's box comes to lie."""
    return photograph[max(y, 0) : y + ink.shape[0], max(x, 0) : x + ink.shape[1]].mean(axis=(0, 1))


def _draw_colour(rng: np.random.Generator, covered: np.ndarray) -> np.ndarray:
    """``(3,)``: darker or lighter than what is covered, where there is room, and a little tinted."""
    contrast = rng.uniform(*CONTRAST)
    grey = covered.mean()
    lighter = grey < contrast or (grey + contrast <= 255 and rng.random() < 0.5)
    tint = rng.uniform(-TINT, TINT, 3)
    return np.clip(covered + (contrast if lighter else -contrast) + tint, 0, 255).astype(np.float32)
