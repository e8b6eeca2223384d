"""A teacher at work in a training step: labels of a few plain images, as training takes them.

Letters in shapes: B boxes, C classes, an image of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from torch import nn

from selftrain_d2.data.pseudo_labels.masks import PixelLabels, least_percents
from selftrain_d2.data.pseudo_labels.running_counts import RunningCounts
from selftrain_d2.data.pseudo_labels.selection import (
    check_counts,
    resolve_thresholds,
    select_and_ignore,
    selection_from_config,
    thresholds_of_classes,
    trains_on_uncertain,
)
from selftrain_d2.data.pseudo_labels.shards import LOCALIZATION_SCORES, make_row
from selftrain_d2.data.training_sets import count_human_boxes
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.inference import Sample, Teacher, box_row, label_in_order
from selftrain_d2.labeling.segment import SegmentationTeacher, makes_masks
from selftrain_d2.labeling.views import views


class StepSelection:
    """Which of a teacher's boxes or pixels are trained on, by the keys SELFTRAIN.*; all but BOXES_PER_IMAGE.

    With SELFTRAIN.THRESHOLDS "counts" thresholds follow the boxes that were :meth:`seen`.

    Args:
        cfg: a student's; its DATASETS.TRAIN are registered if they are to be counted.
        class_names: by contiguous id.
        masks: whether the teacher labels pixels.

    Attributes:
        floor: the lowest score that can be used; None where only that of the model is known.

    Raises:
        InputError: a key does not go with labels that are made step by step, or with another one, or with masks.
    """

    def __init__(self, cfg: CfgNode, class_names: Sequence[str], *, masks: bool):
        keys = cfg.SELFTRAIN
        if keys.BOXES_PER_IMAGE:
            raise InputError(
                "SELFTRAIN.BOXES_PER_IMAGE chooses one threshold for all pseudo labels, which with SELFTRAIN.TEACHER "
                "moving_average are made step by step: set it to 0, or SELFTRAIN.THRESHOLDS to counts."
            )
        kind = "stuff_classes" if masks else "thing_classes"
        known = {kind: list(class_names), "score_floor": 0.0, "views": len(views(cfg))}
        self.top_k = keys.TOP_K or None
        self.localization_thresh = np.float32(keys.LOCALIZATION_THRESH)
        self.score_weighted = trains_on_uncertain(cfg)
        self.counts: RunningCounts | None = None
        self.ignored_from: np.ndarray | None = None
        if keys.THRESHOLDS == "counts":
            check_counts(cfg, known)
            ignore_from = keys.IGNORE_SCORE_THRESH or None
            human = count_human_boxes(cfg)
            self.counts = RunningCounts(class_names, human, ignore_from, keys.IGNORE_COUNT_RATIO)
            self.floor: float | None = None
            return
        selection = selection_from_config(cfg, class_names)
        self.thresholds = resolve_thresholds(known, **selection)
        if selection["ignore_score_thresh"] is not None:
            self.ignored_from = thresholds_of_classes(known, selection["ignore_score_thresh"])
        used = (
            self.thresholds if self.ignored_from is None else np.minimum(self.thresholds, self.ignored_from)
        )
        self.floor = float(used.min())

    def seen(self, boxes: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> None:
        """Take note of a step's boxes, where thresholds follow ``counts``: of each process :func:`boxes_to_count`."""
        self.counts.start_step()
        for of_process in boxes:
            self.counts.add(*of_process)
        self.update()

    def update(self) -> None:
        """Take the thresholds that follow from ``counts``."""
        self.thresholds, self.ignored_from = self.counts.thresholds()

    def annotations(self, rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Of each image, as ``load_pseudo_labels`` has them: those to ignore with ``iscrowd`` 1, last; with
        SELFTRAIN.SCORE_WEIGHTED or SOFT_LABELS the others with ``weight``."""
        scores, category_ids = _joined(rows)
        counts = np.array([len(row["scores"]) for row in rows])
        localized = None
        if self.localization_thresh:
            localized = _values(rows, LOCALIZATION_SCORES, np.float32) >= self.localization_thresh
        kept, ignored, weights = select_and_ignore(
            scores,
            category_ids,
            counts,
            self.thresholds,
            top_k=self.top_k,
            localized=localized,
            ignored_from=self.ignored_from,
            score_weighted=self.score_weighted,
        )
        if ignored is None:
            ignored = np.zeros_like(kept)
        starts = np.cumsum(counts) - counts

        def weight(box: int) -> dict[str, float]:
            return {} if weights is None else {"weight": float(weights[box])}

        return [
            [
                *(
                    {**_annotation(row, i, masks=True), **weight(start + i)}
                    for i in np.flatnonzero(kept[start:][:count])
                ),
                *(
                    {**_annotation(row, i, masks=False), "iscrowd": 1}
                    for i in np.flatnonzero(ignored[start:][:count])
                ),
            ]
            for row, start, count in zip(rows, starts, counts)
        ]

    def classes(self, labels: PixelLabels) -> np.ndarray:
        """(H, W) uint8; 255 where no class reaches its threshold."""
        return labels.at(least_percents(self.thresholds))


def boxes_to_count(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, int]:
    """Of rows of the store (see ``make_row``): scores (B,) and classes (B,) of all boxes, and the number of images."""
    return (*_joined(rows), len(rows))


def _joined(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and classes (B,) of all boxes."""
    return _values(rows, "scores", np.float32), _values(rows, "category_ids", np.int32)


def _values(rows: Sequence[dict[str, Any]], key: str, kind: type) -> np.ndarray:
    return np.concatenate([np.asarray(row[key], kind) for row in (make_row(""), *rows)])


def _annotation(row: dict[str, Any], box: int, *, masks: bool) -> dict[str, Any]:
    annotation = {
        "bbox": row["boxes"].reshape(-1, 4)[box].tolist(),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": int(row["category_ids"][box]),
        "score": float(row["scores"][box]),
    }
    if masks and row["masks"]:
        size = [row["height"], row["width"]]
        annotation["segmentation"] = {"size": size, "counts": row["masks"][box]}
    return annotation


class StepTeacher:
    """Labels plain images, those of one shape together.

    Args:
        cfg: of the model, with SELFTRAIN.LABEL_PRECISION and SELFTRAIN.TTA.
        model: is put into evaluation mode.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        self.masks = makes_masks(model)
        self.teacher: Callable = SegmentationTeacher(cfg, model) if self.masks else Teacher(cfg, model)

    def __call__(self, samples: Sequence[dict[str, Any]], most: int) -> list[Any]:
        """Rows of the store (see ``make_row``) of the images' boxes, or ``PixelLabels``; of the files, in their order.

        Args:
            samples: with ``images``, ``height`` and ``width``, as ``UnlabeledImageMapper`` has them.
            most: images a forward pass.
        """
        inputs = [{**sample, "file_name": ""} for sample in samples]
        row = _labels_alone if self.masks else box_row
        return list(label_in_order(inputs, self.teacher, most, len(inputs), labeled_row=row))


def _labels_alone(sample: Sample, labels: PixelLabels) -> PixelLabels:
    return labels


def set_score_floor(detector: nn.Module, floor: float, *, only_lower: bool = False) -> None:
    """Let a detector of detectron2 find boxes of at least this score, whatever its config said.

    Args:
        only_lower: not where it finds boxes of less.
    """
    holder = getattr(detector, "roi_heads", detector)
    predictors = getattr(holder, "box_predictor", holder)
    for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
        if hasattr(predictor, "test_score_thresh"):
            before = predictor.test_score_thresh
            predictor.test_score_thresh = min(floor, before) if only_lower else floor
