"""Which boxes of a pseudo-label folder are trained on: score thresholds, the best of an image, a target count.

Letters in shapes: N images, B boxes of all images one after the other, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np
from detectron2.config import CfgNode

from selftrain_d2.errors import InputError

if TYPE_CHECKING:
    from selftrain_d2.data.pseudo_labels.counts import CountThresholds

#: A class with fewer true (or human) boxes than this takes the threshold of all classes together.
ENOUGH_BOXES = 30

#: What is said where a localization threshold finds boxes without a localization score.
WITHOUT_LOCALIZATION = (
    "A localization threshold needs a teacher that looks several times, and these labels have no localization scores "
    "or lack some: label with SELFTRAIN.TTA.FLIP True or several SELFTRAIN.TTA.SCALES, into another folder, or set "
    "SELFTRAIN.LOCALIZATION_THRESH (localization_thresh) to 0."
)

#: What is said where boxes between two thresholds are to be trained on, and there is one.
WITHOUT_SECOND_THRESHOLD = (
    "Boxes between two thresholds are to be trained on by their score, and the lower one is not given: set "
    "SELFTRAIN.IGNORE_SCORE_THRESH (ignore_score_thresh), e.g. to 0.3, or SELFTRAIN.SCORE_WEIGHTED (score_weighted) "
    "and SOFT_LABELS to False."
)

#: One score threshold for all classes, or one by class name.
ScoreThreshold = Union[float, Mapping[str, float]]


def selection_from_config(
    cfg: CfgNode, class_names: Sequence[str], counts: CountThresholds | None = None
) -> dict[str, Any]:
    """What SELFTRAIN.SCORE_THRESH, SCORE_THRESH_BY_CLASS, TOP_K, BOXES_PER_IMAGE, IGNORE_SCORE_THRESH,
    LOCALIZATION_THRESH, SCORE_WEIGHTED and SOFT_LABELS say. Soft labels need the boxes that weights need.

    Args:
        class_names: of the pseudo labels.
        counts: thresholds that SELFTRAIN.THRESHOLDS "counts" chose, in place of those of the keys.

    Returns:
        Arguments of ``load_pseudo_labels`` and ``register_pseudo_labels``.

    Raises:
        InputError: SCORE_THRESH_BY_CLASS is not NAME, NUMBER, NAME, NUMBER, ...
    """
    selftrain = cfg.SELFTRAIN
    words = list(selftrain.SCORE_THRESH_BY_CLASS)
    if len(words) % 2:
        raise InputError(
            f"SELFTRAIN.SCORE_THRESH_BY_CLASS is NAME, NUMBER, NAME, NUMBER, ..., but {words[-1]!r} stands alone."
        )
    selection = {
        "score_thresh": with_exceptions(
            selftrain.SCORE_THRESH, dict(zip(words[::2], words[1::2])), class_names
        ),
        "top_k": selftrain.TOP_K or None,
        "boxes_per_image": selftrain.BOXES_PER_IMAGE or None,
        "ignore_score_thresh": selftrain.IGNORE_SCORE_THRESH or None,
    }
    if selftrain.LOCALIZATION_THRESH:
        selection["localization_thresh"] = selftrain.LOCALIZATION_THRESH
    if trains_on_uncertain(cfg):
        selection["score_weighted"] = True
    if counts is not None:
        selection["score_thresh"] = counts.score_thresh
        selection["ignore_score_thresh"] = counts.ignore_score_thresh
        if counts.ignore_score_thresh is None:  # nothing lies between
            selection.pop("score_weighted", None)
    return selection


def trains_on_uncertain(cfg: CfgNode) -> bool:
    """Whether boxes between IGNORE_SCORE_THRESH and the threshold of their class are trained on."""
    return cfg.SELFTRAIN.SCORE_WEIGHTED or cfg.SELFTRAIN.SOFT_LABELS


def check_counts(cfg: CfgNode, manifest: Mapping[str, Any]) -> None:
    """Raise InputError where SELFTRAIN.THRESHOLDS "counts" cannot choose: for masks, beside keys that choose too, or a
    second threshold that SCORE_WEIGHTED or SOFT_LABELS needs and that is off."""
    if "stuff_classes" in manifest:
        raise InputError(
            "The pseudo labels are masks, in which no boxes can be counted: set SELFTRAIN.THRESHOLDS fixed."
        )
    for key, off in (
        ("SCORE_THRESH_BY_CLASS", ()),
        ("BOXES_PER_IMAGE", 0.0),
        ("TOP_K", 0),
        ("LOCALIZATION_THRESH", 0.0),
    ):
        if cfg.SELFTRAIN[key]:
            raise InputError(
                f"SELFTRAIN.THRESHOLDS counts chooses how many boxes are kept, and so does SELFTRAIN.{key} "
                f"{cfg.SELFTRAIN[key]}: set that to {off!r}, or THRESHOLDS fixed."
            )
    if trains_on_uncertain(cfg) and not cfg.SELFTRAIN.IGNORE_SCORE_THRESH:
        raise InputError(WITHOUT_SECOND_THRESHOLD)


def with_exceptions(
    score_thresh: float, by_class: Mapping[str, float], class_names: Sequence[str]
) -> ScoreThreshold:
    """One threshold for all classes but those in ``by_class``."""
    return {**dict.fromkeys(class_names, score_thresh), **by_class} if by_class else score_thresh


def class_names_of(manifest: Mapping[str, Any]) -> list[str]:
    """The classes that a pseudo-label folder has, of boxes or of pixels."""
    return manifest["stuff_classes"] if "stuff_classes" in manifest else manifest["thing_classes"]


def selection_in_words(cfg: CfgNode) -> str:
    """The same for a sentence: "score 0.5 or more (background 0.9)"."""
    selftrain = cfg.SELFTRAIN
    if selftrain.THRESHOLDS == "counts":
        text = "a score that as many an image as people drew have"
    elif selftrain.BOXES_PER_IMAGE:
        text = f"a score that {selftrain.BOXES_PER_IMAGE:g} an image have"
    else:
        text = f"score {selftrain.SCORE_THRESH:g} or more"
        words = list(selftrain.SCORE_THRESH_BY_CLASS)
        if words:
            text += f" ({', '.join(f'{name} {value:g}' for name, value in zip(words[::2], words[1::2]))})"
    if selftrain.LOCALIZATION_THRESH:
        text += f", on whose place the teacher's views agree to {selftrain.LOCALIZATION_THRESH:g}"
    text += f", the best {selftrain.TOP_K} of an image" if selftrain.TOP_K else ""
    ignored = selftrain.IGNORE_SCORE_THRESH
    how = "weighed by their score" if selftrain.SCORE_WEIGHTED else "ignored"
    how = "as soft labels" if selftrain.SOFT_LABELS else how
    return text + (f" (others of {ignored:g} or more {how})" if ignored else "")


def fully_selected(selection: Mapping[str, Any]) -> dict[str, Any]:
    """A selection of the boxes alone that count fully: none are there to ignore, or to weigh."""
    return {**selection, "ignore_score_thresh": None, "score_weighted": False}


def resolve_thresholds(
    manifest: Mapping[str, Any],
    score_thresh: ScoreThreshold,
    top_k: int | None = None,
    boxes_per_image: float | None = None,
    ignore_score_thresh: ScoreThreshold | None = None,
    localization_thresh: float | None = None,
    score_weighted: bool = False,
) -> np.ndarray:
    """Check a selection against what was written.

    Args:
        manifest: of the folder.
        score_thresh, top_k, boxes_per_image, ignore_score_thresh, localization_thresh, score_weighted: see
            ``load_pseudo_labels``.

    Returns:
        (C,) float32, the threshold of each class; the floor where ``boxes_per_image`` will choose it.

    Raises:
        InputError: a threshold is no number from the floor to 1, or is missing or given for an unknown class;
            ``top_k`` is not at least 1, ``boxes_per_image`` not above 0, or given beside thresholds by class; one of
            these two, ``ignore_score_thresh`` or ``localization_thresh`` for masks; no box can have a score that is
            ignored; the teacher looked once, so that boxes have no localization score; or ``score_weighted`` is given
            without ``ignore_score_thresh``.
    """
    if "stuff_classes" in manifest:
        if top_k is not None or boxes_per_image is not None:
            raise InputError(
                "The pseudo labels are masks, of which the best boxes of an image or a number of boxes an image cannot "
                "be taken: leave top_k and boxes_per_image out, or SELFTRAIN.TOP_K and BOXES_PER_IMAGE at 0."
            )
        if ignore_score_thresh is not None:
            raise InputError(
                "The pseudo labels are masks, whose pixels are ignored wherever they are not trained on: leave "
                "ignore_score_thresh out, or SELFTRAIN.IGNORE_SCORE_THRESH at 0."
            )
        if localization_thresh is not None:
            raise InputError(
                "The pseudo labels are masks, which have no localization scores: leave localization_thresh out, or "
                "SELFTRAIN.LOCALIZATION_THRESH at 0."
            )
    if localization_thresh is not None:
        if not _is_number(localization_thresh) or not 0 <= localization_thresh <= 1:
            raise InputError(f"localization_thresh must be a number in [0, 1], not {localization_thresh!r}.")
        if manifest.get("views", 1) < 2:
            raise InputError(WITHOUT_LOCALIZATION)
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise InputError(f"The best {top_k} boxes of an image cannot be taken: top_k must be at least 1.")
    if boxes_per_image is not None:
        if not _is_number(boxes_per_image) or not 0 < boxes_per_image < float("inf"):
            raise InputError(f"boxes_per_image must be a number above 0, not {boxes_per_image!r}.")
        if isinstance(score_thresh, Mapping):
            raise InputError(
                "Give score thresholds by class or boxes_per_image, not both: it chooses one threshold."
            )
        score_thresh = manifest["score_floor"]
    thresholds = thresholds_of_classes(manifest, score_thresh)
    if score_weighted and ignore_score_thresh is None:
        raise InputError(WITHOUT_SECOND_THRESHOLD)
    if ignore_score_thresh is not None:
        ignored = thresholds_of_classes(manifest, ignore_score_thresh)
        others = (top_k, boxes_per_image, localization_thresh)  # rules by which boxes are left over
        if others == (None, None, None) and (ignored >= thresholds).all():
            raise InputError(
                f"Boxes from a score of {ignore_score_thresh} on are to be ignored, but from {score_thresh} on all are "
                "trained on: set ignore_score_thresh (SELFTRAIN.IGNORE_SCORE_THRESH) below that, or to 0."
            )
    return thresholds


def thresholds_of_classes(manifest: Mapping[str, Any], score_thresh: ScoreThreshold) -> np.ndarray:
    """(C,) float32.

    Raises:
        InputError: a threshold is no number from the floor to 1, or is missing or given for an unknown class.
    """
    names, floor = class_names_of(manifest), manifest["score_floor"]
    by_name = score_thresh if isinstance(score_thresh, Mapping) else dict.fromkeys(names, score_thresh)
    unknown = [name for name in by_name if name not in names]
    if unknown:
        raise InputError(
            f"There is no class {unknown[0]!r} to set a score threshold for; the classes are {names}."
        )
    missing = [name for name in names if name not in by_name]
    if missing:
        raise InputError(f"The class {missing[0]!r} has no score threshold: give one for each of {names}.")
    for name, threshold in by_name.items():
        if not _is_number(threshold) or not floor <= threshold <= 1:
            which = f" of class {name!r}" if isinstance(score_thresh, Mapping) else ""
            raise InputError(
                f"The score threshold {threshold!r}{which} is outside [{floor}, 1]: the pseudo labels were written "
                f"with the floor {floor}."
            )
    return np.array([by_name[name] for name in names], np.float32)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def select_boxes(
    scores: np.ndarray,
    category_ids: np.ndarray,
    counts: np.ndarray,
    thresholds: np.ndarray,
    top_k: int | None = None,
    localized: np.ndarray | None = None,
) -> np.ndarray:
    """Boxes that reach the threshold of their class, and of these the best of each image.

    Args:
        scores: (B,) float32. category_ids: (B,). counts: (N,) boxes of each image.
        thresholds: (C,) float32, as scores are stored: 0.7 must keep a score written as 0.7.
        top_k: of equal scores the first ones are taken. None: all.
        localized: (B,) bool, boxes that reach a localization threshold; others are not selected. None: all.

    Returns:
        (B,) bool.
    """
    kept = scores >= thresholds[category_ids]
    if localized is not None:
        kept &= localized
    if top_k is None:
        return kept
    boxes = np.flatnonzero(kept)
    images = np.repeat(np.arange(len(counts)), counts)[boxes]
    order = np.lexsort((-scores[boxes], images))  # image by image, the best first, else as they were
    first = np.searchsorted(images, images)  # where an image begins: `images` is sorted, before and after
    best = np.zeros_like(kept)
    best[boxes[order[np.arange(len(boxes)) - first < top_k]]] = True
    return best


def score_weights(
    scores: np.ndarray, category_ids: np.ndarray, thresholds: np.ndarray, lower: np.ndarray
) -> np.ndarray:
    """How much boxes count by their scores: fully from the threshold of their class on, not at all up to the lower one,
    and in between by ``(score - lower) / (threshold - lower)``.

    ASTOD (github.com/CEA-LIST/ASTOD) has this rule.

    Args:
        scores: (B,) float32. category_ids: (B,).
        thresholds, lower: (C,) float32. Where the lower one is not below the other, nothing lies in between.

    Returns:
        (B,) float32 in [0, 1].
    """
    high, low = thresholds[category_ids], lower[category_ids]
    between = (scores > low) & (scores < high)
    weights = (scores >= high).astype(np.float32)
    weights[between] = (scores - low)[between] / (high - low)[between]
    return weights


class SelectedBoxes(NamedTuple):
    """What becomes of boxes.

    Attributes:
        kept: (B,) bool, those that are trained on.
        ignored: (B,) bool, those that are neither objects nor background; None where none can be.
        weights: (B,) float32 in [0, 1], how much those that are kept count; None: fully.
    """

    kept: np.ndarray
    ignored: np.ndarray | None
    weights: np.ndarray | None


def select_and_ignore(
    scores: np.ndarray,
    category_ids: np.ndarray,
    counts: np.ndarray,
    thresholds: np.ndarray,
    *,
    top_k: int | None,
    localized: np.ndarray | None,
    ignored_from: np.ndarray | None,
    score_weighted: bool,
) -> SelectedBoxes:
    """Boxes to train on, and of the others those to ignore.

    Args:
        scores, category_ids, counts, thresholds, top_k, localized: see :func:`select_boxes`.
        ignored_from: (C,) float32, what is not trained on is ignored from here on. None: nothing is.
        score_weighted: whether boxes from ``ignored_from`` up to their threshold are trained on too, weighed by
            :func:`score_weights`.
    """
    weights = None
    if score_weighted:
        weights = score_weights(scores, category_ids, thresholds, ignored_from)
        thresholds = np.minimum(thresholds, ignored_from)
    kept = select_boxes(scores, category_ids, counts, thresholds, top_k, localized)
    ignored = None
    if ignored_from is not None:
        ignored = select_boxes(scores, category_ids, counts, ignored_from) & ~kept
    return SelectedBoxes(kept, ignored, weights)


def matching_threshold(scores: np.ndarray, target: float) -> float | None:
    """The score threshold that keeps a number of boxes as near to ``target`` as can be.

    Args:
        scores: (B,) float32, of all boxes that may be kept.

    Returns:
        One of the scores, of two as good ones the higher; None without boxes.
    """
    values, numbers = np.unique(scores, return_counts=True)
    if not len(values):
        return None
    kept = np.cumsum(numbers[::-1])[::-1]  # by the threshold values[i]
    return float(values[matching_count_threshold(kept, target)])


def matching_count_threshold(boxes: np.ndarray, target: float) -> int:
    """Position of the threshold that keeps as close to ``target`` boxes as any; of equal ones the highest.

    Args:
        boxes: (T,) boxes that reach each of T rising thresholds.
    """
    return len(boxes) - 1 - int(np.argmin(np.abs(np.asarray(boxes) - target)[::-1]))


def plain(threshold: np.float32) -> float:
    """The shortest number that is this float32: 0.36, not 0.36000001430511475."""
    return float(str(np.float32(threshold)))
