"""What is found in a folder of labels: warnings where something is wrong and none where nothing is."""

import json

import numpy as np
import pytest

from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.inspection import inspect as inspection
from selftrain_d2.inspection.box_quality import precision_recall_by_threshold
from selftrain_d2.inspection.checks import find_warnings
from selftrain_d2.inspection.inspect import group_reasons, inspect_labels

SIDE = 200


class Folder:
    """A pseudo-label folder and a COCO file, filled image by image with boxes (corner, side, class, score)."""

    def __init__(self, tmp_path, classes=("ash", "fir")):
        self.path, self.classes, self.rows, self.skipped = tmp_path, list(classes), [], {}
        self.human = {"images": [], "annotations": [], "categories": []}
        self.human["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]

    def pseudo(self, *boxes):
        xyxy = [[x, y, x + side, y + side] for (x, y), side, _, _ in boxes]
        ids, scores = [b[2] for b in boxes], [b[3] for b in boxes]
        self.rows.append(make_row(f"{len(self.rows)}.png", SIDE, SIDE, np.array(xyxy), scores, ids))

    def true(self, *boxes):
        number = len(self.human["images"])
        self.human["images"].append(
            {"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE}
        )
        for (x, y), side, category_id, *_ in boxes:
            box = {"image_id": number, "category_id": category_id + 1, "bbox": [x, y, side, side]}
            self.human["annotations"].append({"id": len(self.human["annotations"]), **box})

    def inspect(self, truth=False, human=False, **options):
        rows = self.rows + [make_row(name, skipped=reason) for name, reason in self.skipped.items()]
        identity = {"thing_classes": self.classes, "score_floor": 0.05, "image_root": "nowhere"}
        writer = PseudoLabelWriter(self.path / "labels", identity, [row["file_name"] for row in rows])
        writer.write_shard(0, rows)
        writer.finish()
        file = self.path / "human.json"
        file.write_text(json.dumps(self.human))
        return inspect_labels(
            self.path / "labels",
            truth_json=file if truth else None,
            human_json=file if human else None,
            **options,
        )


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def places(number, side=10):
    """Corners of boxes that do not touch each other."""
    return [(2 * side * (i % 10), 2 * side * (i // 10)) for i in range(number)]


def fill(folder, images=20, boxes=4):
    """Healthy labels: every true box is found, nearly every pseudo box is right, and scores say so."""
    for _ in range(images):
        found = [(place, 10, i % 2, 0.9) for i, place in enumerate(places(boxes))]
        folder.pseudo(*found)
        folder.true(*found)


def warning(found, *words):
    """The one warning with these words."""
    (text,) = [w for w in find_warnings(found) if all(word in w for word in words)]
    return text


def test_healthy_labels_give_no_warning(folder):
    fill(folder)
    assert find_warnings(folder.inspect(truth=True, human=True)) == []


def test_many_empty_images(folder):
    fill(folder, 8)
    for _ in range(12):
        folder.pseudo(((0, 0), 10, 0, 0.3))
        folder.true(((0, 0), 10, 0))
    found = folder.inspect()
    assert "60% of the images have no box at 0.5." in warning(found, "no box")


def test_empty_images_are_judged_against_those_of_the_human_labels(tmp_path):
    for empty, told in ((True, False), (False, True)):
        folder = Folder(tmp_path / str(empty))
        folder.path.mkdir()
        fill(folder, 10)
        for _ in range(8):
            folder.pseudo()
            folder.true(*([] if empty else [((0, 0), 10, 0)]))
        warnings = find_warnings(folder.inspect(human=True))
        assert any("44% of the images have no box at 0.5, against 0%" in w for w in warnings) == told


def test_no_box_at_all_and_no_image_at_all(tmp_path):
    folder = Folder(tmp_path)
    folder.pseudo(((0, 0), 10, 0, 0.3))
    assert "Not one box" in warning(folder.inspect(), "0.5")
    nothing = Folder(tmp_path / "nothing")
    nothing.path.mkdir()
    nothing.skipped = {"x.png": "broken"}
    assert any("not one labeled image" in w for w in find_warnings(nothing.inspect()))


def test_one_class_takes_all_and_one_is_missing(folder):
    for _ in range(20):
        folder.pseudo(*[(place, 10, 0, 0.9) for place in places(4)])
        folder.true(*[(place, 10, j % 2) for j, place in enumerate(places(4))])
    found = folder.inspect(human=True)
    assert "100% of the boxes are of one class, ash" in warning(found, "one class")
    assert warning(found, "fir is in the human labels but got no pseudo box at 0.5")


def test_one_class_may_take_all_where_it_does_in_the_human_labels(folder):
    for i in range(20):
        boxes = [(place, 10, int(i == 0 and j == 0), 0.9) for j, place in enumerate(places(4))]
        folder.pseudo(*boxes)
        folder.true(*boxes)
    assert find_warnings(folder.inspect(human=True)) == []
    assert any("one class" in w for w in find_warnings(folder.inspect()))


def test_boxes_of_the_whole_image(folder):
    fill(folder)
    for _ in range(10):
        folder.pseudo(((0, 0), 0.98 * SIDE, 0, 0.9))
    assert "11% of the boxes cover nearly the whole image" in warning(folder.inspect(), "whole image")


def test_far_fewer_boxes_than_the_human_labels(folder):
    for _ in range(20):
        folder.pseudo(((0, 0), 10, 0, 0.9), ((50, 50), 10, 1, 0.9))
        folder.true(*[(place, 10, j % 2) for j, place in enumerate(places(8))])
    text = warning(folder.inspect(human=True), "boxes an image")
    assert "2.00 boxes an image, the human labels 8.00: 0.25 times" in text and "too high" in text


@pytest.mark.parametrize(("lowest", "told"), [(0.6, True), (0.1, False)])
def test_the_detectors_limit_matters_where_it_cuts_above_the_threshold(folder, lowest, told):
    for _ in range(20):
        folder.pseudo(*[(place, 10, i % 2, lowest if i else 0.9) for i, place in enumerate(places(25))])
    warnings = [w for w in find_warnings(folder.inspect()) if "TEST.DETECTIONS_PER_IMAGE" in w]
    assert bool(warnings) == told
    if told:
        assert "20 of 20 images have 25 boxes of 0.5 or more" in warnings[0]


def test_scores_that_promise_too_much(folder):
    for _ in range(20):
        boxes = [(place, 10, i % 2, 0.9) for i, place in enumerate(places(4))]
        folder.pseudo(*boxes)
        folder.true(*boxes[:2])
    text = warning(folder.inspect(truth=True), "calibrated")
    assert "80 boxes" in text and "mean score of 0.90, and 50% of them are correct" in text and "0.40" in text


def test_skipped_images_and_unknown_classes(folder):
    fill(folder)
    folder.skipped = {"a.png": "truncated"}
    folder.human["categories"].append({"id": 9, "name": "house"})
    folder.human["annotations"].append({"id": 99, "image_id": 0, "category_id": 9, "bbox": [1, 1, 9, 9]})
    found = folder.inspect(truth=True)
    assert "1 of 21 images (5%)" in warning(found, "skipped")
    assert "1 box of classes that the teacher does not know (house)" in warning(found, "truth")


def test_a_gap_in_the_manifest_is_told(folder):
    fill(folder, 3)
    found = folder.inspect()
    found.manifest["listed"] += 1
    assert "4 images were listed but 3 are accounted for" in warning(found, "accounted")
    assert "could be loaded" in warning(found, "damaged")


# ---- Judged against truth -------------------------------------------------------------------------


def noisy(folder, images=30):
    generator = np.random.default_rng(5)
    for _ in range(images):
        true = [(place, 10, int(generator.integers(2)), 0) for place in places(5)]
        kept = [b for b in true if generator.random() < 0.8]
        moved = [
            ((x + generator.normal(0, 1), y), 10, c, generator.uniform(0.1, 1)) for (x, y), _, c, _ in kept
        ]
        wrong = [((100, y), 10, 1, generator.uniform(0.05, 0.8)) for _, y in places(3)]
        folder.pseudo(*moved, *wrong)
        folder.true(*true)


def test_counts_at_thresholds_are_those_of_the_plain_function(folder):
    noisy(folder)
    found = folder.inspect(truth=True)
    predictions = inspection.load_pseudo_labels(folder.path / "labels", 0.05)
    rows = precision_recall_by_threshold(
        predictions, found.truth.dicts, found.thresholds.tolist(), class_names=found.class_names
    )
    judged = {(row.category, np.float32(row.threshold)): row for row in rows}
    for position, threshold in enumerate(found.thresholds):
        for i, name in enumerate(found.class_names):
            row = judged[name, threshold]
            assert found.judgement.boxes[i, position] == row.boxes
            assert found.judgement.correct[i, position] == row.true_positives
            assert found.judgement.truth[i] == row.truth
    best = max((r for r in rows if r.category is None), key=lambda r: (r.f1 or 0, r.threshold))
    assert np.float32(found.overall.threshold) == np.float32(best.threshold)


def test_matching_in_parts_and_on_a_sample(folder, monkeypatch):
    noisy(folder)
    whole = folder.inspect(truth=True)
    monkeypatch.setattr(inspection, "MATCHED_AT_ONCE", 7)
    parts = inspect_labels(folder.path / "labels", truth_json=folder.path / "human.json")
    assert (whole.judgement.correct == parts.judgement.correct).all()
    assert whole.judgement.average_precision == parts.judgement.average_precision
    monkeypatch.setattr(inspection, "MOST_JUDGED_IMAGES", 10)
    sample = inspect_labels(folder.path / "labels", truth_json=folder.path / "human.json").judgement
    assert (sample.images, sample.images_with_truth, sample.truth.sum()) == (10, 30, 50)


def test_truth_of_some_images_judges_those_and_colours_those(folder):
    noisy(folder, 6)
    folder.human["images"] = folder.human["images"][:2]
    folder.human["annotations"] = [a for a in folder.human["annotations"] if a["image_id"] < 2]
    found = folder.inspect(truth=True)
    assert found.judgement.images == 2 and found.judgement.truth.sum() == 10
    known = {s.record["image_id"]: s.truth is not None for s in found.samples["random"]}
    assert known == {f"{i}.png": i < 2 for i in range(6)}


def test_sampled_images_have_only_the_boxes_that_reach_the_threshold(folder):
    folder.pseudo(((0, 0), 10, 0, 0.7), ((50, 50), 10, 0, 0.69))
    found = folder.inspect(score_thresh=0.7)
    (sample,) = found.samples["most_confident"]
    assert [a["score"] for a in sample.record["annotations"]] == [pytest.approx(0.7)]


def test_reasons_that_differ_in_names_and_numbers_are_one():
    skipped = {
        "a 1.png": "OSError: cannot identify image file '/x/a 1.png'",
        "b.png": "OSError: cannot identify image file '/y/b.png'",
        "c.png": "ValueError: image of 5 bytes",
        "d.png": "OSError: truncated d.png at 17",
        "e.png": "OSError: truncated e.png at 9",
        "f.png": "OSError: truncated f.png at 0",
    }
    groups = group_reasons(skipped, examples=2)
    assert [(g["images"], g["examples"]) for g in groups] == [
        (3, ["d.png", "e.png"]),
        (2, ["a 1.png", "b.png"]),
        (1, ["c.png"]),
    ]
