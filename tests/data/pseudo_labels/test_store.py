import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from selftrain_d2 import InputError, load_pseudo_labels, register_pseudo_labels
from selftrain_d2.data.pseudo_labels import store as pseudo_label_store
from selftrain_d2.data.pseudo_labels.store import PseudoLabelWriter, make_row, read_manifest

IDENTITY = {
    "thing_classes": ["red", "green"],
    "teacher_weights_sha256": "a" * 64,
    "score_floor": 0.05,
    "image_root": "/photos",
}
NAMES = [f"{i:02d}.jpg" for i in range(10)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pseudo_label_store, "SHARD_SIZE", 4)


def _row(name):
    """Image i has i boxes; image 3 cannot be read."""
    i = int(name[:2])
    if i == 3:
        return make_row(name, skipped="OSError: broken")
    rng = np.random.default_rng(i)
    boxes = rng.uniform(0, 50, (i, 4)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return make_row(name, 100, 120, boxes, rng.uniform(0.05, 1, i), rng.integers(0, 2, i))


def _write(folder, shards=None):
    writer = PseudoLabelWriter(folder, IDENTITY, NAMES)
    for shard in writer.missing_shards() if shards is None else shards:
        writer.write_shard(shard, [_row(NAMES[i]) for i in writer.shard_range(shard)])
    return writer


def test_what_is_written_is_read(tmp_path):
    manifest = _write(tmp_path / "labels").finish(date="today")
    dicts = load_pseudo_labels(tmp_path / "labels", 0.05)
    assert [d["image_id"] for d in dicts] == [n for n in NAMES if n != "03.jpg"]
    for d in dicts:
        expected = _row(d["image_id"])
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
    _write(tmp_path).finish()
    for threshold in (0.05, 0.3, 0.7, 1.0):
        kept = [a["score"] for d in load_pseudo_labels(tmp_path, threshold) for a in d["annotations"]]
        everything = np.concatenate([_row(n)["scores"] for n in NAMES if n != "03.jpg"])
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


def test_stopped_writing_goes_on_at_the_missing_shards(tmp_path):
    _write(tmp_path / "undisturbed").finish()
    _write(tmp_path / "stopped", shards=[0, 2])
    with pytest.raises(InputError, match="not finished"):
        load_pseudo_labels(tmp_path / "stopped")
    with PseudoLabelWriter(tmp_path / "stopped", IDENTITY, NAMES) as writer:
        assert writer.missing_shards() == [1] and not writer.finished
    _write(tmp_path / "stopped").finish()
    assert load_pseudo_labels(tmp_path / "stopped", 0.05) == load_pseudo_labels(
        tmp_path / "undisturbed", 0.05
    )


def test_rows_of_another_shard_are_refused(tmp_path):
    writer = PseudoLabelWriter(tmp_path, IDENTITY, NAMES)
    with pytest.raises(ValueError, match="shard 1"):
        writer.write_shard(1, [_row(NAMES[i]) for i in writer.shard_range(0)])
    assert writer.missing_shards() == [0, 1, 2]


def test_other_teacher_or_images_are_refused(tmp_path):
    _write(tmp_path).finish()
    # Both hashes, whole.
    with pytest.raises(InputError, match=r"another teacher_weights_sha256: a{64} there, b{64} now"):
        PseudoLabelWriter(tmp_path, {**IDENTITY, "teacher_weights_sha256": "b" * 64}, NAMES)
    with pytest.raises(InputError, match="another listed: 10 there, 9 now"):
        PseudoLabelWriter(tmp_path, IDENTITY, NAMES[:-1])
    with pytest.raises(InputError, match=r"another file_list_sha256: [0-9a-f]{64} there, [0-9a-f]{64} now"):
        PseudoLabelWriter(tmp_path, IDENTITY, NAMES[::-1])
    PseudoLabelWriter(tmp_path, IDENTITY, NAMES)  # a refused writer does not hold the folder


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        PseudoLabelWriter(tmp_path, IDENTITY, NAMES)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_no_pseudo_labels_there(tmp_path):
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        register_pseudo_labels("pseudo", tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_manifest(tmp_path)


def test_registered_with_threshold_and_moved_images(tmp_path):
    _write(tmp_path).finish()
    register_pseudo_labels("pseudo", tmp_path, score_thresh=0.6, image_root="/elsewhere")
    assert MetadataCatalog.get("pseudo").thing_classes == ["red", "green"]
    dicts = DatasetCatalog.get("pseudo")
    assert dicts[0]["file_name"] == "/elsewhere/00.jpg"
    assert all(a["score"] >= 0.6 for d in dicts for a in d["annotations"])


def test_nothing_is_left_half_written(tmp_path):
    _write(tmp_path).finish()
    assert json.loads((tmp_path / "manifest.json").read_text())["finished"]
    names = sorted(p.name[:13] for p in tmp_path.rglob("*") if p.is_file())
    assert names == [".lock", "manifest.json", "shard-000000-", "shard-000001-", "shard-000002-"]


def test_registered_with_a_selection(tmp_path):
    _write(tmp_path).finish()
    register_pseudo_labels("best", tmp_path, {"red": 0.05, "green": 0.6}, top_k=2)
    for d in DatasetCatalog.get("best"):
        row = _row(d["image_id"])
        reached = row["scores"][row["scores"] >= np.where(row["category_ids"] == 0, 0.05, np.float32(0.6))]
        assert sorted(a["score"] for a in d["annotations"]) == sorted(reached.tolist())[-2:]
    register_pseudo_labels("as many", tmp_path, boxes_per_image=2.0)
    assert DatasetCatalog.get("as many").box_counts.mean() == pytest.approx(2.0)
    # Mistakes are told at once, not when training loads the labels.
    for selection in ({"score_thresh": 0.01}, {"score_thresh": {"red": 0.5}}, {"top_k": 0}):
        with pytest.raises(InputError):
            register_pseudo_labels("wrong", tmp_path, **selection)
    assert "wrong" not in DatasetCatalog
