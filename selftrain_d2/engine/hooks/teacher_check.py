"""Whether a teacher that keeps learning still labels well: a few labeled images against people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from selftrain_d2.data.label_maps import VOID, read_label_map
from selftrain_d2.data.unlabeled_mapper import UnlabeledImageMapper
from selftrain_d2.inspection.box_quality import match_boxes
from selftrain_d2.labeling.step_labels import StepSelection, StepTeacher

#: Images of a check, spread evenly over the labeled ones.
IMAGES = 16
#: A teacher is worse if its agreement with people is under this share of the best that it had.
WORSE = 0.8
#: So many checks in a row that find it worse are enough.
PATIENCE = 3


class TeacherCheck:
    """Judges a teacher by how it labels a few labeled images, always the same.

    It was, and is, trained on these, so the number says nothing of its quality elsewhere; but a teacher that collapses
    (finds nothing, or everything, or one class) collapses on these as well.

    Args:
        dicts: dataset dicts of labeled images.
        mapper: reads them.
    """

    def __init__(self, dicts: Sequence[dict[str, Any]], mapper: UnlabeledImageMapper):
        # Eight times as many are looked at: not all of a large data set.
        labeled = [d for d in _spread(dicts, 8 * IMAGES) if _has_labels(d)]
        self.dicts = _spread(labeled, IMAGES)
        self.mapper = mapper

    def agreement(self, teacher: StepTeacher, selection: StepSelection, batch_size: int) -> float:
        """In [0, 1]. Boxes that would count fully: their F1 by IoU 0.5 (pycocotools). Pixels: the share of those that
        people gave a class to which has the same."""
        samples = [self.mapper.plain(d) for d in self.dicts]
        labels = teacher(samples, batch_size)
        if teacher.masks:
            return _pixel_agreement([selection.classes(one) for one in labels], self.dicts)
        predicted = [
            [a for a in annotations if not a.get("iscrowd") and a.get("weight", 1.0) == 1.0]
            for annotations in selection.annotations(labels)
        ]
        if not any(predicted):
            return 0.0
        matches = match_boxes(predicted, [d["annotations"] for d in self.dicts])
        boxes, truth = (~matches.ignored).sum(), (~matches.truth_ignored).sum()
        return 2 * float(matches.correct.sum()) / float(boxes + truth)


def _spread(items: Sequence[Any], number: int) -> list[Any]:
    """At most so many of a sequence, at even distances."""
    places = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[int(i)] for i in places]


def _has_labels(sample: dict[str, Any]) -> bool:
    return "sem_seg_file_name" in sample or any(
        not a.get("iscrowd", 0) for a in sample.get("annotations", ())
    )


def _pixel_agreement(predicted: Sequence[np.ndarray], dicts: Sequence[dict[str, Any]]) -> float:
    right = valid = 0
    for classes, sample in zip(predicted, dicts):
        true = read_label_map(sample["sem_seg_file_name"])
        right += int(((classes == true) & (true != VOID)).sum())
        valid += int((true != VOID).sum())
    return right / max(valid, 1)
