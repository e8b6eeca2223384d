"""Watches what a student is trained on: pseudo labels that vanish or explode, and the speed of training."""

from __future__ import annotations

import logging
import time

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from selftrain_d2.engine.loss_normalizer import model_of
from selftrain_d2.modeling.meta_arch.by_source import LABEL_SOURCES

logger = logging.getLogger(__name__)


class LabelMonitor(HookBase):
    """Logs boxes per image, share of images without boxes, and images per second; warns with numbers.

    Every ``period`` steps, over all processes, ``human_boxes_per_image``, ``human_empty_share``, the same of
    pseudo labels, and ``images_per_second`` (time of the steps alone, without evaluation) go to the log, as the
    augmented images have them. A warning comes when pseudo labels begin to vanish or to explode, not again while
    they stay so.

    Args:
        min_nonempty_share: warns while a smaller share of the pseudo-labeled images has a box, in [0, 1].
        max_boxes_ratio: warns while pseudo-labeled images have more than so many times the boxes of
            human-labeled ones, per image.
        period: steps.
    """

    def __init__(self, min_nonempty_share: float = 0.05, max_boxes_ratio: float = 4.0, period: int = 20):
        self.min_nonempty_share = min_nonempty_share
        self.max_boxes_ratio = max_boxes_ratio
        self.period = period
        # (images, boxes, images without boxes) of each source
        self._counts = torch.zeros(len(LABEL_SOURCES), 3)
        self._seconds = 0.0
        self._warned: set[str] = set()

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        self._seconds += time.perf_counter() - self._start
        counts = model_of(self.trainer).label_counts
        for row, source in zip(self._counts, LABEL_SOURCES):
            row += torch.tensor([counts[source].images, counts[source].boxes, counts[source].empty])
        if (self.trainer.iter + 1) % self.period == 0:
            self._report()
            self._counts.zero_()
            self._seconds = 0.0

    def _report(self) -> None:
        counts = self._counts
        if comm.get_world_size() > 1:
            counts = counts.to(next(self.trainer.model.parameters()).device)
            torch.distributed.all_reduce(counts)
        scalars, boxes_per_image = {}, {}
        for source, (images, boxes, empty) in zip(LABEL_SOURCES, counts.tolist()):
            if images:
                boxes_per_image[source] = scalars[f"{source}_boxes_per_image"] = boxes / images
                scalars[f"{source}_empty_share"] = empty / images
        if scalars:
            scalars["images_per_second"] = counts[:, 0].sum().item() / max(self._seconds, 1e-9)
        self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        if len(boxes_per_image) < 2:
            return
        share = 1 - scalars["pseudo_empty_share"]
        self._warn(
            share < self.min_nonempty_share,
            "vanish",
            f"Pseudo labels vanish: {share:.1%} of the pseudo-labeled images of the last {self.period} steps "
            f"have a box, under SELFTRAIN.MIN_NONEMPTY_SHARE {self.min_nonempty_share:.1%}. The student learns "
            "that these images show nothing. Lower SELFTRAIN.SCORE_THRESH, or train the teacher longer.",
        )
        human, pseudo = boxes_per_image["human"], boxes_per_image["pseudo"]
        self._warn(
            pseudo > self.max_boxes_ratio * human,
            "explode",
            f"Pseudo labels explode: {pseudo:.1f} boxes per pseudo-labeled image in the last {self.period} steps "
            f"against {human:.1f} per human-labeled one, over SELFTRAIN.MAX_BOXES_RATIO {self.max_boxes_ratio:g}. "
            "Raise SELFTRAIN.SCORE_THRESH, and look at the pseudo labels with selftrain-d2 inspect.",
        )

    def _warn(self, wrong: bool, kind: str, message: str) -> None:
        if not wrong:
            self._warned.discard(kind)
        elif kind not in self._warned:
            self._warned.add(kind)
            if comm.is_main_process():
                logger.warning(f"Step {self.trainer.iter}: {message}")
