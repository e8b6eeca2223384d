"""Operations that move pixels: affine transforms of the whole image, and the final resize, crop and pad.

Coordinates are detectron2's: continuous, pixel i covers [i, i + 1], so an image is [0, W] x [0, H].
Boxes are (N, 4) XYXY in pixels. Every transform here moves boxes, polygons, masks, semantic
segmentation and points alike, and never changes the number or the order of boxes: a box that is lost
comes back with zero width and height, which detectron2's ``filter_empty_instances`` drops.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from fvcore.transforms.transform import Transform, TransformList

from selftrain_d2.data.augmentation.pixel import FILL_VALUE
from selftrain_d2.errors import InputError

_CV2_TYPES = (np.uint8, np.uint16, np.int16, np.float32, np.float64)


class CanvasTransform(Transform):
    """A transform whose result is visible on a canvas of its own: what leaves the canvas is gone.

    Attributes:
        height, width: size of the canvas in pixels.
        min_area_fraction: a box that keeps less than this share (0 to 1) of its area is lost.
        ignore_label: the fill of a semantic segmentation.
    """

    height: int
    width: int
    min_area_fraction: float
    ignore_label: int

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        """
        Args:
            box: (N, 4) XYXY in pixels.

        Returns:
            (N, 4): the hulls of the moved corners, clipped to the canvas; zero width and height where
            too little is left.
        """
        return self._apply_box(box, self.min_area_fraction)

    def apply_region(self, box: np.ndarray) -> np.ndarray:
        """As ``apply_box``, for boxes of which anything that is left counts."""
        return self._apply_box(box, 0.0)

    def _apply_box(self, box: np.ndarray, min_area_fraction: float) -> np.ndarray:
        hulls = super().apply_box(np.array(box, dtype=np.float64).reshape(-1, 4))
        return clip_boxes(hulls, self.height, self.width, min_area_fraction)

    def apply_polygons(self, polygons: list) -> list:
        """
        Args:
            polygons: arrays (P, 2) of points in pixels.

        Returns:
            The moved polygons, clipped to the canvas; those wholly outside are left out.
        """
        moved = [self.apply_coords(np.array(p, dtype=np.float64).reshape(-1, 2)) for p in polygons]
        return clip_polygons(moved, 0, 0, self.width, self.height)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """
        Args:
            segmentation: (H, W). Boolean: an instance mask. Integer: a semantic segmentation.

        Returns:
            The moved array, same type; False or the ignore label where nothing was.
        """
        fill = (0 if segmentation.dtype == bool else self.ignore_label,) * 4
        # OpenCV knows neither bool nor wide integers; float64 holds the latter exactly.
        if segmentation.dtype == bool:
            array = segmentation.view(np.uint8)
        elif segmentation.dtype in _CV2_TYPES:
            array = segmentation
        else:
            array = segmentation.astype(np.float64)
        return self._move(array, cv2.INTER_NEAREST, fill).astype(segmentation.dtype, copy=False)

    def apply_rotated_box(self, box: np.ndarray) -> np.ndarray:
        raise InputError(
            f"{type(self).__name__} cannot move rotated boxes; use axis-aligned boxes (XYXY or XYWH), or "
            "detectron2's own augmentations."
        )

    def contains(self, coords: np.ndarray) -> np.ndarray:
        """Which of the moved points (N, 2) lie on the canvas: (N,) bool."""
        return ((coords >= 0) & (coords <= (self.width, self.height))).all(axis=1)

    def _move(self, array: np.ndarray, interpolation: int, fill: tuple[float, ...]) -> np.ndarray:
        """Move an (H, W) or (H, W, C) array of a type OpenCV knows; ``fill`` has a value a channel."""
        raise NotImplementedError


class AffineTransform(CanvasTransform):
    """Rotation, shear or translation onto a canvas of the image's own size, filled with grey.

    Pixels are those nearest, as in [TF]: the image is resized right after.
    """

    def __init__(
        self,
        matrix: np.ndarray,
        height: int,
        width: int,
        *,
        min_area_fraction: float = 0.1,
        ignore_label: int = 255,
    ):
        """
        Args:
            matrix: (2, 3), maps a point's coordinates to its new ones.
            height, width: size of the image in pixels.
            min_area_fraction: a box that keeps less than this share of its area is lost.
            ignore_label: the fill of a semantic segmentation.
        """
        super().__init__()
        self.matrix = np.asarray(matrix, dtype=np.float64)
        self.height, self.width = height, width
        self.min_area_fraction = min_area_fraction
        self.ignore_label = ignore_label

    @classmethod
    def rotation(cls, degrees: float, height: int, width: int, **options) -> AffineTransform:
        """Rotate about the centre of the image."""
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
        return cls(matrix, height, width, **options)

    @classmethod
    def shear_x(cls, factor: float, height: int, width: int, **options) -> AffineTransform:
        """Shift each row by ``factor`` times its distance from the top edge."""
        return cls(np.array([[1, factor, 0], [0, 1, 0]]), height, width, **options)

    @classmethod
    def shear_y(cls, factor: float, height: int, width: int, **options) -> AffineTransform:
        """Shift each column by ``factor`` times its distance from the left edge."""
        return cls(np.array([[1, 0, 0], [factor, 1, 0]]), height, width, **options)

    @classmethod
    def translation_x(cls, pixels: int, height: int, width: int, **options) -> AffineTransform:
        """Shift right by ``pixels``, or left where negative."""
        return cls(np.array([[1, 0, pixels], [0, 1, 0]]), height, width, **options)

    @classmethod
    def translation_y(cls, pixels: int, height: int, width: int, **options) -> AffineTransform:
        """Shift down by ``pixels``, or up where negative."""
        return cls(np.array([[1, 0, 0], [0, 1, pixels]]), height, width, **options)

    @classmethod
    def flip_x(cls, _: None, height: int, width: int, **options) -> AffineTransform:
        """Mirror left and right."""
        return cls(np.array([[-1, 0, width], [0, 1, 0]]), height, width, **options)

    @property
    def mirrors(self) -> bool:
        """Whether left and right are exchanged."""
        return bool(np.linalg.det(self.matrix[:, :2]) < 0)

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """
        Args:
            image: (H, W) or (H, W, C).

        Returns:
            The moved image, same shape and type, grey where nothing was.
        """
        return self._move(image, cv2.INTER_NEAREST, (FILL_VALUE,) * 4)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Map points (N, 2), also ones outside the image."""
        return np.asarray(coords) @ self.matrix[:, :2].T + self.matrix[:, 2]

    def inverse(self) -> AffineTransform:
        options = {"min_area_fraction": self.min_area_fraction, "ignore_label": self.ignore_label}
        return AffineTransform(cv2.invertAffineTransform(self.matrix), self.height, self.width, **options)

    def _move(self, array, interpolation, fill):
        # OpenCV's coordinates are pixel indices: the centre of pixel i is i, ours is i + 0.5.
        matrix = self.matrix.copy()
        matrix[:, 2] += matrix[:, :2].sum(axis=1) * 0.5 - 0.5
        moved = cv2.warpAffine(
            array, matrix, (self.width, self.height), flags=interpolation, borderValue=fill
        )
        return moved.reshape(array.shape)


class ResizeCropPadTransform(CanvasTransform):
    """Resize by one factor an axis, cut a region out, pad right and bottom: the last step of S1 to S4.

    Only the region's source pixels are read, so the cost is the output's, not the resized image's. The
    canvas is the region without the padding: boxes end where the image ends.
    """

    def __init__(
        self,
        scale: tuple[float, float],
        origin: tuple[int, int],
        content: tuple[int, int],
        output: tuple[int, int],
        pad_value: tuple[float, ...] = (FILL_VALUE,),
        *,
        min_area_fraction: float = 0.1,
        ignore_label: int = 255,
    ):
        """
        Args:
            scale: (vertical, horizontal) factors.
            origin: (row, column) of the first source pixel of the region.
            content: (height, width) of the resized region in pixels.
            output: (height, width) of the result, at least the content's.
            pad_value: one value a channel (or one for all), the padding of the image.
            min_area_fraction: a box of which the region keeps less than this share is lost.
            ignore_label: the padding of a semantic segmentation.
        """
        super().__init__()
        self.scale = scale
        self.origin = origin
        self.height, self.width = content
        self.output = output
        self.pad_value = pad_value
        self.min_area_fraction = min_area_fraction
        self.ignore_label = ignore_label

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """
        Args:
            image: (H, W) or (H, W, C).

        Returns:
            (output height, output width) or that with C, same type, by bilinear interpolation.
        """
        pad_value = self.pad_value * 4 if len(self.pad_value) == 1 else self.pad_value
        return self._move(image, cv2.INTER_LINEAR, pad_value)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Map points (N, 2), also ones outside the image."""
        return (np.asarray(coords) - self.origin[::-1]) * self.scale[::-1]

    def _move(self, array, interpolation, fill):
        (y, x), (scale_y, scale_x) = self.origin, self.scale
        # Source pixels of the region. Rounding up may give an output pixel more, cut off below.
        rows = math.ceil(self.height / scale_y - 1e-6)
        columns = math.ceil(self.width / scale_x - 1e-6)
        region = array[y : y + rows, x : x + columns]
        if region.strides[1] < 0:
            # A view that detectron2's flip made. OpenCV would copy it pixel by pixel, and flips fast.
            region = cv2.flip(region[:, ::-1], 1)
        if interpolation == cv2.INTER_NEAREST:
            # OpenCV's nearest resizing is off by up to half a pixel; its warp is not.
            matrix = np.array([[scale_x, 0, scale_x / 2 - 0.5], [0, scale_y, scale_y / 2 - 0.5]])
            resized = cv2.warpAffine(
                region,
                matrix,
                (self.width, self.height),
                flags=interpolation,
                borderMode=cv2.BORDER_REPLICATE,
            )
        else:
            resized = cv2.resize(region, None, fx=scale_x, fy=scale_y, interpolation=interpolation)
        resized = resized[: self.height, : self.width]
        below, right = self.output[0] - self.height, self.output[1] - self.width
        if below or right:
            resized = cv2.copyMakeBorder(resized, 0, below, 0, right, cv2.BORDER_CONSTANT, value=fill)
        return resized.reshape(*self.output, *array.shape[2:])


def move_regions(transforms: TransformList, boxes: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) XYXY in pixels after all transforms, where an object would be lost too: what is left of them.

    Of a region that is ignored, a small part is still no background. Zero width and height where nothing is left.
    """
    for transform in transforms.transforms:
        move = transform.apply_region if isinstance(transform, CanvasTransform) else transform.apply_box
        boxes = move(boxes)
    return boxes


def clip_boxes(boxes: np.ndarray, height: int, width: int, min_area_fraction: float) -> np.ndarray:
    """Clip boxes to a canvas and take the size of those that lose too much.

    Args:
        boxes: (N, 4) XYXY in pixels.
        height, width: size of the canvas in pixels.
        min_area_fraction: share of the area, 0 to 1, that must remain.

    Returns:
        (N, 4): clipped boxes; a lost one has zero width and height.
    """
    clipped = boxes.clip(0, (width, height, width, height))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    remaining = (clipped[:, 2] - clipped[:, 0]) * (clipped[:, 3] - clipped[:, 1])
    lost = ~((remaining > 0) & (remaining >= min_area_fraction * area))
    clipped[lost, 2:] = clipped[lost, :2]
    return clipped


def clip_polygons(polygons: list[np.ndarray], x0: float, y0: float, x1: float, y1: float) -> list[np.ndarray]:
    """Intersect polygons with a rectangle (Sutherland and Hodgman, 1974).

    Args:
        polygons: arrays (P, 2) of points.
        x0, y0, x1, y1: the rectangle.

    Returns:
        The intersections, without the empty ones. A concave polygon that falls apart stays one polygon,
        whose parts are joined along the rectangle's edge: the area is the same.
    """
    # Each side as (axis, bound, sign): points with sign * (value - bound) >= 0 are inside.
    sides = ((0, x0, 1), (1, y0, 1), (0, x1, -1), (1, y1, -1))
    clipped = []
    for polygon in polygons:
        for axis, bound, sign in sides:
            if len(polygon) == 0:
                break
            distance = sign * (polygon[:, axis] - bound)
            if (distance >= 0).all():
                continue
            polygon = _clip_to_side(polygon, distance)
        if len(polygon) >= 3:
            clipped.append(polygon)
    return clipped


def _clip_to_side(polygon: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Keep the part of a polygon (P, 2) whose distance (P,) from a line is not negative."""
    following, distance_following = np.roll(polygon, -1, axis=0), np.roll(distance, -1)
    inside = distance >= 0
    crosses = inside != (distance_following >= 0)
    # Each edge gives its first point if that is inside, then the crossing if there is one.
    difference = np.where(crosses, distance - distance_following, 1)
    crossing = polygon + (following - polygon) * (distance / difference)[:, None]
    points = np.stack([polygon, crossing], axis=1).reshape(-1, 2)
    return points[np.stack([inside, crosses], axis=1).ravel()]
