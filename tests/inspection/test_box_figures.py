"""The diagrams show the numbers that they are given, in both themes."""

import io

import numpy as np
import pytest
from detectron2.structures import BoxMode
from matplotlib import rc_context

from selftrain_d2.inspection import box_figures as figures
from selftrain_d2.inspection.box_quality import ReliabilityBin
from selftrain_d2.inspection.box_reach import BoxReach
from selftrain_d2.inspection.box_statistics import count_labels, threshold_grid
from selftrain_d2.inspection.style import THEMES


def labels(scores_by_image, side=40.0):
    """Images with boxes of these scores, classes in turn."""
    return [
        {
            "height": 100,
            "width": 100,
            "annotations": [
                {
                    "bbox": [0, 0, side, side],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": i % 2,
                    "score": score,
                }
                for i, score in enumerate(scores)
            ],
        }
        for scores in scores_by_image
    ]


SCORES = [[0.11, 0.15, 0.52, 0.55, 0.55], [], [0.49, 0.5, 1.0]]


@pytest.fixture
def statistics():
    return count_labels(labels(SCORES), 2, threshold_grid(0.1, 0.5), 0.5)


def bars(axes):
    """Left edge of each bin -> height of its bars."""
    heights = {}
    for patch in axes.patches:
        low = round(patch.get_x() + patch.get_width() / 2 - figures.SCORE_BIN / 2, 2)
        heights[low] = heights.get(low, 0) + patch.get_height()
    return {low: height for low, height in heights.items() if height}


def test_score_bars_hold_every_box_on_its_side_of_the_threshold(statistics):
    (axes,) = figures.score_histogram(statistics).axes
    assert bars(axes) == {0.1: 1, 0.15: 1, 0.45: 1, 0.5: 2, 0.55: 2, 0.95: 1}
    grey = [
        p for p in axes.patches if p.get_height() and p.get_facecolor() != axes.patches[-1].get_facecolor()
    ]
    assert sum(p.get_height() for p in grey) == 3


def test_score_bars_by_class_add_up(statistics):
    figure = figures.score_histograms_by_class(statistics, ["ash", "fir"])
    drawn = [bars(axes) for axes in figure.axes if axes.patches]
    assert [sum(b.values()) for b in drawn] == statistics.boxes_at[:, 0].tolist() == [5, 3]


def test_a_threshold_inside_a_bin_divides_it():
    statistics = count_labels(labels([[0.31, 0.32, 0.33, 0.34]]), 2, threshold_grid(0.1, 0.325), 0.325)
    (axes,) = figures.score_histogram(statistics).axes
    inside = [p for p in axes.patches if p.get_height()]
    assert [(p.get_y(), p.get_height()) for p in inside] == [(0, 2), (2, 2)]


def test_shares_of_images_and_sizes(statistics):
    human = count_labels(labels([[1.0] * 4] * 3, side=80.0), 2, statistics.thresholds, 0.5)
    (axes,) = figures.boxes_per_image(statistics, human).axes
    pseudo, humans = (patch.get_data().values for patch in axes.patches)
    assert pseudo.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3, 0]) and humans.tolist() == [
        0,
        0,
        0,
        0,
        1,
    ]
    (axes,) = figures.box_sizes(statistics, human).axes
    for patch, side in zip(axes.patches, (40, 80)):
        shares, edges, _ = patch.get_data()
        (filled,) = np.flatnonzero(shares)
        assert shares[filled] == 1 and edges[filled] <= side < edges[filled + 1]


def test_boxes_against_the_threshold(statistics):
    human = count_labels(labels([[1.0] * 4]), 2, statistics.thresholds, 0.5)
    (axes,) = figures.boxes_against_threshold(statistics, human, 0.36).axes
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    pseudo = {round(float(x), 2): y for x, y in curves["pseudo labels"]}
    assert pseudo[0.1] == pytest.approx(8 / 3) and pseudo[0.5] == pytest.approx(5 / 3)
    assert curves["human labels: 4.00"][0, 1] == 4 and curves["recommended 0.36"][0, 0] == 0.36


def test_curves_of_quality():
    grid, boxes, correct = np.array([0.1, 0.5, 0.9]), np.array([10, 4, 0]), np.array([5, 4, 0])
    figure = figures.precision_recall(grid, boxes, correct, 8, 0.5, 0.5)
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    np.testing.assert_allclose(curves["precision"], [0.5, 1, np.nan])
    np.testing.assert_allclose(curves["recall"], [5 / 8, 0.5, 0])
    np.testing.assert_allclose(curves["F1"], [10 / 18, 8 / 12, 0])
    assert not any(label.startswith("recommended") for label in curves)


def test_the_reliability_diagram_shows_shares_and_counts():
    rows = [
        ReliabilityBin(0.0, 0.5, 100, 0.3, 0.2),
        ReliabilityBin(0.5, 0.9, 0, None, None),
        ReliabilityBin(0.9, 1.0, 5, 0.95, 0.6),
    ]
    shares, counts = figures.reliability_diagram(rows).axes
    assert [p.get_height() for p in shares.patches] == [0.2, 0.6]
    assert shares.patches[1].get_alpha() < shares.patches[0].get_alpha() == 1
    assert [p.get_height() for p in counts.patches] == [100, 0, 5]
    assert [t.get_text() for t in counts.texts] == ["100", "5"]
    error = (100 * 0.1 + 5 * 0.35) / 105
    assert [t.get_text() for t in shares.texts] == [f"calibration error {error:.3f}"]


def test_no_more_classes_are_drawn_than_fit():
    number = figures.CLASSES_SHOWN + 5
    truth, boxes = np.arange(1, number + 1), np.ones((number, 2), int)
    names = [f"class {i}" for i in range(number)]
    figure = figures.precision_recall_by_class(
        np.array([0.1, 0.5]), boxes, boxes, truth, [0.5] * number, names
    )
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.lines]
    assert len(titles) == figures.CLASSES_SHOWN and titles[0] == f"class {number - 1}  {number} true"


@pytest.mark.parametrize("theme", THEMES)
def test_nothing_can_be_drawn_too(theme):
    empty = count_labels([], 2, threshold_grid(0.05, 0.5), 0.5)
    none = np.zeros((2, len(empty.thresholds)), int)
    with rc_context(THEMES[theme]):
        drawn = [
            figures.score_histogram(empty),
            figures.score_histograms_by_class(empty, ["ash", "fir"]),
            figures.boxes_against_threshold(empty, empty, 0.5),
            figures.box_sizes(empty, empty),
            figures.boxes_per_image(empty, empty),
            figures.precision_recall(empty.thresholds, none[0], none[0], 0, 0.5, 0.5),
            figures.reliability_diagram([ReliabilityBin(0.0, 1.0, 0, None, None)]),
        ]
        for figure in drawn:
            figure.savefig(io.BytesIO(), format="png", dpi=40)
            assert figure.get_facecolor()[:3] == pytest.approx(
                (1, 1, 1) if theme == "light" else (0.1, 0.12, 0.15), abs=0.02
            )


def test_curves_of_reach_are_those_of_the_worst_classes():
    sizes = (64, 128, 256)
    missed = np.array([[0.9, 1.0, np.nan], [0.5, 0.6, np.nan], [0.0, 0.1, np.nan]])
    reach = BoxReach(
        ["ash", "fir", "oak"], np.array([4, 9, 0]), missed[1], 128, "an anchor", "", sizes, missed
    )
    (axes,) = figures.reach_by_size(reach).axes
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert list(curves)[:2] == ["fir", "ash"] and "oak" not in curves
    np.testing.assert_allclose(curves["ash"], [[64, 0.1], [128, 0.5], [256, 1.0]])
    assert curves["IMAGE_SIZE 128"][0, 0] == 128
