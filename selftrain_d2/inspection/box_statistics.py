"""What a set of labels holds, counted in one pass and in memory that does not grow with the boxes.

Letters in shapes: C classes, T thresholds, N boxes of one image.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

# Bins of a box's size sqrt(area): an eighth of an octave each, from 1 to 8192 pixels.
SIZE_EDGES = 2.0 ** np.arange(0, 13.01, 0.125)
# COCO's small, medium and large: area under 32^2, under 96^2, and the rest.
COCO_SIZES = (32.0, 96.0)
# A box of this share of its image's area is as good as the whole image.
WHOLE_IMAGE = 0.9

#: Which images are picked to be looked at.
SAMPLES = ("random", "most_confident", "least_confident", "most_crowded", "empty")


def threshold_grid(floor: float, score_thresh: float) -> np.ndarray:
    """(T,) float32, rising: the hundredths from the floor to 1, the floor and the threshold in use.

    float32, as scores are stored: the threshold 0.7 must keep a score that was written as 0.7.
    """
    hundredths = np.arange(101) / 100
    grid = np.concatenate([hundredths[hundredths >= floor], [floor, score_thresh]])
    return np.unique(grid.astype(np.float32))


def count_at_thresholds(
    scores: np.ndarray, category_ids: np.ndarray, thresholds: np.ndarray, classes: int
) -> np.ndarray:
    """How many boxes of each class reach each threshold.

    Args:
        scores: (N,), none under the first threshold. category_ids: (N,) in [0, classes).
        thresholds: (T,) float32, rising.

    Returns:
        (C, T) int64.
    """
    counts = np.zeros((classes, len(thresholds)), np.int64)
    np.add.at(counts, (category_ids, _highest_reached(scores, thresholds)), 1)
    return _or_more(counts)


def _highest_reached(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(N,) position of the highest threshold that each score reaches."""
    reached = np.searchsorted(thresholds, np.asarray(scores, np.float32), side="right") - 1
    return np.maximum(reached, 0)


def _or_more(counts: np.ndarray) -> np.ndarray:
    """From counts of boxes by their highest threshold: counts of boxes that reach it."""
    return counts[..., ::-1].cumsum(axis=-1)[..., ::-1]


@dataclass
class LabelStatistics:
    """Counts over a set of labels. Where nothing else is said, of boxes that reach ``score_thresh``."""

    classes: int
    thresholds: np.ndarray  # (T,) float32, rising
    score_thresh: float
    images: int = 0
    whole_image: int = 0  # boxes of nearly the whole image
    boxes_per_image: Counter = field(default_factory=Counter)  # number of boxes -> images
    most_boxes: int = 0  # of one image, from the lowest threshold up
    capped: np.ndarray = field(init=False)  # (T,) images with `most_boxes` boxes of at least this score
    boxes_at: np.ndarray = field(init=False)  # (C, T) boxes of at least this score
    sizes: np.ndarray = field(init=False)  # (len(SIZE_EDGES) - 1,)
    coco_sizes: np.ndarray = field(init=False)  # (3,) small, medium, large

    def __post_init__(self) -> None:
        self.capped = np.zeros(len(self.thresholds), np.int64)
        self.boxes_at = np.zeros((self.classes, len(self.thresholds)), np.int64)
        self.sizes = np.zeros(len(SIZE_EDGES) - 1, np.int64)
        self.coco_sizes = np.zeros(3, np.int64)

    @property
    def boxes_by_class(self) -> np.ndarray:
        """(C,) boxes."""
        return self.boxes_at[:, self.position(self.score_thresh)]

    @property
    def boxes(self) -> int:
        return int(self.boxes_by_class.sum())

    @property
    def empty(self) -> int:
        """Images without a box."""
        return self.boxes_per_image[0]

    def per_image(self, boxes: float) -> float:
        """Boxes per image, empty images included; 0 where there is no image."""
        return boxes / self.images if self.images else 0.0

    def position(self, threshold: float) -> int:
        """Where a threshold of the grid is in it."""
        return int(np.searchsorted(self.thresholds, np.float32(threshold)))


def count_labels(
    labels: Iterable[Mapping[str, Any]],
    classes: int,
    thresholds: np.ndarray,
    score_thresh: float,
    samples: dict[str, Largest] | None = None,
) -> LabelStatistics:
    """Count detectron2 dataset dicts, each looked at once.

    Args:
        labels: with boxes down to the first threshold. A box without a score (a human's) counts as 1;
            ``iscrowd`` regions are no boxes.
        thresholds: (T,) from ``threshold_grid``. score_thresh: one of them.
        samples: from ``empty_samples``: filled with the images to show.
    """
    statistics = LabelStatistics(classes, thresholds, score_thresh)
    counts = np.zeros((classes, len(thresholds)), np.int64)
    generator = random.Random(0)
    for position, record in enumerate(labels):
        scores, category_ids, boxes = _arrays(record["annotations"])
        at = _highest_reached(scores, thresholds)
        np.add.at(counts, (category_ids, at), 1)
        _count_cap(statistics, at)
        kept = scores >= np.float32(score_thresh)
        statistics.images += 1
        statistics.boxes_per_image[int(kept.sum())] += 1
        _count_sizes(statistics, boxes[kept], record["height"] * record["width"])
        if samples is not None:
            _sample(samples, position, scores[kept], generator)
    statistics.boxes_at = _or_more(counts)
    statistics.capped = _or_more(statistics.capped)
    return statistics


def _arrays(annotations: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (N,) float32, category ids (N,) and boxes (N, 4) XYXY of one image."""
    real = [a for a in annotations if not a.get("iscrowd")]
    boxes = [
        a["bbox"]
        if a["bbox_mode"] == BoxMode.XYXY_ABS
        else BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in real
    ]
    return (
        np.array([a.get("score", 1.0) for a in real], np.float32),
        np.array([a["category_id"] for a in real], int),
        np.array(boxes, float).reshape(-1, 4),
    )


def _count_cap(statistics: LabelStatistics, at: np.ndarray) -> None:
    """Count images that hold as many boxes as any, by their lowest score: there the detector may have cut."""
    if len(at) > statistics.most_boxes:
        statistics.most_boxes = len(at)
        statistics.capped[:] = 0
    if len(at) and len(at) == statistics.most_boxes:
        statistics.capped[at.min()] += 1


def _count_sizes(statistics: LabelStatistics, boxes: np.ndarray, image_area: int) -> None:
    areas = np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)
    sides = np.sqrt(areas)
    clipped = np.clip(sides, SIZE_EDGES[0], SIZE_EDGES[-1])
    statistics.sizes += np.histogram(clipped, SIZE_EDGES)[0]
    statistics.coco_sizes += np.bincount(np.searchsorted(COCO_SIZES, sides, side="right"), minlength=3)
    statistics.whole_image += int((areas >= WHOLE_IMAGE * image_area).sum())


class Largest:
    """The positions of the ``number`` largest values of a stream; of equal ones the first."""

    def __init__(self, number: int):
        self.number = number
        self._heap: list[tuple[float, int]] = []

    def add(self, value: float, position: int) -> None:
        entry = (value, -position)
        if len(self._heap) < self.number:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def positions(self) -> list[int]:
        """From the largest down."""
        return [-position for _, position in sorted(self._heap, reverse=True)]


def empty_samples(number: int) -> dict[str, Largest]:
    """For ``count_labels``: at most ``number`` images for each of ``SAMPLES``."""
    return {name: Largest(number) for name in SAMPLES}


def _sample(samples: dict[str, Largest], position: int, scores: np.ndarray, generator: random.Random) -> None:
    """Offer one image, with the scores of its boxes that reach the threshold."""
    # The largest of random values are a uniform sample without replacement. Always one draw an image, so
    # that the choice depends on the seed and the position alone.
    draw = generator.random()
    samples["random"].add(draw, position)
    if not len(scores):
        samples["empty"].add(draw, position)
        return
    confidence = float(scores.mean(dtype=float))
    samples["most_confident"].add(confidence, position)
    samples["least_confident"].add(-confidence, position)
    samples["most_crowded"].add(len(scores), position)
