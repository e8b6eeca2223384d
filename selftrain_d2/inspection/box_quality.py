"""How good pseudo labels are, where truth is known: precision, recall and AP against withheld human labels.

Boxes are matched as COCO does (pycocotools): inside an image and a class, in order of falling score, each box
to the free true box that it overlaps most. What matches an ignore region (``iscrowd``) counts neither way.
A box's match does not depend on boxes of lower scores, so one matching serves every score threshold.

Letters in shapes: D predicted boxes, G true boxes, over all images.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from selftrain_d2.errors import InputError

DEFAULT_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

#: The annotations of one image, as detectron2's dataset dicts hold them.
Annotations = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class QualityRow:
    """The boxes from one score threshold up, judged. Ratios are in [0, 1], None where undefined (0 / 0)."""

    category: str | None  # None: all classes together
    threshold: float
    boxes: int  # predicted, without those in ignore regions
    true_positives: int
    truth: int  # true boxes, without ignore regions
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class BoxMatches:
    """The outcome of matching, in the order in which the boxes were given."""

    scores: np.ndarray  # (D,) float32
    category_ids: np.ndarray  # (D,)
    correct: np.ndarray  # (D,) bool: matched with a true box
    ignored: np.ndarray  # (D,) bool: matched with an ignore region
    truth_category_ids: np.ndarray  # (G,)
    truth_found: np.ndarray  # (G,) bool
    truth_ignored: np.ndarray  # (G,) bool: an ignore region


def precision_recall_by_threshold(
    predictions: Sequence[Mapping[str, Any]],
    truth: Sequence[Mapping[str, Any]],
    thresholds: Sequence[float] = DEFAULT_THRESHOLDS,
    iou_threshold: float = 0.5,
    class_names: Sequence[str] | None = None,
) -> list[QualityRow]:
    """Judge scored boxes at several score thresholds.

    Args:
        predictions: detectron2 dataset dicts whose annotations have a ``score``, as from
            ``load_pseudo_labels`` at its lowest threshold.
        truth: dataset dicts with contiguous category ids, as from ``load_coco_json`` with a dataset name.
            Images are paired by file (see ``pair_images``).
        thresholds: boxes with at least this score count, in [0, 1].
        iou_threshold: overlap from which a box is correct, in (0, 1].
        class_names: by contiguous id, for the rows; None uses the ids.

    Returns:
        For each threshold: all classes together, then each class that occurs.

    Raises:
        InputError: no image is in both, a box has no score, or a category id has no name.
    """
    matches = match_boxes(*pair_images(predictions, truth), iou_threshold=iou_threshold)
    present = np.union1d(matches.category_ids, matches.truth_category_ids).astype(int).tolist()
    if class_names is not None and present and present[-1] >= len(class_names):
        raise InputError(
            f"A box has the category id {present[-1]}, but there are only {len(class_names)} classes "
            f"({', '.join(class_names)}): load the truth under a dataset name, which makes ids contiguous."
        )
    names = {i: class_names[i] if class_names is not None else str(i) for i in present}
    rows = []
    for threshold in thresholds:
        rows.append(_count(matches, threshold, None, None))
        rows += [_count(matches, threshold, category_id, name) for category_id, name in names.items()]
    return rows


def _count(matches: BoxMatches, threshold: float, category_id: int | None, name: str | None) -> QualityRow:
    # float32, as scores are stored: 0.7 must include a score written as 0.7.
    chosen = (matches.scores >= np.float32(threshold)) & ~matches.ignored
    true = ~matches.truth_ignored
    if category_id is not None:
        chosen &= matches.category_ids == category_id
        true &= matches.truth_category_ids == category_id
    boxes, truth = int(chosen.sum()), int(true.sum())
    correct = int((chosen & matches.correct).sum())
    return QualityRow(
        category=name,
        threshold=float(threshold),
        boxes=boxes,
        true_positives=correct,
        truth=truth,
        precision=correct / boxes if boxes else None,
        recall=correct / truth if truth else None,
        f1=2 * correct / (boxes + truth) if boxes + truth else None,
    )


def average_precision(
    predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """COCO's box AP of scored boxes, all areas, at most 100 boxes an image; arguments as above.

    Returns:
        ``AP`` (IoU 0.5 to 0.95), ``AP50`` and ``AP75`` in percent; None where no true box exists.
    """
    return average_precision_by_class(predictions, truth)[None]


def average_precision_by_class(
    predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]
) -> dict[int | None, dict[str, float | None]]:
    """As ``average_precision``, for each category id that occurs, and under None for all: the mean over classes."""
    evaluation = _evaluation(*pair_images(predictions, truth))
    with _silence():
        evaluation.evaluate()
        evaluation.accumulate()
    # (IoU thresholds, recalls, classes), all areas and the most boxes; -1 where there is no true box.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    every = dict(enumerate(evaluation.params.catIds))
    return {
        None: _ap_row(precision),
        **{category_id: _ap_row(precision[:, :, [k]]) for k, category_id in every.items()},
    }


def _ap_row(precision: np.ndarray) -> dict[str, float | None]:
    values = {"AP": precision, "AP50": precision[0], "AP75": precision[5]}
    known = {name: part[part > -1] for name, part in values.items()}
    return {name: 100 * float(part.mean()) if part.size else None for name, part in known.items()}


@dataclass(frozen=True)
class ReliabilityBin:
    """Boxes of similar score: what the score promises, and what came of it. None where there is no box."""

    low: float
    high: float  # not included, except for 1
    boxes: int  # without those in ignore regions
    mean_score: float | None
    correct: float | None  # share in [0, 1]


def reliability(matches: BoxMatches, bins: int = 10, score_thresh: float = 0.0) -> list[ReliabilityBin]:
    """The reliability diagram (Guo et al., 2017, arXiv:1706.04599): the share of correct boxes by score.

    Args:
        matches: from ``match_boxes``.
        bins: of equal width between 0 and 1.
        score_thresh: boxes of lower scores are left out.
    """
    edges = np.linspace(0, 1, bins + 1)
    chosen = (matches.scores >= np.float32(score_thresh)) & ~matches.ignored
    scores, correct = matches.scores[chosen], matches.correct[chosen]
    number = np.searchsorted(edges[1:-1].astype(np.float32), scores, side="right")
    rows = []
    for i in range(bins):
        inside = number == i
        boxes = int(inside.sum())
        mean, share = (float(v[inside].mean(dtype=float)) if boxes else None for v in (scores, correct))
        rows.append(ReliabilityBin(float(edges[i]), float(edges[i + 1]), boxes, mean, share))
    return rows


def expected_calibration_error(rows: Sequence[ReliabilityBin]) -> float | None:
    """Mean distance of the mean score from the share of correct boxes, weighted by boxes; None without a box."""
    filled = [row for row in rows if row.boxes]
    if not filled:
        return None
    error = sum(row.boxes * abs(row.mean_score - row.correct) for row in filled)
    return error / sum(row.boxes for row in filled)


def match_boxes(
    predictions: Sequence[Annotations], truth: Sequence[Annotations], iou_threshold: float = 0.5
) -> BoxMatches:
    """Match the boxes of paired images.

    Args:
        predictions: annotations with ``score``, one list an image.
        truth: annotations of the same images in the same order; ``iscrowd`` marks ignore regions.
        iou_threshold: in (0, 1].

    Raises:
        InputError: a predicted box has no score.
    """
    evaluation = _evaluation(predictions, truth)
    evaluation.params.iouThrs = np.array([iou_threshold])
    evaluation.params.maxDets = [max(map(len, predictions), default=0)]  # all of them
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, np.inf]], ["all"]
    with _silence():
        evaluation.evaluate()
    predicted = evaluation.cocoDt.dataset["annotations"]
    true = evaluation.cocoGt.dataset["annotations"]
    correct, ignored = np.zeros(len(predicted), bool), np.zeros(len(predicted), bool)
    found = np.zeros(len(true), bool)
    for result in filter(None, evaluation.evalImgs):
        boxes = np.array(result["dtIds"], int) - 1
        ignored[boxes] = result["dtIgnore"][0]
        correct[boxes] = (result["dtMatches"][0] > 0) & ~ignored[boxes]
        found[np.array(result["gtIds"], int) - 1] = result["gtMatches"][0] > 0
    return BoxMatches(
        scores=np.array([box["score"] for box in predicted], np.float32),
        category_ids=np.array([box["category_id"] for box in predicted], int),
        correct=correct,
        ignored=ignored,
        truth_category_ids=np.array([box["category_id"] for box in true], int),
        truth_found=found,
        truth_ignored=np.array([box["iscrowd"] for box in true], bool),
    )


def pair_images(
    predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]
) -> tuple[list[Annotations], list[Annotations]]:
    """Annotations of the images that are in both lists of dataset dicts, paired by file.

    Two files are the same image if their paths end alike. As many folders are compared as give the most
    pairs, so folders may have moved, and equal names in different subfolders stay apart.

    Raises:
        InputError: no image is in both.
    """
    pairs = pair_files(*([d["file_name"] for d in dicts] for dicts in (predictions, truth)))
    return [predictions[i]["annotations"] for i, _ in pairs], [truth[j]["annotations"] for _, j in pairs]


def pair_files(predicted_files: Sequence[str], true_files: Sequence[str]) -> list[tuple[int, int]]:
    """Positions in both lists of the files that are the same image, as ``pair_images`` pairs them.

    Raises:
        InputError: no file is in both.
    """
    sides = (predicted_files, true_files)
    paths = [[Path(os.path.normpath(name)).parts for name in files] for files in sides]
    best: list[tuple[int, int]] = []
    for depth in range(max((len(parts) for parts in (*paths[0], *paths[1])), default=0), 0, -1):
        predicted, true = ({parts[-depth:]: i for i, parts in enumerate(side)} for side in paths)
        if len(predicted) < len(predicted_files) or len(true) < len(true_files):
            break  # names are no longer unique, nor are shorter ones
        pairs = [(i, true[key]) for key, i in predicted.items() if key in true]
        best = max(best, pairs, key=len)
    if not best:
        examples = [files[0] if len(files) else "no image" for files in sides]
        raise InputError(
            f"None of the {len(predicted_files)} pseudo-labeled images ({examples[0]}, ...) is among the "
            f"{len(true_files)} images with truth ({examples[1]}, ...): give the truth of the same images."
        )
    return best


def markdown_table(rows: Sequence[QualityRow]) -> str:
    """The rows as a Markdown table; classes are shown only if there is more than one."""
    by_class = len({row.category for row in rows} - {None}) > 1
    shown = [row for row in rows if by_class or row.category is None]
    titles = ["Score at least", "Boxes", "Correct", "Precision", "Recall", "F1"]
    lines = [["Class", *titles] if by_class else titles]
    lines.append([":--" if title == "Class" else "--:" for title in lines[0]])
    for row in shown:
        ratios = ["-" if r is None else f"{r:.3f}" for r in (row.precision, row.recall, row.f1)]
        cells = [f"{row.threshold:g}", str(row.boxes), str(row.true_positives), *ratios]
        lines.append([row.category or "all", *cells] if by_class else cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _evaluation(predictions: Sequence[Annotations], truth: Sequence[Annotations]) -> COCOeval:
    categories = sorted(
        {int(a["category_id"]) for side in (predictions, truth) for image in side for a in image}
    )
    if any("score" not in annotation for image in predictions for annotation in image):
        raise InputError("A predicted box has no score: give pseudo labels or detections, not human labels.")
    with _silence():
        return COCOeval(_coco(truth, categories), _coco(predictions, categories), "bbox")


def _coco(images: Sequence[Annotations], categories: Sequence[int]) -> COCO:
    """An in-memory COCO file; annotation ids count from 1 in the order given."""
    boxes = []
    for image_id, image in enumerate(images):
        for annotation in image:
            x, y, width, height = BoxMode.convert(
                list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYWH_ABS
            )
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": image_id,
                    "category_id": int(annotation["category_id"]),
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": int(annotation.get("iscrowd", 0)),
                    "score": annotation.get("score"),
                }
            )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": i} for i in categories],
        "annotations": boxes,
    }
    coco.createIndex()
    return coco


@contextlib.contextmanager
def _silence():
    """pycocotools prints its progress."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
