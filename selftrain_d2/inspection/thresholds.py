"""A score threshold for each class, with its reason in words.

The best first: F1 on truth where it is known, else as many boxes an image as the human labels have, else 0.5 as in
the paper. A class with too few boxes to tell takes the threshold of all classes together.

Letters in shapes: C classes, T thresholds (rising).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from selftrain_d2.data.pseudo_labels.selection import ENOUGH_BOXES, matching_count_threshold, plain

PAPER_THRESHOLD = 0.5  # the paper's hard threshold
# F1 this close to the best is as good.
SAME_F1 = 0.01


class Recommendation(NamedTuple):
    """The threshold for a class, and why."""

    category: str
    threshold: float
    reason: str


def best_f1_threshold(boxes: np.ndarray, correct: np.ndarray, truth: int) -> int | None:
    """Position of the threshold with the best F1 = 2 correct / (boxes + truth); of equal ones the highest.

    Args:
        boxes, correct: (T,) boxes that reach each threshold, and how many of them are right.
        truth: true boxes.

    Returns:
        None if no box is right at any threshold.
    """
    if not len(correct) or not np.max(correct):
        return None
    return _last_best(f1_scores(boxes, correct, truth))


def f1_scores(boxes: np.ndarray, correct: np.ndarray, truth: np.ndarray | int) -> np.ndarray:
    """F1 at each threshold; 0 where there is neither a box nor a true box."""
    return 2 * np.asarray(correct) / np.maximum(np.asarray(boxes) + truth, 1)


def _last_best(values: np.ndarray) -> int:
    return len(values) - 1 - int(np.argmax(values[::-1]))


def recommend_by_truth(
    thresholds: np.ndarray,
    boxes: np.ndarray,
    correct: np.ndarray,
    truth: np.ndarray,
    class_names: Sequence[str],
) -> tuple[Recommendation, list[Recommendation]]:
    """The thresholds of best F1.

    Args:
        thresholds: (T,) float32. boxes, correct: (C, T). truth: (C,).

    Returns:
        That of all classes together, and one for each class.
    """

    def choose(name: str, boxes: np.ndarray, correct: np.ndarray, truth: int) -> Recommendation | str:
        if truth < ENOUGH_BOXES:
            return f"only {counted(truth, 'true box')}, {ENOUGH_BOXES} are needed"
        best = best_f1_threshold(boxes, correct, truth)
        if best is None:
            return f"not one of its pseudo boxes is right ({counted(truth, 'true box')})"
        f1 = f1_scores(boxes, correct, truth)
        near = np.flatnonzero(f1 >= f1[best] - SAME_F1)
        reason = (
            f"best F1, {f1[best]:.2f}, on {counted(truth, 'true box')} (precision {correct[best] / boxes[best]:.2f}, "
            f"recall {correct[best] / truth:.2f})"
        )
        if len(near) > 1:
            low, high = (plain(thresholds[i]) for i in (near[0], near[-1]))
            reason += f"; within {SAME_F1} of it from {low:g} to {high:g}"
        if best == 0:
            reason += "; this is the score floor: labels written with a lower one may do better"
        return Recommendation(name, plain(thresholds[best]), reason)

    overall = choose("all classes", boxes.sum(0), correct.sum(0), int(truth.sum()))
    return _for_classes(
        overall, class_names, lambda name, i: choose(name, boxes[i], correct[i], int(truth[i])), thresholds
    )


def recommend_by_count(
    thresholds: np.ndarray,
    boxes: np.ndarray,
    images: int,
    human_boxes: np.ndarray,
    human_images: int,
    class_names: Sequence[str],
) -> tuple[Recommendation, list[Recommendation]]:
    """The thresholds that leave as many boxes an image as the human labels have.

    Args:
        thresholds: (T,) float32. boxes: (C, T) pseudo boxes. images: pseudo-labeled ones, empty ones included.
        human_boxes: (C,). human_images: those of the human labels, empty ones included.

    Returns:
        That of all classes together, and one for each class.
    """

    def choose(name: str, boxes: np.ndarray, human: int) -> Recommendation | str:
        if human < ENOUGH_BOXES:
            return f"only {counted(human, 'human box')}, {ENOUGH_BOXES} are needed"
        if not boxes[0]:
            return "there is no pseudo box"
        wanted = human / human_images
        best = matching_count_threshold(boxes, wanted * images)
        if boxes[0] < wanted * images:
            return Recommendation(
                name,
                plain(thresholds[best]),
                f"keeps all {counted(int(boxes[0]), 'pseudo box')} down to the score floor, and even these "
                f"({boxes[0] / images:.2f} an image) are fewer than the human labels' {wanted:.2f} an image: the "
                "teacher finds too little, or the images differ",
            )
        return Recommendation(
            name,
            plain(thresholds[best]),
            f"leaves {boxes[best] / images:.2f} boxes an image, as the human labels have {wanted:.2f} "
            f"({counted(human, 'human box')}); assumes that both sets of images are alike",
        )

    overall = choose("all classes", boxes.sum(0), int(human_boxes.sum()))
    return _for_classes(
        overall, class_names, lambda name, i: choose(name, boxes[i], int(human_boxes[i])), thresholds
    )


def recommend_paper(
    thresholds: np.ndarray, class_names: Sequence[str]
) -> tuple[Recommendation, list[Recommendation]]:
    """0.5 for all, where there is nothing to compare with."""
    overall = "neither truth nor human labels to choose by"
    return _for_classes(overall, class_names, lambda name, i: "", thresholds)


def _for_classes(
    overall: Recommendation | str,
    class_names: Sequence[str],
    choose: Callable[[str, int], Recommendation | str],
    thresholds: np.ndarray,
) -> tuple[Recommendation, list[Recommendation]]:
    """Let a class without a choice of its own take the overall one, and that, if need be, the paper's."""
    if isinstance(overall, str):
        threshold = max(PAPER_THRESHOLD, plain(thresholds[0]))
        paper = "as in the paper" if threshold == PAPER_THRESHOLD else "the score floor"
        overall = Recommendation("all classes", threshold, f"{overall}: {threshold:g}, {paper}")
    if len(class_names) == 1:
        return overall, [overall._replace(category=class_names[0])]
    rows = []
    for i, name in enumerate(class_names):
        choice = choose(name, i)
        if isinstance(choice, str):
            reason = f"{choice}: that of all classes together" if choice else overall.reason
            choice = Recommendation(name, overall.threshold, reason)
        rows.append(choice)
    return overall, rows


def counted(number: int, word: str) -> str:
    """1 box, 2 boxes."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}es"
