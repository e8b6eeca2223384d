"""What looks wrong in pseudo labels, in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from selftrain_d2.inspection.box_quality import expected_calibration_error
from selftrain_d2.inspection.inspect import Inspection
from selftrain_d2.inspection.thresholds import counted

# Shares from which something is told.
SKIPPED = 0.01  # of the listed images
EMPTY = 0.5  # of the images, where there are no human labels; with them, EMPTY_MORE than theirs
EMPTY_MORE = 0.25
ONE_CLASS = 0.9  # of the boxes
WHOLE_IMAGE_MORE = 0.05  # of the boxes, more than the human labels have
CAPPED = 0.05  # of the images
LEAST_CAP = 20  # boxes an image: that many images have the most of fewer is no sign of a limit
# Boxes an image, against the human labels.
TOO_FEW, TOO_MANY = 0.5, 2.0
# Expected calibration error of the boxes that reach the threshold, from this many boxes on.
CALIBRATION, CALIBRATION_BOXES = 0.15, 50
NAMES = 5  # classes named before "and N more"


def find_warnings(inspection: Inspection) -> list[str]:
    """One or two sentences for each thing that looks wrong: what, how much, and what to do about it."""
    checks = (_gaps, _emptiness, _classes, _amount, _odd_boxes, _cap, _calibration)
    return [warning for check in checks for warning in check(inspection)]


def _gaps(found: Inspection) -> Iterator[str]:
    manifest = found.manifest
    listed, skipped = manifest["listed"], len(manifest["skipped"])
    counted = manifest["labeled"] + manifest["empty"] + skipped
    if counted != listed:
        yield f"{listed:,} images were listed but {counted:,} are accounted for: run the labeling command again."
    if found.statistics.images + skipped != listed:
        yield (
            f"The manifest counts {listed - skipped:,} images, but {found.statistics.images:,} could be loaded: "
            "the folder is damaged or was changed."
        )
    if skipped > SKIPPED * listed:
        yield (
            f"{skipped:,} of {listed:,} images ({skipped / listed:.0%}) were skipped: see the reasons below. "
            "The student never sees them."
        )


def _emptiness(found: Inspection) -> Iterator[str]:
    statistics, human = found.statistics, found.human_statistics
    if not statistics.images:
        yield "There is not one labeled image."
        return
    if not statistics.boxes:
        yield (
            f"Not one box reaches the score {found.score_thresh:g}: a student would learn that there is nothing to "
            "see. Take a lower threshold or a better teacher."
        )
        return
    share = statistics.empty / statistics.images
    limit = EMPTY if human is None else human.empty / human.images + EMPTY_MORE
    if share > limit:
        against = (
            "" if human is None else f", against {human.empty / human.images:.0%} of the human labels' images"
        )
        yield (
            f"{share:.0%} of the images have no box at {found.score_thresh:g}{against}. They train as images "
            "without any object: look at the empty images below, and at a lower threshold if objects are in them."
        )


def _classes(found: Inspection) -> Iterator[str]:
    boxes = found.statistics.boxes_by_class
    total, human = boxes.sum(), found.human_statistics
    if len(boxes) > 1 and total and boxes.max() > ONE_CLASS * total:
        top = int(boxes.argmax())
        humans = human.boxes_by_class if human is not None else None
        if humans is None or not humans.sum() or humans[top] <= ONE_CLASS * humans.sum():
            yield f"{boxes[top] / total:.0%} of the boxes are of one class, {found.class_names[top]}."
    if human is not None:
        missing = [
            name
            for name, pseudo, true in zip(found.class_names, boxes, human.boxes_by_class)
            if true and not pseudo
        ]
        if missing and total:
            yield (
                f"{_classes_named(missing)} in the human labels but got no pseudo box at {found.score_thresh:g}: "
                "the student's pseudo images will teach it that there are none."
            )
    for labels, what in ((found.human, "The human labels have"), (found.truth, "The truth has")):
        if labels is not None and labels.unknown_classes:
            unknown = labels.unknown_classes
            yield (
                f"{what} {counted(sum(unknown.values()), 'box')} of classes that the teacher does not "
                f"know ({_shortened(sorted(unknown))}), left out here."
            )


def _amount(found: Inspection) -> Iterator[str]:
    pseudo, human = found.statistics, found.human_statistics
    if human is None or not human.boxes or not pseudo.boxes:
        return
    ratio = pseudo.per_image(pseudo.boxes) / human.per_image(human.boxes)
    if not TOO_FEW <= ratio <= TOO_MANY:
        yield (
            f"At {found.score_thresh:g} the pseudo labels hold {pseudo.per_image(pseudo.boxes):.2f} boxes an image, "
            f"the human labels {human.per_image(human.boxes):.2f}: {ratio:.2f} times as many. If both sets "
            f"of images are alike, the threshold is too {'high' if ratio < 1 else 'low'}."
        )


def _odd_boxes(found: Inspection) -> Iterator[str]:
    pseudo, human = found.statistics, found.human_statistics
    share = pseudo.whole_image / pseudo.boxes if pseudo.boxes else 0.0
    usual = human.whole_image / human.boxes if human is not None and human.boxes else 0.0
    if share > usual + WHOLE_IMAGE_MORE:
        against = f", against {usual:.1%} of the human boxes" if human is not None else ""
        yield f"{share:.0%} of the boxes cover nearly the whole image{against}."


def _cap(found: Inspection) -> Iterator[str]:
    """The detector keeps a number of boxes an image. The manifest does not say it: many images share it."""
    statistics = found.statistics
    if statistics.most_boxes < LEAST_CAP:
        return
    lowest = min(found.score_thresh, *(r.threshold for r in found.recommended))
    for threshold in sorted({found.score_thresh, lowest}, reverse=True):
        capped = int(statistics.capped[statistics.position(threshold)])
        if capped > max(CAPPED * statistics.images, 1):
            yield (
                f"{capped:,} of {statistics.images:,} images have {statistics.most_boxes} boxes of {threshold:g} "
                "or more, the most that any image has: the detector's limit (TEST.DETECTIONS_PER_IMAGE) may have "
                "cut further boxes off. Label again with a higher one."
            )
            return


def _calibration(found: Inspection) -> Iterator[str]:
    if found.judgement is None:
        return
    rows = found.judgement.reliability_kept
    boxes, error = sum(row.boxes for row in rows), expected_calibration_error(rows)
    if boxes < CALIBRATION_BOXES or error is None or error <= CALIBRATION:
        return
    promised = sum(row.boxes * row.mean_score for row in rows if row.boxes) / boxes
    kept = sum(row.boxes * row.correct for row in rows if row.boxes) / boxes
    yield (
        f"Scores are poorly calibrated: the {boxes:,} boxes from {found.score_thresh:g} up have "
        f"a mean score of {promised:.2f}, and {kept:.0%} of them are correct (calibration error {error:.2f}). "
        "Take thresholds from the truth, not from what a score seems to promise."
    )


def _classes_named(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} classes ({_shortened(names)}) are"


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more
