"""Score thresholds from people's counts, for pseudo boxes that come step by step.

The rules are those of :mod:`~selftrain_d2.data.pseudo_labels.counts`, on the boxes of about the last hundred steps,
with scores in steps of 0.001. Letters in shapes: C classes, S bins of scores, B boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from selftrain_d2.data.pseudo_labels.counts import HumanCounts
from selftrain_d2.data.pseudo_labels.selection import ENOUGH_BOXES, matching_count_threshold

BINS = 1000
#: What a step's boxes weigh one step later.
DECAY = 0.99


class RunningCounts:
    """How many pseudo boxes an image reach each score, and the thresholds that leave as many as people drew.

    Args:
        class_names: by contiguous id.
        human: classes that it does not name have no box.
        ignore_from: the lowest score that is ignored; None: none is.
        ignore_ratio: boxes are ignored down to so many times people's count, at least 1.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        human: HumanCounts,
        ignore_from: float | None = None,
        ignore_ratio: float = 2.0,
    ):
        self.human_boxes = np.array([human.boxes.get(name, 0) for name in class_names])
        self.human_images = max(human.images, 1)
        self.ignore_from = ignore_from
        self.ignore_ratio = ignore_ratio
        self.boxes = np.zeros((len(class_names), BINS))
        self.images = 0.0

    def start_step(self) -> None:
        """Let what was counted before weigh less."""
        self.boxes *= DECAY
        self.images *= DECAY

    def add(self, scores: np.ndarray, category_ids: np.ndarray, images: int) -> None:
        """Count boxes of some images.

        Args:
            scores: (B,) in [0, 1]. category_ids: (B,).
            images: those without boxes included.
        """
        bins = np.clip((scores * BINS).astype(int), 0, BINS - 1)
        np.add.at(self.boxes, (category_ids, bins), 1)
        self.images += images

    def thresholds(self) -> tuple[np.ndarray, np.ndarray | None]:
        """(C,) float32 of boxes to train on, and of those to ignore, or None."""
        everyone = self._matching(self.boxes.sum(axis=0), self.human_boxes.sum())
        rows = [
            self._matching(own, number) if number >= ENOUGH_BOXES and own.any() else everyone
            for own, number in zip(self.boxes, self.human_boxes)
        ]
        learned, ignored = np.array(rows, np.float32).T
        return learned, None if self.ignore_from is None else ignored

    def _matching(self, boxes: np.ndarray, number: int) -> tuple[float, float]:
        reach = boxes[::-1].cumsum()[::-1]
        wanted = number / self.human_images * self.images
        threshold = matching_count_threshold(reach, wanted) / BINS
        lower = matching_count_threshold(reach, self.ignore_ratio * wanted) / BINS
        return threshold, min(max(lower, self.ignore_from or 0.0), threshold)

    def state_dict(self) -> dict[str, Any]:
        return {"boxes": torch.from_numpy(self.boxes.copy()), "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.boxes[:] = state["boxes"].numpy()
        self.images = state["images"]
