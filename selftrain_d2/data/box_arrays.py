"""The boxes of dataset dicts as arrays: what is small in memory and quick to count.

Letters in shapes: N boxes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.structures import BoxMode


@dataclass(frozen=True)
class BoxArrays:
    """Boxes to learn from, 28 bytes each: without crowd regions, boxes without area, and rotated ones.

    Attributes:
        boxes: (N, 4) float32, XYXY in pixels, clipped to their images.
        image_sizes: (N, 2) int32, height and width of the image that each box is in.
        category_ids: (N,) int32, contiguous.
    """

    boxes: np.ndarray
    image_sizes: np.ndarray
    category_ids: np.ndarray

    @classmethod
    def of(cls, dicts: Iterable[Mapping[str, Any]]) -> BoxArrays:
        """Those of detectron2 dataset dicts; images whose dicts have no height and width are left out."""
        boxes, numbers = array("f"), array("i")
        for sample in dicts:
            if "height" not in sample or "width" not in sample:
                continue
            size = (int(sample["height"]), int(sample["width"]))
            for annotation in sample.get("annotations", ()):
                if not annotation.get("iscrowd", 0) and len(annotation["bbox"]) == 4:
                    boxes.extend(annotation["bbox"])
                    numbers.extend((*size, annotation["category_id"], annotation["bbox_mode"]))
        corners = np.frombuffer(boxes, dtype=np.float32).reshape(-1, 4).copy()
        columns = np.frombuffer(numbers, dtype=np.int32).reshape(-1, 4)
        for mode in np.unique(columns[:, 3]):
            same = columns[:, 3] == mode
            corners[same] = BoxMode.convert(corners[same], BoxMode(int(mode)), BoxMode.XYXY_ABS)
        sizes = columns[:, :2]
        np.clip(corners, 0, np.tile(sizes[:, ::-1], 2), out=corners)
        real = (corners[:, 2:] > corners[:, :2]).all(1)
        return cls(corners[real], sizes[real], columns[real, 2])

    def resized(self, image_size: int) -> np.ndarray:
        """(N, 4): the boxes in images whose longer side has this length, as the policies make them without jitter."""
        scale = image_size / self.image_sizes.max(1, keepdims=True, initial=1)
        factors = np.maximum(np.rint(self.image_sizes * scale), 1) / self.image_sizes
        return self.boxes * np.tile(factors[:, ::-1], 2).astype(np.float32)

    def sample(self, most: int) -> BoxArrays:
        """At most so many boxes of each class, drawn with the same seed each time."""
        order = np.random.default_rng(0).permutation(len(self.boxes))
        order = order[np.argsort(self.category_ids[order], kind="stable")]
        ids = self.category_ids[order]
        place = np.arange(len(ids)) - np.searchsorted(ids, ids)  # of each box in its class
        kept = np.sort(order[place < most])
        return BoxArrays(self.boxes[kept], self.image_sizes[kept], self.category_ids[kept])
