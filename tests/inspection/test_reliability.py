"""Calibration against plain loops, AP of single classes against pycocotools on that class alone."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st

from selftrain_d2.inspection.box_quality import (
    BoxMatches,
    average_precision,
    average_precision_by_class,
    expected_calibration_error,
    reliability,
)


def matches(boxes):
    """From (score, correct, ignored) of each box."""
    scores, correct, ignored = (np.array([box[i] for box in boxes]) for i in range(3))
    nothing = np.zeros(0, int)
    return BoxMatches(
        scores=scores.astype(np.float32),
        category_ids=np.zeros(len(boxes), int),
        correct=correct.astype(bool) & ~ignored.astype(bool),
        ignored=ignored.astype(bool),
        truth_category_ids=nothing,
        truth_found=nothing.astype(bool),
        truth_ignored=nothing.astype(bool),
    )


SCORES = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]), st.floats(0, 1, width=32))


@given(
    st.lists(st.tuples(SCORES, st.booleans(), st.booleans()), max_size=40), st.sampled_from([0.0, 0.3, 0.5])
)
def test_bins_and_error_equal_plain_loops(boxes, score_thresh):
    found = matches(boxes)
    rows = reliability(found, 10, score_thresh)
    bins = [[] for _ in range(10)]
    for score, correct, ignored in zip(found.scores, found.correct, found.ignored):
        if ignored or score < np.float32(score_thresh):
            continue
        place = 9
        while place > 0 and score < np.float32(place / 10):
            place -= 1
        bins[place].append((float(score), bool(correct)))
    error = 0.0
    for row, members in zip(rows, bins):
        assert row.boxes == len(members)
        if members:
            mean = sum(score for score, _ in members) / len(members)
            share = sum(correct for _, correct in members) / len(members)
            assert row.mean_score == pytest.approx(mean) and row.correct == pytest.approx(share)
            error += len(members) * abs(mean - share)
        else:
            assert row.mean_score is None and row.correct is None
    total = sum(map(len, bins))
    found_error = expected_calibration_error(rows)
    assert found_error is None if not total else found_error == pytest.approx(error / total)


def test_error_of_calibrated_and_of_overconfident_scores():
    calibrated = [(0.75, i < 75, False) for i in range(100)]
    assert expected_calibration_error(reliability(matches(calibrated))) == pytest.approx(0)
    overconfident = [(0.9, i < 50, False) for i in range(100)]
    assert expected_calibration_error(reliability(matches(overconfident))) == pytest.approx(0.4)


def test_average_precision_by_class_is_that_of_the_class_alone():
    generator = np.random.default_rng(3)

    def box(corner, category_id, score=None):
        bbox = [*corner, corner[0] + 20, corner[1] + 20]
        annotation = {"bbox": bbox, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category_id}
        return annotation if score is None else {**annotation, "score": score}

    truth, predicted = [], []
    for image in range(12):
        corners, ids = generator.uniform(0, 200, (6, 2)), generator.integers(0, 3, 6)
        truth.append({"file_name": f"{image}.png", "annotations": [box(c, i) for c, i in zip(corners, ids)]})
        moved = corners + generator.normal(0, 3, (6, 2))
        scored = [box(c, i, s) for c, i, s in zip(moved, ids, generator.random(6))]
        wrong = [box(generator.uniform(0, 200, 2), 3, 0.5)]  # a class without a true box
        predicted.append({"file_name": f"{image}.png", "annotations": scored + wrong})
    found = average_precision_by_class(predicted, truth)
    assert set(found) == {None, 0, 1, 2, 3} and found[3] == {"AP": None, "AP50": None, "AP75": None}

    def only(dicts, category_id):
        return [
            {**d, "annotations": [a for a in d["annotations"] if a["category_id"] == category_id]}
            for d in dicts
        ]

    for category_id in range(3):
        alone = average_precision(only(predicted, category_id), only(truth, category_id))
        assert found[category_id] == pytest.approx(alone) and 5 < alone["AP"] < 95
    for name in ("AP", "AP50", "AP75"):
        assert found[None][name] == pytest.approx(np.mean([found[i][name] for i in range(3)]))
