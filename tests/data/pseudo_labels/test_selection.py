"""Each selection against a loop over plain rows."""

import numpy as np
import pytest
from detectron2.config import get_cfg
from hypothesis import given
from hypothesis import strategies as st

from selftrain_d2 import InputError, add_selftrain_config
from selftrain_d2.data.pseudo_labels.selection import (
    fully_selected,
    matching_threshold,
    resolve_thresholds,
    score_weights,
    select_boxes,
    selection_from_config,
    selection_in_words,
)

CLASSES = ["car", "dog", "tree"]
MANIFEST = {"thing_classes": CLASSES, "score_floor": 0.05}

# Few different scores: ties, and thresholds that are met exactly, are common.
SCORES = st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]) | st.floats(0.0625, 1, width=32)
THRESHOLDS = st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
IMAGES = st.lists(st.lists(st.tuples(SCORES, st.integers(0, 2)), max_size=6), max_size=6)


def _arrays(images):
    boxes = [box for image in images for box in image]
    scores = np.array([score for score, _ in boxes], np.float32)
    category_ids = np.array([category for _, category in boxes], np.int32)
    return scores, category_ids, np.array([len(image) for image in images], np.int64)


@given(IMAGES, st.tuples(THRESHOLDS, THRESHOLDS, THRESHOLDS), st.none() | st.integers(1, 4))
def test_thresholds_by_class_and_the_best_of_an_image(images, thresholds, top_k):
    expected = []
    for image in images:
        reached = [i for i, (score, c) in enumerate(image) if np.float32(score) >= np.float32(thresholds[c])]
        # sorted() is stable: of equal scores the first
        best = sorted(reached, key=lambda i: -np.float32(image[i][0]))[:top_k]
        expected += [i in best for i in range(len(image))]
    kept = select_boxes(*_arrays(images), np.array(thresholds, np.float32), top_k)
    assert kept.tolist() == expected


@given(st.lists(SCORES, max_size=12), st.floats(0.1, 15))
def test_the_threshold_that_matches_a_count(scores, target):
    scores = np.array(scores, np.float32)
    threshold = matching_threshold(scores, target)
    if not len(scores):
        assert threshold is None
        return
    distances = {t: abs(sum(s >= t for s in scores) - target) for t in scores.tolist()}
    nearest = min(distances.values())
    assert threshold == max(t for t, distance in distances.items() if distance == nearest)


def test_one_threshold_or_one_by_class():
    np.testing.assert_array_equal(resolve_thresholds(MANIFEST, 0.7), np.full(3, 0.7, np.float32))
    by_class = {"tree": 0.3, "car": 0.5, "dog": 1}
    np.testing.assert_array_equal(resolve_thresholds(MANIFEST, by_class), np.array([0.5, 1, 0.3], np.float32))
    assert (resolve_thresholds(MANIFEST, 0.5, boxes_per_image=2) == np.float32(0.05)).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"score_thresh": 0.04}, r"0\.04 is outside \[0\.05, 1\]"),
        ({"score_thresh": 1.1}, "outside"),
        ({"score_thresh": float("nan")}, "outside"),
        ({"score_thresh": "0.5"}, "outside"),
        ({"score_thresh": True}, "outside"),
        ({"score_thresh": {"car": 0.5, "dog": 0.01, "tree": 0.5}}, r"0\.01 of class 'dog' is outside"),
        ({"score_thresh": {"car": 0.5, "dog": 0.5}}, "'tree' has no score threshold"),
        ({"score_thresh": {"car": 0.5, "dog": 0.5, "tree": 0.5, "bus": 0.5}}, "no class 'bus'"),
        ({"score_thresh": {"car": 0.5, "dog": 0.5, "tree": 0.5}, "boxes_per_image": 2}, "not both"),
        ({"score_thresh": 0.5, "top_k": 0}, "at least 1"),
        ({"score_thresh": 0.5, "top_k": 1.5}, "at least 1"),
        ({"score_thresh": 0.5, "boxes_per_image": 0}, "above 0"),
        ({"score_thresh": 0.5, "boxes_per_image": float("nan")}, "above 0"),
        ({"score_thresh": 0.5, "boxes_per_image": float("inf")}, "above 0"),
        ({"score_thresh": 0.5, "ignore_score_thresh": 0.04}, r"0\.04 is outside \[0\.05, 1\]"),
        ({"score_thresh": 0.5, "boxes_per_image": 2, "ignore_score_thresh": 0.04}, "outside"),
        ({"score_thresh": 0.5, "localization_thresh": 1.5}, r"a number in \[0, 1\], not 1\.5"),
        ({"score_thresh": 0.5, "localization_thresh": 0.5}, r"SELFTRAIN\.TTA\.FLIP True"),
        ({"score_thresh": 0.5, "ignore_score_thresh": 0.5}, r"from a score of 0\.5 on .* from 0\.5 on"),
        ({"score_thresh": 0.5, "ignore_score_thresh": {"car": 0.1, "dog": 0.1}}, "'tree' has no score"),
        (
            {"score_thresh": 0.5, "score_weighted": True},
            r"the lower one is not given: set SELFTRAIN\.IGNORE_SCORE",
        ),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(InputError, match=message):
        resolve_thresholds(MANIFEST, **arguments)


def test_weights_of_scores_between_two_thresholds():
    """The first class from 0.3 to 0.6, the second from 0.5 to 0.9; of the third the lower one is the higher."""
    scores = np.array([0.2, 0.3, 0.39, 0.45, 0.6, 0.7, 0.45, 0.5, 0.7, 0.9, 0.49, 0.5, 0.6], np.float32)
    category_ids = np.array([0] * 6 + [1] * 4 + [2] * 3)
    high, low = np.array([0.6, 0.9, 0.5], np.float32), np.array([0.3, 0.5, 0.7], np.float32)
    expected = [0, 0, 0.3, 0.5, 1, 1, 0, 0, 0.5, 1, 0, 1, 1]
    found = score_weights(scores, category_ids, high, low)
    assert found.tolist() == pytest.approx(expected, abs=1e-6) and found.dtype == np.float32
    assert not len(score_weights(scores[:0], category_ids[:0], high, low))


def test_from_config():
    cfg = get_cfg()
    add_selftrain_config(cfg)
    defaults = {"score_thresh": 0.5, "top_k": None, "boxes_per_image": None, "ignore_score_thresh": None}
    assert selection_from_config(cfg, CLASSES) == defaults
    cfg.SELFTRAIN.SCORE_THRESH, cfg.SELFTRAIN.SCORE_THRESH_BY_CLASS = 0.6, ("dog", 0.8)
    cfg.SELFTRAIN.TOP_K = 5
    chosen = selection_from_config(cfg, CLASSES)
    assert chosen == {
        "score_thresh": {"car": 0.6, "dog": 0.8, "tree": 0.6},
        "top_k": 5,
        "boxes_per_image": None,
        "ignore_score_thresh": None,
    }
    assert selection_in_words(cfg) == "score 0.6 or more (dog 0.8), the best 5 of an image"
    cfg.SELFTRAIN.IGNORE_SCORE_THRESH = 0.25
    assert selection_from_config(cfg, CLASSES) == {**chosen, "ignore_score_thresh": 0.25}
    assert selection_in_words(cfg).endswith(", the best 5 of an image (others of 0.25 or more ignored)")
    cfg.SELFTRAIN.LOCALIZATION_THRESH = 0.7
    assert selection_from_config(cfg, CLASSES)["localization_thresh"] == 0.7
    assert "score_weighted" not in chosen
    cfg.SELFTRAIN.SCORE_WEIGHTED = True
    weighted = selection_from_config(cfg, CLASSES)
    assert weighted["score_weighted"] is True and weighted["ignore_score_thresh"] == 0.25
    assert fully_selected(weighted) == {**weighted, "ignore_score_thresh": None, "score_weighted": False}
    assert selection_in_words(cfg).endswith("(others of 0.25 or more weighed by their score)")
    cfg.SELFTRAIN.SCORE_WEIGHTED, cfg.SELFTRAIN.SOFT_LABELS = False, True
    assert selection_from_config(cfg, CLASSES) == weighted  # the same boxes
    assert selection_in_words(cfg).endswith("(others of 0.25 or more as soft labels)")
    cfg.SELFTRAIN.SOFT_LABELS = False
    assert "(dog 0.8), on whose place the teacher's views agree to 0.7, the best" in selection_in_words(cfg)
    cfg.SELFTRAIN.LOCALIZATION_THRESH = 0.0
    cfg.SELFTRAIN.SCORE_THRESH_BY_CLASS = ("dog", 0.8, "car")
    with pytest.raises(InputError, match="'car' stands alone"):
        selection_from_config(cfg, CLASSES)
    cfg.SELFTRAIN.SCORE_THRESH_BY_CLASS = ("bus", 0.8)
    with pytest.raises(InputError, match="no class 'bus'"):
        resolve_thresholds(MANIFEST, **selection_from_config(cfg, CLASSES))


def test_what_may_be_ignored():
    """Some class has room below its threshold, or boxes may be left over by other rules."""
    for arguments in (
        {"score_thresh": {"car": 0.3, "dog": 0.7, "tree": 0.3}, "ignore_score_thresh": 0.5},
        {"score_thresh": 0.5, "top_k": 1, "ignore_score_thresh": 0.5},
        {"score_thresh": 0.5, "boxes_per_image": 2, "ignore_score_thresh": 0.5},
        {"score_thresh": 0.5, "localization_thresh": 0.5, "ignore_score_thresh": 0.5},
    ):
        resolve_thresholds({**MANIFEST, "views": 2}, **arguments)
    masks = {"stuff_classes": CLASSES, "score_floor": 0.05}
    with pytest.raises(InputError, match=r"are masks.*IGNORE_SCORE_THRESH at 0"):
        resolve_thresholds(masks, 0.5, ignore_score_thresh=0.2)
    with pytest.raises(InputError, match=r"are masks.*LOCALIZATION_THRESH at 0"):
        resolve_thresholds(masks, 0.5, localization_thresh=0.2)
