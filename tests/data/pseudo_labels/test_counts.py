"""Thresholds from people's counts: numbers worked by hand, and what there is when counts cannot tell."""

import numpy as np
import pytest
from detectron2.config import get_cfg
from hypothesis import given
from hypothesis import strategies as st

from selftrain_d2 import InputError, add_selftrain_config, load_pseudo_labels
from selftrain_d2.data.pseudo_labels import selection
from selftrain_d2.data.pseudo_labels.counts import HumanCounts, in_words, thresholds_by_counts
from selftrain_d2.data.pseudo_labels.selection import matching_threshold, selection_from_config
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.inspection.thresholds import plain, recommend_by_count

CLASSES = ["ash", "fir", "yew", "oak"]
# 5, 29 / 12, 3 and 31 / 12 boxes an image; 13 in all.
PEOPLE = HumanCounts({"ash": 60, "fir": 29, "yew": 36, "oak": 31}, 12)


def _write(folder, percents, images=10, skipped=1):
    """A folder of so many images, whose first one has all boxes: by class, scores in percent."""
    scores = [p / 100 for of_class in percents for p in of_class]
    ids = [i for i, of_class in enumerate(percents) for _ in of_class]
    names = [f"{n}.png" for n in range(images + skipped)]
    identity = {"thing_classes": CLASSES[: len(percents)], "score_floor": 0.05, "image_root": "/photos"}
    with PseudoLabelWriter(folder, identity, names) as writer:
        first = make_row(names[0], 9, 9, [[0, 0, 5, 5]] * len(ids), scores, ids)
        others = [make_row(name, 9, 9) for name in names[1:images]]
        writer.write_shard(0, [first, *others, *(make_row(n, skipped="broken") for n in names[images:])])
        writer.finish()
    return folder


@pytest.fixture
def trees(tmp_path):
    """90 ashes of 0.06 to 0.95, 40 firs of 0.60 to 0.99, 20 yews of 0.11 to 0.30, no oak."""
    return _write(tmp_path, [range(6, 96), range(60, 100), range(11, 31), []])


def test_each_class_keeps_as_many_as_people_drew(trees):
    counts = thresholds_by_counts(trees, PEOPLE)
    # Ash: 50 of 90 boxes. Yew: 20 boxes for 30. All: 131 from 0.18 on and 129 from 0.19 on, for 130.
    assert counts.score_thresh == {"ash": 0.46, "fir": 0.19, "yew": 0.11, "oak": 0.19}
    assert (counts.human_images, counts.pseudo_images) == (12, 10)  # the image that was skipped is none
    assert [row.boxes for row in counts.classes] == [50, 40, 20, 0] and counts.overall.boxes == 129
    assert [row.reason for row in counts.classes] == [
        "", "under 30 human boxes: that of all classes", "all pseudo boxes are fewer",
        "no pseudo box: that of all classes",
    ]  # fmt: skip
    assert counts.ignore_score_thresh is None
    kept = load_pseudo_labels(trees, counts.score_thresh)
    assert np.bincount(kept.category_ids, minlength=4).tolist() == [50, 40, 20, 0]
    words = in_words(counts.as_dict())
    assert "boxes on 12 images against pseudo boxes on 10: ash 0.46 (people 60, left 50), fir 0.19 (" in words


def test_boxes_are_ignored_down_to_a_multiple_of_peoples_count(trees):
    counts = thresholds_by_counts(trees, PEOPLE, ignore_from=0.08, ignore_ratio=1.5)
    # Ash: 75 boxes. All: 150 for 195, from 0.06 on, but 0.08 is the least. Yew has no more.
    assert counts.ignore_score_thresh == {"ash": 0.21, "fir": 0.08, "yew": 0.11, "oak": 0.08}
    assert "ash 0.46 (people 60, left 50, ignored from 0.21), " in in_words(counts.as_dict())
    # A band that would begin above the threshold is none.
    counts = thresholds_by_counts(trees, PEOPLE, ignore_from=0.3, ignore_ratio=1.5)
    assert counts.ignore_score_thresh == {"ash": 0.3, "fir": 0.19, "yew": 0.11, "oak": 0.19}
    assert thresholds_by_counts(trees, PEOPLE, ignore_from=0.9).ignore_score_thresh is None


def test_no_pseudo_box_at_all(tmp_path):
    counts = thresholds_by_counts(_write(tmp_path, [[], []]), PEOPLE, ignore_from=0.1)
    assert counts.score_thresh == {"ash": 1.0, "fir": 1.0} and counts.ignore_score_thresh is None
    assert not load_pseudo_labels(tmp_path, counts.score_thresh).box_counts.any()


def test_one_image_on_each_side(tmp_path):
    folder = _write(tmp_path, [[10, 20, 30], [80, 90]], images=1, skipped=0)
    counts = thresholds_by_counts(folder, HumanCounts({"ash": 3}, 1))
    assert counts.score_thresh == {"ash": 0.3, "fir": 0.3}  # of all five boxes the best three


def test_one_class_of_few_boxes_is_all_classes(tmp_path):
    counts = thresholds_by_counts(_write(tmp_path, [[10, 20, 30]], images=2), HumanCounts({"ash": 2}, 4))
    assert counts.score_thresh == {"ash": 0.3}


@given(st.lists(st.tuples(st.integers(5, 100), st.integers(0, 1)), min_size=1, max_size=40), st.data())
def test_inspect_recommends_the_same(boxes, data):
    """With all scores as candidates, as long as people drew enough to tell."""
    human = np.array([data.draw(st.integers(30, 60)) for _ in range(2)])
    scores = np.array([p / 100 for p, _ in boxes], np.float32)
    ids = np.array([c for _, c in boxes])
    candidates = np.unique(scores)
    at = np.array([[((scores >= t) & (ids == c)).sum() for t in candidates] for c in range(2)])
    _, rows = recommend_by_count(candidates, at, 3, human, 6, ["ash", "fir"])
    for c, row in enumerate(rows):
        own = scores[ids == c]
        if len(own):
            chosen = plain(matching_threshold(own, human[c] / 6 * 3))
            assert (own >= np.float32(chosen)).tolist() == (own >= np.float32(row.threshold)).tolist()


def _config(**keys):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    for key, value in {"THRESHOLDS": "counts", **keys}.items():
        cfg.SELFTRAIN[key] = value
    return cfg


def test_the_selection_of_a_config(trees):
    counts = thresholds_by_counts(trees, PEOPLE, ignore_from=0.08, ignore_ratio=1.5)
    chosen = selection_from_config(_config(), CLASSES, counts)
    assert chosen["score_thresh"] == {"ash": 0.46, "fir": 0.19, "yew": 0.11, "oak": 0.19}
    assert chosen["ignore_score_thresh"] == {"ash": 0.21, "fir": 0.08, "yew": 0.11, "oak": 0.08}
    assert selection.selection_in_words(_config()) == "a score that as many an image as people drew have"


def test_where_nothing_lies_between_the_thresholds_nothing_is_ignored_or_weighed(trees):
    counts = thresholds_by_counts(trees, PEOPLE, ignore_from=0.9)
    cfg = _config(IGNORE_SCORE_THRESH=0.9, SCORE_WEIGHTED=True)
    chosen = selection_from_config(cfg, CLASSES, counts)
    assert chosen["ignore_score_thresh"] is None and "score_weighted" not in chosen
    assert not load_pseudo_labels(trees, **chosen).ignored_counts.any()


@pytest.mark.parametrize(
    ("keys", "classes", "message"),
    [
        ({"SCORE_THRESH_BY_CLASS": ("ash", 0.3)}, "thing_classes", "so does SELFTRAIN.SCORE_THRESH_BY_CLASS"),
        (
            {"BOXES_PER_IMAGE": 2.0},
            "thing_classes",
            r"so does SELFTRAIN.BOXES_PER_IMAGE 2.0: set that to 0.0",
        ),
        ({"TOP_K": 5}, "thing_classes", "so does SELFTRAIN.TOP_K 5: set that to 0, or THRESHOLDS fixed"),
        ({"SCORE_WEIGHTED": True}, "thing_classes", r"set SELFTRAIN\.IGNORE_SCORE_THRESH .* e\.g\. to 0\.3"),
        ({}, "stuff_classes", "masks, in which no boxes can be counted"),
    ],
)
def test_what_cannot_be_counted(keys, classes, message):
    with pytest.raises(InputError, match=message):
        selection.check_counts(_config(**keys), {classes: CLASSES})
