"""Recommended thresholds against plain loops over all candidates, and what they fall back to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selftrain_d2.inspection.thresholds import (
    ENOUGH_BOXES,
    best_f1_threshold,
    matching_count_threshold,
    plain,
    recommend_by_count,
    recommend_by_truth,
    recommend_paper,
)

GRID = np.array([0.1, 0.3, 0.5, 0.7], np.float32)


def falling(values):
    return np.array(sorted(values, reverse=True))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=30), st.integers(0, 60)
)
def test_best_f1_equals_a_plain_loop(pairs, truth):
    correct = falling(min(pair) for pair in pairs)
    boxes = falling(max(pair) for pair in pairs)
    best, expected = 0.0, None
    for i in range(len(boxes)):
        precision = correct[i] / boxes[i] if boxes[i] else 0.0
        recall = correct[i] / truth if truth else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        if f1 > 0 and f1 >= best - 1e-12:
            best, expected = max(f1, best), i
    if truth >= correct.max():  # else there are more correct boxes than true ones
        found = best_f1_threshold(boxes, correct, truth)
        assert found == expected


@given(st.lists(st.integers(0, 100), min_size=1, max_size=30), st.floats(0, 120))
def test_matching_count_equals_a_plain_loop(boxes, target):
    boxes = falling(boxes)
    expected = 0
    for i in range(len(boxes)):
        if abs(boxes[i] - target) <= abs(boxes[expected] - target):
            expected = i
    assert matching_count_threshold(boxes, target) == expected


def test_by_truth_each_class_takes_its_best_and_rare_ones_that_of_all():
    boxes = np.array([[100, 50, 30, 10], [90, 60, 55, 5], [4, 3, 2, 1], [50, 20, 9, 3]])
    correct = np.array([[40, 38, 20, 9], [50, 50, 50, 5], [4, 3, 2, 1], [0, 0, 0, 0]])
    truth = np.array([60, 60, 5, 40])
    overall, rows = recommend_by_truth(GRID, boxes, correct, truth, ["ash", "fir", "yew", "oak"])
    assert [r.category for r in rows] == ["ash", "fir", "yew", "oak"]
    assert [r.threshold for r in rows] == [0.3, 0.5, overall.threshold, overall.threshold]
    f1 = 2 * correct.sum(0) / (boxes.sum(0) + truth.sum())
    assert overall.threshold == plain(GRID[np.argmax(f1)])
    assert "best F1, 0.69, on 60 true boxes (precision 0.76, recall 0.63)" in rows[0].reason
    assert "only 5 true boxes" in rows[2].reason and "all classes together" in rows[2].reason
    assert "not one of its pseudo boxes is right" in rows[3].reason


def test_by_truth_the_range_of_good_thresholds_and_the_floor_are_told():
    flat = np.array([[400, 399, 300, 10]])
    _, (row,) = recommend_by_truth(GRID, flat, flat, np.array([400]), ["ash"])
    assert row.category == "ash" and row.threshold == 0.1
    assert "from 0.1 to 0.3" in row.reason and "score floor" in row.reason


def test_by_truth_too_few_boxes_in_all_is_the_papers_half():
    _, (row,) = recommend_by_truth(
        GRID, np.ones((1, 4)), np.ones((1, 4)), np.array([ENOUGH_BOXES - 1]), ["ash"]
    )
    assert row.threshold == 0.5 and "as in the paper" in row.reason and "29 true boxes" in row.reason


def test_by_count_the_human_boxes_an_image_are_matched():
    boxes = np.array([[400, 210, 90, 10], [80, 40, 30, 5], [30, 20, 10, 2]])
    human = np.array([40, 200, 3])  # 2, 10 and 0.15 an image
    overall, rows = recommend_by_count(GRID, boxes, 100, human, 20, ["ash", "fir", "yew"])
    assert (
        rows[0].threshold == 0.3 and "2.10 boxes an image" in rows[0].reason and "have 2.00" in rows[0].reason
    )
    # As SELFTRAIN.THRESHOLDS "counts" chooses: where all are fewer than people's, all are kept.
    assert overall.threshold == 0.1 and "fewer than the human labels' 12.15" in overall.reason
    assert rows[1].threshold == 0.1 and "keeps all 80 pseudo boxes" in rows[1].reason
    assert rows[2].threshold == overall.threshold and "only 3 human boxes" in rows[2].reason
    nothing, rows = recommend_by_count(GRID, np.zeros((1, 4), int), 100, human[:1], 20, ["ash"])
    assert nothing.threshold == 0.5 and "no pseudo box: 0.5, as in the paper" in rows[0].reason


def test_without_anything_to_compare_it_is_the_papers_half_or_the_floor():
    overall, rows = recommend_paper(GRID, ["ash", "fir"])
    assert [r.threshold for r in (overall, *rows)] == [0.5] * 3 and "paper" in rows[0].reason
    overall, _ = recommend_paper(np.array([0.6, 0.7], np.float32), ["ash", "fir"])
    assert overall.threshold == pytest.approx(0.6) and "floor" in overall.reason


@pytest.mark.parametrize("number", [0.36, 0.07, 1 / 3, 1.0])
def test_plain_numbers_are_the_same_float32(number):
    assert (
        np.float32(plain(np.float32(number))) == np.float32(number)
        and len(str(plain(np.float32(number)))) < 12
    )
