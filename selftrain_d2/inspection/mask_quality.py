"""How good pseudo masks are, where truth is known: accuracy and mIOU of the pixels that a threshold leaves.

Letters in shapes: C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selftrain_d2.data.label_maps import VOID, read_label_map
from selftrain_d2.data.pseudo_labels.masks import PERCENTS, least_percents, read_mask
from selftrain_d2.errors import InputError

DEFAULT_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class MaskQualityRow:
    """The pixels from one score threshold up, judged. Ratios are in [0, 1], None where undefined (0 / 0)."""

    threshold: float
    pixels: int  # whose truth is known
    ignored: float | None  # share of these that the threshold leaves out
    pixel_accuracy: float | None  # of the others
    mean_iou: float | None  # of the others, over the classes that the truth has among them
    iou: dict[str, float | None]  # by class


def mask_quality(
    predictions: Sequence[Mapping[str, Any]],
    truth: Mapping[str, str],
    class_names: Sequence[str],
    thresholds: Sequence[float] = DEFAULT_THRESHOLDS,
) -> list[MaskQualityRow]:
    """Judge pseudo masks at several score thresholds, in one pass over the files.

    Args:
        predictions: dataset dicts from ``load_pseudo_labels``, at any threshold: the files have all scores.
        truth: file of the true mask (see ``read_label_map``) by ``image_id``. Pixels of label 255 do not count.
        class_names: by class id.
        thresholds: pixels with at least this score count, in [0, 1].

    Returns:
        A row a threshold. mIOU is that of detectron2's SemSegEvaluator, on the pixels that are not ignored.

    Raises:
        InputError: an image has no truth, or one of another size or with an unknown class.
    """
    counts = sum(
        (_counts(prediction, truth, len(class_names)) for prediction in predictions),
        start=np.zeros((len(class_names), len(class_names) + 1, PERCENTS), np.int64),
    )
    return [_row(counts, threshold, class_names) for threshold in thresholds]


def _counts(prediction: Mapping[str, Any], truth: Mapping[str, str], classes: int) -> np.ndarray:
    """(C, C + 1, 101) pixels by true class, predicted class (the last: none) and percent."""
    name = prediction["image_id"]
    if name not in truth:
        raise InputError(f"There is no true mask of {name} to judge its pseudo mask by.")
    labels = read_mask(prediction["sem_seg_file_name"], prediction["sem_seg_sha256"])
    true = read_label_map(truth[name])
    if true.shape != labels.classes.shape:
        raise InputError(
            f"Mask {truth[name]} is {true.shape[1]} x {true.shape[0]} pixels, but the pseudo mask "
            f"{labels.classes.shape[1]} x {labels.classes.shape[0]}: they must have one size."
        )
    known = true != VOID
    true, predicted, percents = (x[known].astype(np.int64) for x in (true, labels.classes, labels.percents))
    if true.max(initial=0) >= classes:
        raise InputError(
            f"Mask {truth[name]} has the class id {true.max()}, but there are {classes} classes."
        )
    places = (true * (classes + 1) + predicted.clip(max=classes)) * PERCENTS + percents
    shape = classes, classes + 1, PERCENTS
    return np.bincount(places, minlength=np.prod(shape)).reshape(shape)


def _row(counts: np.ndarray, threshold: float, class_names: Sequence[str]) -> MaskQualityRow:
    (least,) = least_percents([threshold])
    confusion = counts[:, :-1, least:].sum(axis=2)
    pixels, kept = int(counts.sum()), int(confusion.sum())
    true, correct = confusion.sum(axis=1), confusion.diagonal()
    union = true + confusion.sum(axis=0) - correct
    iou = [ratio(c, u) for c, u in zip(correct.tolist(), union.tolist())]
    of_truth = [value for value, number in zip(iou, true) if number]
    return MaskQualityRow(
        threshold=threshold,
        pixels=pixels,
        ignored=ratio(pixels - kept, pixels),
        pixel_accuracy=ratio(int(correct.sum()), kept),
        mean_iou=ratio(sum(of_truth), len(of_truth)),
        iou=dict(zip(class_names, iou)),
    )


def ratio(part: float, whole: float) -> float | None:
    """None for 0 / 0."""
    return part / whole if whole else None


def markdown_table(rows: Sequence[MaskQualityRow]) -> str:
    """The rows as a table, in percent."""
    lines = ["| score at least | pixels ignored | pixel accuracy | mIOU |", "|---|---|---|---|"]
    for row in rows:
        values = (row.ignored, row.pixel_accuracy, row.mean_iou)
        shown = " | ".join("-" if value is None else f"{100 * value:.1f}" for value in values)
        lines.append(f"| {row.threshold:g} | {shown} |")
    return "\n".join(lines)
