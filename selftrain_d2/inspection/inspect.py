"""All that a report says about a pseudo-label folder, as numbers.

Letters in shapes: C classes, T thresholds (rising).
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from selftrain_d2.data.pseudo_labels.manifest import read_manifest_of_boxes
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.errors import InputError
from selftrain_d2.inspection.box_quality import (
    BoxMatches,
    ReliabilityBin,
    average_precision_by_class,
    match_boxes,
    pair_files,
    reliability,
)
from selftrain_d2.inspection.box_statistics import (
    LabelStatistics,
    count_at_thresholds,
    count_labels,
    empty_samples,
    threshold_grid,
)
from selftrain_d2.inspection.human_labels import HumanLabels, read_human_labels
from selftrain_d2.inspection.thresholds import (
    Recommendation,
    recommend_by_count,
    recommend_by_truth,
    recommend_paper,
)

# Truth of more images than this is sampled: COCO's evaluation keeps every box in memory as a Python object.
MOST_JUDGED_IMAGES = 5000
MATCHED_AT_ONCE = 500  # images


@dataclass(frozen=True)
class Judgement:
    """Pseudo labels against truth, on the images that have both."""

    images: int
    images_with_truth: int  # more than `images` where a sample was judged
    boxes: np.ndarray  # (C, T) that reach each threshold, without those in ignore regions
    correct: np.ndarray  # (C, T)
    truth: np.ndarray  # (C,) true boxes, without ignore regions
    average_precision: dict[int | None, dict[str, float | None]]  # see average_precision_by_class
    reliability: list[ReliabilityBin]  # of all boxes
    reliability_kept: list[ReliabilityBin]  # of those that reach the threshold


@dataclass(frozen=True)
class Inspection:
    """What was found in a pseudo-label folder."""

    folder: str
    manifest: dict[str, Any]
    class_names: list[str]
    score_thresh: float
    thresholds: np.ndarray  # (T,) float32
    statistics: LabelStatistics
    human: HumanLabels | None
    human_statistics: LabelStatistics | None
    truth: HumanLabels | None
    judgement: Judgement | None
    overall: Recommendation
    recommended: list[Recommendation]  # one a class
    samples: dict[str, list[SampledImage]]  # by a name of statistics.SAMPLES


@dataclass(frozen=True)
class SampledImage:
    """One image to look at."""

    record: Mapping[str, Any]  # its dataset dict, with the boxes that reach the threshold
    truth: Sequence[Mapping[str, Any]] | None  # its true boxes, where known


def inspect_labels(
    folder: str | os.PathLike,
    *,
    score_thresh: float = 0.5,
    localization_thresh: float | None = None,
    truth_json: str | os.PathLike | None = None,
    human_json: str | os.PathLike | None = None,
    human_images: str | None = None,
    label_classes: Sequence[str] | None = None,
    image_root: str | os.PathLike | None = None,
    images_a_sheet: int = 8,
) -> Inspection:
    """Look through a pseudo-label folder once.

    Args:
        folder: what ``generate_pseudo_labels`` wrote.
        score_thresh: the threshold to judge at; the folder holds boxes of lower scores too.
        localization_thresh: look at boxes of at least this localization score alone; None: at all.
        truth_json: COCO JSON of human labels of the same images, or some of them.
        human_json: those of the labeled set that the student will train on as well.
        human_images, label_classes: see :func:`selftrain_d2.data.label_formats.detect.read_labels`.
        image_root: where the images are, if not where they were when labeled.
        images_a_sheet: how many images to pick for each of ``statistics.SAMPLES``.

    Raises:
        InputError: no finished pseudo labels, a threshold under their floor, a JSON that cannot be used, or
            truth of other images.
    """
    manifest = read_manifest_of_boxes(folder)
    floor, class_names = manifest["score_floor"], list(manifest["thing_classes"])
    if not floor <= score_thresh <= 1:
        raise InputError(
            f"The score threshold {score_thresh} is outside [{floor}, 1]: {folder} was written with the floor {floor}."
        )
    of_humans = {"images": human_images, "label_classes": label_classes}
    human = None if human_json is None else read_human_labels(human_json, class_names, **of_humans)
    truth = (
        None
        if truth_json is None
        else read_human_labels(truth_json, class_names, label_classes=label_classes)
    )
    labels = load_pseudo_labels(folder, floor, image_root=image_root, localization_thresh=localization_thresh)
    thresholds = threshold_grid(floor, score_thresh)
    picked = empty_samples(images_a_sheet)
    files: list[str] = []
    statistics = count_labels(
        tqdm(_noting_files(labels, files, truth is not None), "inspecting", len(labels), unit="image"),
        len(class_names),
        thresholds,
        score_thresh,
        picked,
    )
    human_statistics = None
    if human is not None:
        human_statistics = count_labels(human.dicts, len(class_names), thresholds, score_thresh)
    pairs: dict[int, int] = {}
    judgement = None
    if truth is not None:
        pairs = dict(pair_files(files, [d["file_name"] for d in truth.dicts]))
        judgement = _judge(labels, truth, pairs, thresholds, score_thresh, len(class_names))
    overall, recommended = _recommend(thresholds, statistics, human_statistics, judgement, class_names)

    def sampled(position: int) -> SampledImage:
        record = labels[position]
        kept = [a for a in record["annotations"] if np.float32(a["score"]) >= np.float32(score_thresh)]
        true = truth.dicts[pairs[position]]["annotations"] if position in pairs else None
        return SampledImage({**record, "annotations": kept}, true)

    return Inspection(
        folder=str(folder),
        manifest=manifest,
        class_names=class_names,
        score_thresh=score_thresh,
        thresholds=thresholds,
        statistics=statistics,
        human=human,
        human_statistics=human_statistics,
        truth=truth,
        judgement=judgement,
        overall=overall,
        recommended=recommended,
        samples={name: [sampled(i) for i in largest.positions()] for name, largest in picked.items()},
    )


def _noting_files(labels, files: list[str], wanted: bool):
    for record in labels:
        if wanted:
            files.append(record["file_name"])
        yield record


def _judge(
    labels: Sequence[Mapping[str, Any]],
    truth: HumanLabels,
    pairs: dict[int, int],
    thresholds: np.ndarray,
    score_thresh: float,
    classes: int,
) -> Judgement:
    chosen = sorted(pairs)
    if len(chosen) > MOST_JUDGED_IMAGES:
        chosen = sorted(random.Random(0).sample(chosen, MOST_JUDGED_IMAGES))
    predicted = [labels[i] for i in chosen]
    true = [truth.dicts[pairs[i]] for i in chosen]
    matches = _match(predicted, true)
    counted, real = ~matches.ignored, ~matches.truth_ignored

    def at_thresholds(boxes: np.ndarray) -> np.ndarray:
        return count_at_thresholds(matches.scores[boxes], matches.category_ids[boxes], thresholds, classes)

    # Paired already: both sides get the same names.
    named = [
        [{"file_name": str(i), "annotations": d["annotations"]} for i, d in enumerate(side)]
        for side in (predicted, true)
    ]
    return Judgement(
        images=len(chosen),
        images_with_truth=len(pairs),
        boxes=at_thresholds(counted),
        correct=at_thresholds(matches.correct),
        truth=np.bincount(matches.truth_category_ids[real], minlength=classes),
        average_precision=average_precision_by_class(*named),
        reliability=reliability(matches),
        reliability_kept=reliability(matches, score_thresh=score_thresh),
    )


def _match(predicted: Sequence[Mapping[str, Any]], true: Sequence[Mapping[str, Any]]) -> BoxMatches:
    """``match_boxes`` in parts, which keeps its Python objects few."""
    parts = [
        match_boxes(
            *([d["annotations"] for d in side[start : start + MATCHED_AT_ONCE]] for side in (predicted, true))
        )
        for start in range(0, len(predicted), MATCHED_AT_ONCE)
    ]
    names = BoxMatches.__dataclass_fields__
    return BoxMatches(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _recommend(
    thresholds: np.ndarray,
    statistics: LabelStatistics,
    human: LabelStatistics | None,
    judgement: Judgement | None,
    class_names: Sequence[str],
) -> tuple[Recommendation, list[Recommendation]]:
    if judgement is not None:
        return recommend_by_truth(
            thresholds, judgement.boxes, judgement.correct, judgement.truth, class_names
        )
    if human is not None:
        return recommend_by_count(
            thresholds,
            statistics.boxes_at,
            statistics.images,
            human.boxes_by_class,
            human.images,
            class_names,
        )
    return recommend_paper(thresholds, class_names)


def group_reasons(skipped: Mapping[str, str], examples: int = 3) -> list[dict[str, Any]]:
    """Reasons for skipped images, those that differ in names and numbers alone put together, most frequent first.

    Returns:
        Dicts of ``reason``, ``images`` (their number) and ``examples`` (file names).
    """
    groups: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        general = re.sub(r"'[^']*'|\"[^\"]*\"|<[^>]*>", "...", reason.replace(name, "..."))
        groups.setdefault(re.sub(r"\d+", "N", general), []).append(name)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [
        {"reason": skipped[names[0]], "images": len(names), "examples": names[:examples]} for names in ordered
    ]
