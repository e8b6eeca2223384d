"""Watches what a student is trained on: pseudo labels that vanish or explode, and the speed of training."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from selftrain_d2.engine.hooks.loss_normalizer import model_of
from selftrain_d2.modeling.meta_arch.by_source import LABEL_KINDS, LABEL_SOURCES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KindOfLabels:
    """How labels of one kind are logged, and what is said when they go wrong.

    Attributes:
        amount: scalar, after the name of the source: labels of an image on average.
        empty: scalar: share of the images without any; None where that is not logged.
        vanish: warning when pseudo labels vanish; None where that is no fault.
        explode: warning when there are too many; None where a multiple of the human labels is no fault.
    """

    amount: str
    empty: str | None = None
    vanish: str | None = None
    explode: str | None = None


_LIMIT = "under SELFTRAIN.MIN_NONEMPTY_SHARE {limit:.1%}"
_ADVICE = "Lower SELFTRAIN.SCORE_THRESH, or train the teacher longer."

#: A line for each name of LABEL_KINDS.
KINDS = {
    "boxes": KindOfLabels(
        amount="boxes_per_image",
        empty="empty_share",
        vanish="Pseudo labels vanish: {share:.1%} of the pseudo-labeled images of the last {period} steps have a "
        f"box, {_LIMIT}. The student learns that these images show nothing. {_ADVICE}",
        explode="Pseudo labels explode: {pseudo:.1f} boxes per pseudo-labeled image in the last {period} steps "
        "against {human:.1f} per human-labeled one, over SELFTRAIN.MAX_BOXES_RATIO {limit:g}. "
        "Raise SELFTRAIN.SCORE_THRESH, and look at the pseudo labels with selftrain-d2 inspect.",
    ),
    # People may label few pixels, and a teacher all: no explosion.
    "pixels": KindOfLabels(
        amount="valid_pixel_share",
        empty="all_ignored_share",
        vanish="Pseudo masks vanish: {share:.1%} of the pixels of the pseudo-labeled images of the last {period} "
        f"steps are not ignored, {_LIMIT}, and of {{empty:.1%}} of the images none. The student learns next to "
        f"nothing from them. {_ADVICE}",
    ),
    "ignored_boxes": KindOfLabels(amount="ignored_boxes_per_image"),
}


class LabelMonitor(HookBase):
    """Logs how much of which labels images have, and images per second; warns with numbers.

    Every ``period`` steps, over all processes, these go to the log, as the augmented images have them, for human
    and pseudo labels: ``human_boxes_per_image`` and ``human_empty_share`` (images without boxes) of boxes;
    ``human_valid_pixel_share`` (pixels that are not ignored; those beside a scaled-down image are) and
    ``human_all_ignored_share`` (images without such a pixel) of masks; ``human_ignored_boxes_per_image`` where boxes
    are ignored. And ``images_per_second``, of the steps alone, without evaluation. A warning comes when pseudo labels
    begin to vanish or to explode, not again while they stay so.

    Args:
        min_nonempty_share: warns while a smaller share of the pseudo-labeled images has a box, or of their pixels
            is not ignored, in [0, 1].
        max_boxes_ratio: warns while pseudo-labeled images have more than so many times the boxes of
            human-labeled ones, per image.
        period: steps.
    """

    def __init__(self, min_nonempty_share: float = 0.05, max_boxes_ratio: float = 4.0, period: int = 20):
        self.min_nonempty_share = min_nonempty_share
        self.max_boxes_ratio = max_boxes_ratio
        self.period = period
        # (images, labels, images without labels) of each kind and source
        self._counts = torch.zeros(len(LABEL_KINDS), len(LABEL_SOURCES), 3)
        self._seconds = 0.0
        self._warned: set[tuple[str, str]] = set()

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        self._seconds += time.perf_counter() - self._start
        counts = model_of(self.trainer).label_counts
        self._counts += torch.tensor(
            [
                [(c.images, c.labels, c.empty) for c in (counts[kind][s] for s in LABEL_SOURCES)]
                for kind in LABEL_KINDS
            ]
        )
        if (self.trainer.iter + 1) % self.period == 0:
            self._report()
            self._counts.zero_()
            self._seconds = 0.0

    def _report(self) -> None:
        counts = self._counts
        if comm.get_world_size() > 1:
            counts = counts.to(next(self.trainer.model.parameters()).device)
            torch.distributed.all_reduce(counts)
        scalars = {}
        for kind, by_source in zip(LABEL_KINDS, counts.tolist()):
            amounts, empty_shares = (
                {source: row[i] / row[0] for source, row in zip(LABEL_SOURCES, by_source) if row[0]}
                for i in (1, 2)
            )
            for name, values in ((KINDS[kind].amount, amounts), (KINDS[kind].empty, empty_shares)):
                if name is not None:
                    scalars.update({f"{source}_{name}": value for source, value in values.items()})
            if len(amounts) == len(LABEL_SOURCES):
                self._judge(kind, amounts, empty_shares["pseudo"])
        if scalars:
            # An image may have labels of several kinds.
            images = counts[:, :, 0].amax(0).sum().item()
            scalars["images_per_second"] = images / max(self._seconds, 1e-9)
        self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)

    def _judge(self, kind: str, amounts: dict[str, float], empty: float) -> None:
        # Of boxes this is the share of images that have one, of pixels the share that is not ignored.
        share = min(1 - empty, amounts["pseudo"])
        limit = self.min_nonempty_share
        if KINDS[kind].vanish is not None:
            self._warn(
                share < limit,
                (kind, "vanish"),
                KINDS[kind].vanish.format(share=share, empty=empty, limit=limit, period=self.period),
            )
        if KINDS[kind].explode is not None:
            limit = self.max_boxes_ratio
            self._warn(
                amounts["pseudo"] > limit * amounts["human"],
                (kind, "explode"),
                KINDS[kind].explode.format(**amounts, limit=limit, period=self.period),
            )

    def _warn(self, wrong: bool, fault: tuple[str, str], message: str) -> None:
        if not wrong:
            self._warned.discard(fault)
        elif fault not in self._warned:
            self._warned.add(fault)
            if comm.is_main_process():
                logger.warning(f"Step {self.trainer.iter}: {message}")
