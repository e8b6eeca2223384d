"""Operations inside boxes (``*_Only_BBoxes``): each box's pixels change, the box stays where it is."""

from __future__ import annotations

import numpy as np
from fvcore.transforms.transform import Transform

from selftrain_d2.data.augmentation.geometric import CanvasTransform, clip_polygons

# Where points go whose pixels were pushed out of a box: outside any image, whatever follows.
LOST_POINT = -1e6


class BoxOnlyTransform(Transform):
    """Apply a transform of its own to the pixels of each of some boxes.

    The boxes' coordinates do not change [TF]. Masks, polygons, semantic segmentation and points follow
    the pixels they lie on, whichever object they belong to. Boxes that overlap are done one after another.
    """

    def __init__(self, regions: np.ndarray, transforms: list[Transform], indices: np.ndarray):
        """
        Args:
            regions: (M, 4) XYXY, whole pixels inside the image.
            transforms: M transforms made for images of the regions' sizes, which keep that size.
            indices: (M,) the regions' places among all boxes of the image.
        """
        super().__init__()
        self.regions = regions
        self.transforms = transforms
        self.indices = indices

    def mirrored_boxes(self, count: int) -> np.ndarray:
        """Which of the image's ``count`` boxes have left and right exchanged: (count,) bool."""
        mirrored = np.zeros(count, dtype=bool)
        mirrored[self.indices] = [getattr(t, "mirrors", False) for t in self.transforms]
        return mirrored

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """
        Args:
            image: (H, W) or (H, W, C).

        Returns:
            An array of the same shape and type.
        """
        return self._apply_inside(image, "apply_image")

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Move an instance mask (H, W) bool or a semantic segmentation (H, W) of integers."""
        return self._apply_inside(segmentation, "apply_segmentation")

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        return box

    def apply_rotated_box(self, box: np.ndarray) -> np.ndarray:
        return box

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Move points (N, 2) with their pixels; to ``LOST_POINT`` where these are gone."""
        coords = np.array(coords, dtype=np.float64)
        for region, transform in self._moving():
            corner = region[:2]
            inside = ((coords >= corner) & (coords < region[2:])).all(axis=1)
            moved = transform.apply_coords(coords[inside] - corner)
            kept = transform.contains(moved)[:, None]
            coords[inside] = np.where(kept, moved + corner, LOST_POINT)
        return coords

    def apply_polygons(self, polygons: list) -> list:
        """Move the parts of polygons (P, 2) inside the regions; the parts outside stay."""
        polygons = [np.array(p, dtype=np.float64).reshape(-1, 2) for p in polygons]
        for region, transform in self._moving():
            corner, (x0, y0, x1, y1) = region[:2], region
            inside = [p - corner for p in clip_polygons(polygons, x0, y0, x1, y1)]
            polygons = [
                *(p + corner for p in transform.apply_polygons(inside)),
                *clip_polygons(polygons, -np.inf, -np.inf, x0, np.inf),  # left of the region
                *clip_polygons(polygons, x1, -np.inf, np.inf, np.inf),  # right
                *clip_polygons(polygons, x0, -np.inf, x1, y0),  # above
                *clip_polygons(polygons, x0, y1, x1, np.inf),  # below
            ]
        return polygons

    def _moving(self):
        return [
            (region, transform)
            for region, transform in zip(self.regions, self.transforms)
            if isinstance(transform, CanvasTransform)
        ]

    def _apply_inside(self, array: np.ndarray, method: str) -> np.ndarray:
        result = array.copy()
        for (x0, y0, x1, y1), transform in zip(self.regions, self.transforms):
            result[y0:y1, x0:x1] = getattr(transform, method)(result[y0:y1, x0:x1])
        return result
