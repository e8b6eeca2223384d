"""Precision, recall and AP of pseudo labels: by hand, against a plain matcher, and against pycocotools."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from selftrain_d2.errors import InputError
from selftrain_d2.inspection.box_quality import (
    average_precision,
    markdown_table,
    match_boxes,
    pair_images,
    precision_recall_by_threshold,
)


def box(x, y, width, height, category=0, score=None, crowd=0, mode=BoxMode.XYXY_ABS):
    bbox = [x, y, x + width, y + height] if mode == BoxMode.XYXY_ABS else [x, y, width, height]
    annotation = {"bbox": bbox, "bbox_mode": mode, "category_id": category, "iscrowd": crowd}
    return annotation if score is None else {**annotation, "score": score}


def dataset(*images):
    return [{"file_name": f"/data/{i}.png", "annotations": list(boxes)} for i, boxes in enumerate(images)]


def overall(rows):
    return [(r.threshold, r.boxes, r.true_positives, r.truth) for r in rows if r.category is None]


# ---- By hand --------------------------------------------------------------------------------------


def test_hand_worked_case_with_duplicate_miss_and_ignore_region():
    truth = dataset(
        [box(0, 0, 10, 10), box(50, 0, 10, 10), box(0, 50, 40, 20, crowd=1)],
        [box(0, 0, 10, 10, mode=BoxMode.XYWH_ABS)],
    )
    predictions = dataset(
        [
            box(1, 0, 10, 10, score=0.8),  # IoU 9/11 with the first
            box(0, 0, 10, 10, score=0.6),  # exact, but a higher score has taken it: a duplicate
            box(5, 55, 8, 8, score=0.9),  # inside the ignore region: counts neither way
            box(9, 60, 8, 8, score=0.9),  # and so does the next one in it
        ],
        [box(0, 6, 10, 10, score=0.3)],  # IoU 4/16
    )
    rows = precision_recall_by_threshold(predictions, truth, (0.2, 0.5, 0.7, 0.85))
    assert overall(rows) == [(0.2, 3, 1, 3), (0.5, 2, 1, 3), (0.7, 1, 1, 3), (0.85, 0, 0, 3)]
    all_of_them = rows[0]
    assert (all_of_them.precision, all_of_them.recall, all_of_them.f1) == (1 / 3, 1 / 3, 1 / 3)
    nothing = [r for r in rows if r.category is None][-1]
    assert (nothing.precision, nothing.recall, nothing.f1) == (None, 0, 0)


def test_a_lower_overlap_is_correct_at_a_lower_iou_threshold():
    truth, predictions = dataset([box(0, 0, 10, 10)]), dataset([box(0, 6, 10, 10, score=0.9)])
    assert precision_recall_by_threshold(predictions, truth, [0.5], iou_threshold=0.25)[0].precision == 1
    assert precision_recall_by_threshold(predictions, truth, [0.5], iou_threshold=0.26)[0].precision == 0


def test_classes_are_judged_apart_and_together():
    truth = dataset([box(0, 0, 10, 10, category=0), box(20, 0, 10, 10, category=2)])
    predictions = dataset(
        [box(0, 0, 10, 10, category=0, score=0.9), box(20, 0, 10, 10, category=1, score=0.9)]
    )
    rows = precision_recall_by_threshold(predictions, truth, [0.5], class_names=["ash", "birch", "cedar"])
    judged = {r.category: (r.boxes, r.true_positives, r.truth, r.precision, r.recall) for r in rows}
    assert judged == {
        None: (2, 1, 2, 0.5, 0.5),
        "ash": (1, 1, 1, 1, 1),
        "birch": (1, 0, 0, 0, None),
        "cedar": (0, 0, 1, None, 0),
    }


def test_a_score_stored_as_float32_reaches_the_threshold_it_was_written_with():
    truth = dataset([box(0, 0, 10, 10)])
    predictions = dataset([box(0, 0, 10, 10, score=float(np.float32(0.7)))])
    assert float(np.float32(0.7)) < 0.7
    assert overall(precision_recall_by_threshold(predictions, truth, np.array([0.7]))) == [(0.7, 1, 1, 1)]


def test_average_precision_by_hand():
    truth = dataset([box(0, 0, 10, 10), box(30, 0, 10, 10)])
    # The first box is wrong, the second exact: precision 1/2 up to recall 1/2, then nothing (101 points).
    predictions = dataset([box(70, 0, 10, 10, score=0.9), box(0, 0, 10, 10, score=0.8)])
    result = average_precision(predictions, truth)
    assert result == pytest.approx(
        {"AP": 100 * 51 / 101 / 2, "AP50": 100 * 51 / 101 / 2, "AP75": 100 * 51 / 101 / 2}
    )
    # IoU 2/3: correct at 0.50, 0.55, 0.60 and 0.65 of the ten thresholds.
    shifted = dataset([box(0, 2, 10, 10, score=0.9), box(30, 2, 10, 10, score=0.8)])
    assert average_precision(shifted, truth) == pytest.approx({"AP": 40, "AP50": 100, "AP75": 0})


@pytest.mark.parametrize(
    ("predicted", "true"), [([], []), ([box(0, 0, 4, 4, score=0.5)], []), ([], [box(0, 0, 4, 4)])]
)
def test_empty_sides(predicted, true):
    (row, *_) = precision_recall_by_threshold(dataset(predicted), dataset(true), [0.1])
    assert (row.boxes, row.true_positives, row.truth) == (len(predicted), 0, len(true))
    assert average_precision(dataset(predicted), dataset(true))["AP"] == (0 if true else None)


# ---- Against other implementations ----------------------------------------------------------------

corner, side = st.integers(0, 30), st.integers(2, 24)
true_box = st.builds(box, corner, corner, side, side, st.integers(0, 1), crowd=st.sampled_from([0, 0, 0, 1]))
# Scores from a coarse grid would tie, and ties have no defined order.
scored = st.builds(box, corner, corner, side, side, st.integers(0, 1), score=st.floats(0.0625, 1, width=32))
image = st.tuples(
    st.lists(scored, max_size=8, unique_by=lambda a: a["score"]), st.lists(true_box, max_size=6)
)


def overlap(prediction, target):
    p, t = np.array(prediction["bbox"], float), np.array(target["bbox"], float)
    shared = np.clip(np.minimum(p[2:], t[2:]) - np.maximum(p[:2], t[:2]), 0, None).prod()
    p_area, t_area = (p[2:] - p[:2]).prod(), (t[2:] - t[:2]).prod()
    return shared / (p_area if target["iscrowd"] else p_area + t_area - shared)


def plain_matching(predictions, truth, iou_threshold):
    """One image. Written from COCO's description: {prediction index: 'correct' | 'ignored' | 'wrong'}."""
    free, outcome = set(range(len(truth))), {}
    for i in sorted(range(len(predictions)), key=lambda i: -predictions[i]["score"]):
        same = [j for j in free if truth[j]["category_id"] == predictions[i]["category_id"]]
        over = {j: overlap(predictions[i], truth[j]) for j in same}
        over = {j: v for j, v in over.items() if v >= iou_threshold}
        real = {j: v for j, v in over.items() if not truth[j]["iscrowd"]}
        if real:
            # COCO takes the later of equally good ones.
            free.remove(max(real, key=lambda j: (real[j], j)))
        outcome[i] = "correct" if real else "ignored" if over else "wrong"
    return outcome, free


@settings(max_examples=150, deadline=None)
@given(st.lists(image, min_size=1, max_size=4), st.sampled_from([0.3, 0.5, 0.75]))
def test_matching_agrees_with_a_plain_greedy_matcher(images, iou_threshold):
    predictions, truth = [p for p, _ in images], [t for _, t in images]
    matches = match_boxes(predictions, truth, iou_threshold)
    expected, found = [], []
    for p, t in images:
        outcome, free = plain_matching(p, t, iou_threshold)
        expected += [outcome[i] for i in range(len(p))]
        found += [j not in free for j in range(len(t))]
    got = np.where(matches.correct, "correct", np.where(matches.ignored, "ignored", "wrong")).tolist()
    assert got == expected
    real = ~matches.truth_ignored
    assert matches.truth_found[real].tolist() == np.array(found, bool)[real].tolist()


def test_recall_and_precision_agree_with_pycocotools_accumulated_curve():
    rng = np.random.default_rng(3)
    truth, predictions, ground, detections = [], [], [], []
    for image_id in range(1, 41):
        corners, sides = rng.uniform(0, 200, (8, 2)), rng.uniform(10, 50, (8, 2))
        truth.append([box(*c, *s) for c, s in zip(corners, sides)])
        moved = np.concatenate([corners + rng.normal(0, 6, (8, 2)), rng.uniform(0, 200, (6, 2))])
        scores = rng.uniform(0.05, 1, 14).astype(np.float32).astype(float)
        predictions.append([box(*c, 25, 25, score=s) for c, s in zip(moved, scores)])
        for c, s in zip(corners, sides):
            ground.append(
                {"image_id": image_id, "category_id": 1, "bbox": [*c, *s], "area": s.prod(), "iscrowd": 0}
            )
        for c, s in zip(moved, scores):
            detections.append({"image_id": image_id, "category_id": 1, "bbox": [*c, 25, 25], "score": s})
    for i, annotation in enumerate(ground):
        annotation["id"] = i + 1
    reference = COCO()
    reference.dataset = {
        "images": [{"id": i} for i in range(1, 41)],
        "categories": [{"id": 1}],
        "annotations": ground,
    }
    reference.createIndex()
    for threshold in (0.05, 0.4, 0.8):
        kept = [d for d in detections if d["score"] >= threshold]
        evaluation = COCOeval(reference, reference.loadRes(kept), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        recall = evaluation.eval["recall"][0, 0, 0, -1]  # IoU 0.5, all areas, 100 boxes an image
        (row, _) = precision_recall_by_threshold(dataset(*predictions), dataset(*truth), [threshold])
        assert row.recall == pytest.approx(recall)
        assert row.precision == pytest.approx(recall * len(ground) / len(kept))
        evaluation.summarize()
        at_least = [[a for a in boxes if a["score"] >= threshold] for boxes in predictions]
        result = average_precision(dataset(*at_least), dataset(*truth))
        assert list(result.values()) == pytest.approx([100 * v for v in evaluation.stats[:3]])


@settings(max_examples=30, deadline=None)
@given(st.lists(image, min_size=1, max_size=3))
def test_raising_the_threshold_never_adds_boxes(images):
    rows = precision_recall_by_threshold(dataset(*[p for p, _ in images]), dataset(*[t for _, t in images]))
    counts = [(r.boxes, r.true_positives) for r in rows if r.category is None]
    assert counts == sorted(counts, reverse=True)
    assert all(r.true_positives <= min(r.boxes, r.truth) for r in rows)


# ---- Pairing images -------------------------------------------------------------------------------


def named(*names):
    return [{"file_name": name, "annotations": [name]} for name in names]


@pytest.mark.parametrize(
    ("predicted", "true", "pairs"),
    [
        (
            ["/a/x.png", "/a/y.png"],
            ["/a/y.png", "/a/x.png"],
            [("/a/x.png", "/a/x.png"), ("/a/y.png", "/a/y.png")],
        ),
        # the folder has moved
        (["/old/set/x.png"], ["/new/set/x.png"], [("/old/set/x.png", "/new/set/x.png")]),
        # equal names in subfolders stay apart
        (
            ["/o/b/x.png", "/o/a/x.png"],
            ["/n/a/x.png", "n/b/x.png"],
            [("/o/b/x.png", "n/b/x.png"), ("/o/a/x.png", "/n/a/x.png")],
        ),
        # a relative and an absolute path; an image on one side only is left out
        (
            ["data/./x.png", "data/z.png"],
            ["/home/data/x.png", "/home/data/y.png"],
            [("data/./x.png", "/home/data/x.png")],
        ),
    ],
)
def test_images_are_paired_by_the_end_of_their_path(predicted, true, pairs):
    left, right = pair_images(named(*predicted), named(*true))
    assert [(a, b) for (a,), (b,) in zip(left, right)] == pairs


@pytest.mark.parametrize(
    ("predicted", "true"),
    [(["/a/x.png"], ["/a/y.png"]), ([], ["/a/y.png"]), (["/a/b/x.png", "/a/c/x.png"], ["/a/d/x.png"])],
)
def test_without_a_pair_the_message_shows_both_sides(predicted, true):
    with pytest.raises(InputError, match=r"y\.png|d/x\.png"):
        pair_images(named(*predicted), named(*true))


# ---- Mistakes and rendering -----------------------------------------------------------------------


def test_human_labels_as_predictions_are_refused():
    with pytest.raises(InputError, match="score"):
        precision_recall_by_threshold(dataset([box(0, 0, 4, 4)]), dataset([box(0, 0, 4, 4)]))


def test_category_ids_beyond_the_class_list_are_refused():
    with pytest.raises(InputError, match="category id 1"):
        precision_recall_by_threshold(
            dataset([]), dataset([box(0, 0, 4, 4, category=1)]), class_names=["Tree"]
        )


def test_table_shows_classes_only_when_there_are_several():
    predictions = dataset([box(0, 0, 10, 10, score=0.6), box(40, 0, 9, 9, score=0.4)])
    truth = dataset([box(0, 0, 10, 10)])
    table = markdown_table(precision_recall_by_threshold(predictions, truth, [0.3, 0.5, 0.9]))
    assert table.splitlines() == [
        "| Score at least | Boxes | Correct | Precision | Recall | F1 |",
        "| --: | --: | --: | --: | --: | --: |",
        "| 0.3 | 2 | 1 | 0.500 | 1.000 | 0.667 |",
        "| 0.5 | 1 | 1 | 1.000 | 1.000 | 1.000 |",
        "| 0.9 | 0 | 0 | - | 0.000 | 0.000 |",
    ]
    two = dataset([box(0, 0, 10, 10), box(40, 0, 9, 9, category=1)])
    table = markdown_table(
        precision_recall_by_threshold(predictions, two, [0.3], class_names=["ash", "birch"])
    )
    assert [line.split("|")[1].strip() for line in table.splitlines()] == [
        "Class",
        ":--",
        "all",
        "ash",
        "birch",
    ]
