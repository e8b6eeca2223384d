"""What the oracle is trained on, and how rounds are judged: on small folders, without a model."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_coco_set
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from selftrain_d2 import InputError
from selftrain_d2.data.pseudo_labels.masks import PixelLabels
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.data.training_sets import get_pseudo_dicts
from selftrain_d2.engine.launch import registered
from selftrain_d2.engine.loop.oracle import ORACLE, true_labels
from selftrain_d2.engine.loop.tasks import Detection, Segmentation

NAMES = ["003.png", "001.png", "broken.png", "002.png"]


@pytest.fixture
def task(tmp_path):
    unlabeled = make_coco_set(tmp_path / "unlabeled", 3, seed=2)
    content = json.loads(Path(unlabeled.json_file).read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]  # shows no object
    Path(unlabeled.json_file).write_text(json.dumps(content))
    return Detection(
        unlabeled.images,
        unlabeled.images,
        labeled_json=unlabeled.json_file,
        unlabeled_truth_json=unlabeled.json_file,
    )


def _change(task, function):
    content = json.loads(Path(task.unlabeled_truth_json).read_text())
    function(content)
    Path(task.unlabeled_truth_json).write_text(json.dumps(content))


def write_boxes(folder, images, rows):
    identity = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": images}
    with PseudoLabelWriter(folder, identity, [row["file_name"] for row in rows]) as writer:
        writer.write_shard(0, rows)
        writer.finish()


def test_the_images_of_the_pseudo_labels_in_their_order_with_true_boxes(task, tmp_path, small_config):
    wrong = [[1, 1, 9, 9]], [0.9], [0]
    rows = [
        make_row(name, skipped="not an image") if name == "broken.png" else make_row(name, 96, 96, *wrong)
        for name in NAMES
    ]
    write_boxes(tmp_path / "labels", task.unlabeled_images, rows)
    small_config.DATASETS.TRAIN = small_config.DATASETS.PSEUDO_TRAIN = (ORACLE,)
    with registered([true_labels(task, tmp_path / "labels", masks=False)]):
        dicts = get_pseudo_dicts(small_config)
        assert MetadataCatalog.get(ORACLE).thing_classes == ["red", "green"]
    assert ORACLE not in DatasetCatalog
    assert [d["image_id"] for d in dicts] == ["003.png", "001.png", "002.png"]
    assert {d["label_source"] for d in dicts} == {"pseudo"}  # the pseudo labels' part of the loss
    content = json.loads(Path(task.unlabeled_truth_json).read_text())
    for d in dicts:
        true = [a for a in content["annotations"] if f"{a['image_id']:03d}.png" == d["image_id"]]
        assert [a["bbox"] for a in d["annotations"]] == [a["bbox"] for a in true]
        assert [a["category_id"] for a in d["annotations"]] == [a["category_id"] // 10 - 1 for a in true]
    assert [bool(d["annotations"]) for d in dicts] == [True, True, False]


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (lambda content: content["images"].pop(1), "no entry of the unlabeled image"),
        (lambda content: content["images"][1].update(height=97), "has the height 97, but it has 96"),
        (lambda content: [a.update(iscrowd=1) for a in content["annotations"]], "no object for --oracle"),
    ],
)
def test_truth_that_is_none_for_all_images(task, spoil, fragment):
    _change(task, spoil)
    samples = [
        {"file_name": f"{task.unlabeled_images}/{n}", "image_id": n, "height": 96, "width": 96}
        for n in ("001.png", "002.png", "003.png")
    ]
    with pytest.raises(InputError, match=fragment):
        task.truth_of(samples)


def test_a_teacher_that_finds_one_of_two_classes_has_half_the_ap(task, tmp_path):
    _change(task, lambda content: content["annotations"][0].update(category_id=20))
    content = json.loads(Path(task.labeled_json).read_text())
    assert {a["category_id"] for a in content["annotations"]} == {10, 20}
    assert task.labeled_names() == ["001.png", "002.png", "003.png"]

    def folder(name, found):
        rows = []
        for image in content["images"]:
            true = [
                a
                for a in content["annotations"]
                if a["image_id"] == image["id"] and a["category_id"] in found
            ]
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in true)]
            classes = [a["category_id"] // 10 - 1 for a in true]
            rows.append(make_row(image["file_name"], 96, 96, boxes, [0.1] * len(true), classes))
        write_boxes(tmp_path / name, task.labeled_images, rows)
        return tmp_path / name

    assert task.judge_on_labeled(folder("all", {10, 20})) == pytest.approx(100.0)
    assert task.judge_on_labeled(folder("red", {10})) == pytest.approx(50.0)


def test_a_teacher_of_masks_is_judged_on_all_pixels(tmp_path):
    """Truth: two halves. All of one class: IoU 1/2 and 0."""
    for part, value in (
        ("images", 0),
        ("masks", np.repeat(np.uint8([[0, 1]]), 5, axis=1).repeat(10, axis=0)),
    ):
        (tmp_path / part).mkdir()
        Image.fromarray(np.zeros((10, 10), np.uint8) + np.uint8(value)).save(tmp_path / part / "a.png")
    images = str(tmp_path / "images")
    task = Segmentation(images, images, labeled_masks=str(tmp_path / "masks"), classes=("ground", "tree"))
    identity = {"stuff_classes": ["ground", "tree"], "score_floor": 0.05, "image_root": images}
    with PseudoLabelWriter(tmp_path / "labels", identity, task.labeled_names()) as writer:
        pixels = PixelLabels(np.zeros((10, 10), np.uint8), np.full((10, 10), 40, np.uint8))
        writer.write_shard(0, [writer.write_mask("a.png", pixels)])
        writer.finish()
    assert task.judge_on_labeled(tmp_path / "labels") == pytest.approx(25.0)
