"""Curves with the given numbers, in a picture that is written whole."""

import os

import cv2
import numpy as np
import pytest
from detectron2.structures import BoxMode

from selftrain_d2.errors import InputError
from selftrain_d2.inspection import box_quality_plot
from selftrain_d2.inspection.box_quality import precision_recall_by_threshold
from selftrain_d2.inspection.box_quality_plot import precision_recall_plot


def box(left, right, score=None, category=0):
    annotation = {
        "bbox": [left, 0, right, 10],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category,
        "iscrowd": 0,
    }
    return annotation if score is None else {**annotation, "score": score}


@pytest.fixture
def rows():
    truth = [{"file_name": "a.png", "annotations": [box(0, 10), box(30, 40, category=1)]}]
    predicted = [{"file_name": "a.png", "annotations": [box(0, 10, score=0.6), box(60, 70, score=0.3)]}]
    return precision_recall_by_threshold(predicted, truth, [0.9, 0.5, 0.2])


def test_curves_show_the_overall_rows_in_order_of_threshold(monkeypatch, rows):
    figures = []
    monkeypatch.setattr(box_quality_plot, "save_figure", lambda figure, path: figures.append(figure))
    precision_recall_plot(rows, "x.png", score_thresh=0.4)
    ratios, counts = figures[0].axes
    curves = {line.get_label(): line.get_xydata() for line in ratios.lines}
    np.testing.assert_allclose(curves["Precision"], [(0.2, 0.5), (0.5, 1), (0.9, np.nan)])
    np.testing.assert_allclose(curves["Recall"], [(0.2, 0.5), (0.5, 0.5), (0.9, 0)])
    np.testing.assert_allclose(curves["F1"], [(0.2, 0.5), (0.5, 2 / 3), (0.9, 0)])
    np.testing.assert_allclose(counts.lines[0].get_xydata(), [(0.2, 2), (0.5, 1), (0.9, 0)])
    assert curves["used for training: 0.4"][:, 0].tolist() == [0.4, 0.4]
    assert [t.get_text() for t in counts.texts] == ["2 human boxes"]


def test_plot_is_written_whole_and_replaces_an_older_one(tmp_path, rows, monkeypatch):
    path = tmp_path / "quality.png"
    path.write_bytes(b"older")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            precision_recall_plot(rows, path)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]
    precision_recall_plot(rows, path)
    assert cv2.imread(str(path)).shape == (800, 1200, 3) and list(tmp_path.iterdir()) == [path]


def test_plot_needs_a_row_of_all_classes(tmp_path, rows):
    with pytest.raises(InputError, match="all classes"):
        precision_recall_plot([row for row in rows if row.category is not None], tmp_path / "x.png")
