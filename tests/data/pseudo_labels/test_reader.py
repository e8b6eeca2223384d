import numpy as np
import pyarrow as pa
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from numbered_images import IDENTITY, NAMES, numbered_row, write_numbered

from selftrain_d2 import InputError, load_pseudo_labels, register_pseudo_labels
from selftrain_d2.data.pseudo_labels import writer as pseudo_label_writer
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.pseudo_labels.shards import SCHEMA, make_row, write_shard
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pseudo_label_writer, "SHARD_SIZE", 4)


def test_what_is_written_is_read(tmp_path):
    manifest = write_numbered(tmp_path / "labels").finish(date="today")
    dicts = load_pseudo_labels(tmp_path / "labels", 0.05)
    assert [d["image_id"] for d in dicts] == [n for n in NAMES if n != "03.jpg"]
    for d in dicts:
        expected = numbered_row(d["image_id"])
        assert d["file_name"] == f"/photos/{d['image_id']}" and d["label_source"] == "pseudo"
        assert (d["height"], d["width"]) == (100, 120)
        boxes = np.array([a["bbox"] for a in d["annotations"]]).reshape(-1)
        np.testing.assert_array_equal(boxes, expected["boxes"])
        assert [a["category_id"] for a in d["annotations"]] == list(expected["category_ids"])
        assert all(a["bbox_mode"] == BoxMode.XYXY_ABS for a in d["annotations"])
    assert manifest["skipped"] == {"03.jpg": "OSError: broken"}
    assert manifest["labeled"] + manifest["empty"] + len(manifest["skipped"]) == manifest["listed"] == 10
    assert manifest["boxes"] == sum(range(10)) - 3 and manifest["empty"] == 1


def test_the_threshold_applies_at_load(tmp_path):
    write_numbered(tmp_path).finish()
    for threshold in (0.05, 0.3, 0.7, 1.0):
        kept = [a["score"] for d in load_pseudo_labels(tmp_path, threshold) for a in d["annotations"]]
        everything = np.concatenate([numbered_row(n)["scores"] for n in NAMES if n != "03.jpg"])
        assert sorted(kept) == sorted(everything[everything >= np.float32(threshold)].tolist())
        # Images that lose all their boxes stay.
        assert len(load_pseudo_labels(tmp_path, threshold)) == 9
    with pytest.raises(InputError, match=r"0\.01 is outside \[0\.05, 1\]"):
        load_pseudo_labels(tmp_path, 0.01)


def test_a_score_at_the_threshold_stays(tmp_path):
    """0.7 is not a float32; the box written with it must not be lost by rounding."""
    writer = PseudoLabelWriter(tmp_path, IDENTITY, ["a.jpg"])
    writer.write_shard(0, [make_row("a.jpg", 9, 9, [[0, 0, 5, 5]], [0.7], [0])])
    writer.finish()
    assert len(load_pseudo_labels(tmp_path, 0.7)[0]["annotations"]) == 1


def _localized(folder):
    """Three boxes of one image, the best one in a doubtful place; and an image without any."""
    writer = PseudoLabelWriter(folder, IDENTITY, ["a.jpg", "b.jpg"])
    boxes = [[0, 0, 5, 5], [1, 1, 6, 6], [2, 2, 7, 7]]
    scores, localization = [0.9, 0.8, 0.3], [0.4, 0.7, 1.0]
    rows = make_row("a.jpg", 9, 9, boxes, scores, [0, 0, 1], localization_scores=localization)
    return writer, [rows, make_row("b.jpg", 9, 9)]


def _scores(folder, *arguments, **selection):
    found = load_pseudo_labels(folder, *arguments, **selection)[0]["annotations"]
    return [(pytest.approx(a["score"]), a.get("iscrowd", 0)) for a in found]


def test_a_second_threshold_on_the_place(tmp_path):
    writer, rows = _localized(tmp_path)
    writer.write_shard(0, rows)
    writer.finish(views=2)
    assert _scores(tmp_path, 0.5) == [(0.9, 0), (0.8, 0)]
    assert _scores(tmp_path, 0.5, localization_thresh=0.7) == [(0.8, 0)]  # a score at the threshold stays
    # The best of those that reach it; what is left over is ignored if anything is, whatever its score.
    assert _scores(tmp_path, 0.05, localization_thresh=0.7, top_k=1) == [(0.8, 0)]
    ignoring = {"localization_thresh": 0.7, "ignore_score_thresh": 0.5}
    assert _scores(tmp_path, 0.5, **ignoring) == [(0.8, 0), (0.9, 1)]
    assert _scores(tmp_path, localization_thresh=0.5, boxes_per_image=0.5) == [(0.8, 0)]


def test_folders_from_before_localization_scores(tmp_path):
    """Their shards have no such column; a folder that was gone on with may have some of both."""
    writer, rows = _localized(tmp_path)
    write_shard(
        tmp_path / "shards", 0, pa.Table.from_pylist(rows, SCHEMA).drop_columns("localization_scores")
    )
    writer.finish(views=2)
    assert _scores(tmp_path, 0.5) == [(0.9, 0), (0.8, 0)]
    assert _scores(tmp_path, boxes_per_image=0.5) == [(0.9, 0)]
    with pytest.raises(InputError, match="have no localization scores or lack some"):
        load_pseudo_labels(tmp_path, 0.5, localization_thresh=0.7)


def test_no_pseudo_labels_there(tmp_path):
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        register_pseudo_labels("pseudo", tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_manifest(tmp_path)


def test_registered_with_threshold_and_moved_images(tmp_path):
    write_numbered(tmp_path).finish()
    register_pseudo_labels("pseudo", tmp_path, score_thresh=0.6, image_root="/elsewhere")
    assert MetadataCatalog.get("pseudo").thing_classes == ["red", "green"]
    dicts = DatasetCatalog.get("pseudo")
    assert dicts[0]["file_name"] == "/elsewhere/00.jpg"
    assert all(a["score"] >= 0.6 for d in dicts for a in d["annotations"])


def test_registered_with_a_selection(tmp_path):
    write_numbered(tmp_path).finish()
    register_pseudo_labels("best", tmp_path, {"red": 0.05, "green": 0.6}, top_k=2)
    for d in DatasetCatalog.get("best"):
        row = numbered_row(d["image_id"])
        reached = row["scores"][row["scores"] >= np.where(row["category_ids"] == 0, 0.05, np.float32(0.6))]
        assert sorted(a["score"] for a in d["annotations"]) == sorted(reached.tolist())[-2:]
    register_pseudo_labels("as many", tmp_path, boxes_per_image=2.0)
    assert DatasetCatalog.get("as many").box_counts.mean() == pytest.approx(2.0)
    # Mistakes are told at once, not when training loads the labels.
    for selection in ({"score_thresh": 0.01}, {"score_thresh": {"red": 0.5}}, {"top_k": 0}):
        with pytest.raises(InputError):
            register_pseudo_labels("wrong", tmp_path, **selection)
    assert "wrong" not in DatasetCatalog
