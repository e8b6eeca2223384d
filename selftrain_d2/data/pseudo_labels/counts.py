"""Score thresholds from people's counts: each class keeps as many pseudo boxes an image as people drew.

(LabelMatch, arXiv:2206.06608, has this idea of thresholds by class.) The rules, of a class with h boxes on H
human-labeled images, and P pseudo-labeled images, both with those that show nothing:

- its threshold is the score that leaves as near to ``h / H * P`` boxes as any, of two as good ones the higher;
- with fewer than :data:`ENOUGH_BOXES` human boxes, or without any pseudo box, it is that of all classes together, found
  in the same way;
- where all its pseudo boxes are fewer, all are kept: its threshold is their lowest score;
- boxes are ignored down to the score that leaves as near as any to so many times people's count, but not below a given
  score, and never above the threshold.

No threshold lies below the score floor, because no box does.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from selftrain_d2.data.pseudo_labels.manifest import read_manifest_of_boxes, shard_files
from selftrain_d2.data.pseudo_labels.selection import ENOUGH_BOXES, matching_threshold, plain
from selftrain_d2.data.pseudo_labels.shards import SCHEMA, flat_values, read_shards


class HumanCounts(NamedTuple):
    """What people drew: boxes by class name, on so many images."""

    boxes: Mapping[str, int]
    images: int


class ClassThreshold(NamedTuple):
    """The threshold of one class, and from what.

    Attributes:
        category: its name; None for all classes together.
        human_boxes: on all human-labeled images.
        score_thresh: of boxes that are trained on.
        ignore_score_thresh: of boxes that are ignored; None without.
        boxes: pseudo boxes that reach ``score_thresh``.
        reason: where it is not the count of the class itself, why; else empty.
    """

    category: str | None
    human_boxes: int
    score_thresh: float
    ignore_score_thresh: float | None
    boxes: int
    reason: str


@dataclass
class CountThresholds:
    """Thresholds by people's counts.

    Attributes:
        human_images, pseudo_images: those that were counted on.
        overall: of all classes together.
        classes: a row a class.
    """

    human_images: int
    pseudo_images: int
    overall: ClassThreshold
    classes: list[ClassThreshold]

    @property
    def score_thresh(self) -> dict[str, float]:
        """By class name."""
        return {row.category: row.score_thresh for row in self.classes}

    @property
    def ignore_score_thresh(self) -> dict[str, float] | None:
        """By class name; None where no class has boxes to ignore."""
        if all(row.ignore_score_thresh in (None, row.score_thresh) for row in self.classes):
            return None
        return {row.category: row.ignore_score_thresh for row in self.classes}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "human_images": self.human_images,
            "pseudo_images": self.pseudo_images,
            "all_classes": self.overall._asdict(),
            "classes": [row._asdict() for row in self.classes],
        }


def in_words(counts: Mapping[str, Any]) -> str:
    """What :meth:`CountThresholds.as_dict` gave, in one line."""
    rows = []
    for row in counts["classes"]:
        ignored = row["ignore_score_thresh"]
        rows.append(
            f"{row['category']} {row['score_thresh']:.4g} (people {row['human_boxes']}, left {row['boxes']}"
            + (f", ignored from {ignored:.4g}" if ignored is not None else "")
            + (f"; {row['reason']}" if row["reason"] else "")
            + ")"
        )
    return (
        f"score thresholds by people's counts, their boxes on {counts['human_images']} images against pseudo boxes on "
        f"{counts['pseudo_images']}: {', '.join(rows)}"
    )


def thresholds_by_counts(
    folder: str | os.PathLike,
    human: HumanCounts,
    *,
    ignore_from: float | None = None,
    ignore_ratio: float = 2.0,
) -> CountThresholds:
    """Choose the thresholds of a pseudo-label folder as the module says.

    Args:
        folder: a finished one, of boxes.
        human: classes that it does not name have no box.
        ignore_from: the lowest score that is ignored; None: none is.
        ignore_ratio: boxes are ignored down to so many times people's count, at least 1.

    Raises:
        InputError: the folder holds no finished pseudo labels, or masks; a shard is missing or damaged.
    """
    manifest = read_manifest_of_boxes(folder)
    files = shard_files(folder, manifest)
    images = manifest["labeled"] + manifest["empty"]
    # The empty table gives the columns their types where there is no shard.
    tables = itertools.chain([SCHEMA.empty_table()], read_shards(files, ["scores", "category_ids"]))
    columns = [(flat_values(t, "scores"), flat_values(t, "category_ids")) for t in tables]
    scores, category_ids = (np.concatenate(column) for column in zip(*columns))

    def matching(scores: np.ndarray, number: int) -> tuple[float, float | None]:
        """The two thresholds for as many boxes an image as ``number`` human ones are."""
        wanted = number / max(human.images, 1) * images
        threshold = matching_threshold(scores, wanted)
        if threshold is None:
            return 1.0, None if ignore_from is None else 1.0
        if ignore_from is None:
            return plain(threshold), None
        lower = max(matching_threshold(scores, ignore_ratio * wanted), ignore_from)
        return plain(threshold), plain(min(lower, threshold))

    def left(scores: np.ndarray, threshold: float) -> int:
        return int((scores >= np.float32(threshold)).sum())

    everyone = sum(human.boxes.values())
    both = matching(scores, everyone)
    overall = ClassThreshold(
        None, everyone, *both, left(scores, both[0]), _too_few(scores, everyone, human, images)
    )
    rows = []
    for i, name in enumerate(manifest["thing_classes"]):
        number, own = human.boxes.get(name, 0), scores[category_ids == i]
        thresholds, reason = matching(own, number), _too_few(own, number, human, images)
        if number < ENOUGH_BOXES or not len(own):
            few = f"under {ENOUGH_BOXES} human boxes" if len(own) else "no pseudo box"
            thresholds, reason = both, f"{few}: that of all classes"
        rows.append(ClassThreshold(name, number, *thresholds, left(own, thresholds[0]), reason))
    return CountThresholds(human.images, images, overall, rows)


def _too_few(scores: np.ndarray, number: int, human: HumanCounts, images: int) -> str:
    return "all pseudo boxes are fewer" if len(scores) * human.images < number * images else ""
