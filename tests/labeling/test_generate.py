import os

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from conftest import make_coco_set, small_rcnn_config
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from selftrain_d2 import InputError, SelfTrainingDatasetMapper, generate_pseudo_labels, load_pseudo_labels
from selftrain_d2.data.datasets import list_images
from selftrain_d2.data.mapper import read_image
from selftrain_d2.data.pseudo_labels import writer as pseudo_label_writer
from selftrain_d2.data.pseudo_labels.manifest import read_manifest


@pytest.fixture
def teacher(small_config, tmp_path):
    """Config of a detector with random weights, which finds something everywhere."""
    torch.manual_seed(0)
    file = tmp_path / "teacher.pth"
    model = build_model(small_config)
    # Lift the background's prior, so that scores vary.
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
    torch.nn.init.constant_(model.head.cls_score.bias, -1.0)
    torch.save({"model": model.state_dict(), "classes": {"thing_classes": ["red", "green"]}}, file)
    small_config.MODEL.WEIGHTS = str(file)
    return small_config


@pytest.fixture
def photos(tmp_path):
    folder = make_coco_set(tmp_path / "photos", 9, seed=4).images
    cv2.imwrite(os.path.join(folder, "wide.jpg"), np.full((40, 150, 3), 90, np.uint8))
    os.makedirs(os.path.join(folder, "deep"))
    cv2.imwrite(os.path.join(folder, "deep", "grey.png"), np.full((33, 20), 90, np.uint8))
    cv2.imwrite(os.path.join(folder, "one_pixel.png"), np.zeros((1, 1, 3), np.uint8))
    with open(os.path.join(folder, "broken.jpg"), "wb") as file:
        file.write(b"\xff\xd8 no picture")
    with open(os.path.join(folder, "wide.jpg"), "rb") as file:
        whole = file.read()
    with open(os.path.join(folder, "truncated.jpg"), "wb") as file:
        file.write(whole[: len(whole) // 2])
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pseudo_label_writer, "SHARD_SIZE", 4)


def _generate(teacher, photos, output, **arguments):
    return generate_pseudo_labels(teacher, photos, list_images(photos), output, **arguments)


def test_every_listed_image_is_accounted_for(teacher, photos, tmp_path):
    manifest = _generate(teacher, photos, tmp_path / "labels")
    assert set(manifest["skipped"]) == {"broken.jpg", "truncated.jpg"}
    assert manifest["listed"] == 14
    assert manifest["labeled"] + manifest["empty"] + len(manifest["skipped"]) == manifest["listed"]
    dicts = load_pseudo_labels(tmp_path / "labels", 0.05)
    assert {d["image_id"] for d in dicts} == set(list_images(photos)) - set(manifest["skipped"])
    for d in dicts:
        assert cv2.imread(d["file_name"]).shape[:2] == (d["height"], d["width"])
        for a in d["annotations"]:
            x0, y0, x1, y1 = a["bbox"]
            assert 0 <= x0 <= x1 <= d["width"] and 0 <= y0 <= y1 <= d["height"]
            assert 0.05 <= a["score"] <= 1 and a["category_id"] in (0, 1)
    assert sum(len(d["annotations"]) for d in dicts) == manifest["boxes"] > 20


def _rows(dataset_dict):
    """(N, 6): box, score, class."""
    return np.array([[*a["bbox"], a["score"], a["category_id"]] for a in dataset_dict["annotations"]])


def _assert_same_boxes(one, other):
    """The same boxes, in any order: nearly equal scores may change places."""
    assert len(one) == len(other) > 0
    differences = np.abs(one[:, None] - other) / [1e-2, 1e-2, 1e-2, 1e-2, 1e-4, 0.5]
    close = (differences < 1).all(axis=2)
    assert close.any(axis=0).all() and close.any(axis=1).all()


def test_boxes_are_those_of_the_model(teacher, photos, tmp_path):
    """The plain way: one image at a time, resized by hand to the test size, through the model."""
    _generate(teacher, photos, tmp_path / "labels", batch_size=3)
    model = build_model(teacher).eval()
    model.load_state_dict(torch.load(teacher.MODEL.WEIGHTS)["model"])
    for d in load_pseudo_labels(tmp_path / "labels", 0.05):
        if d["height"] != 96:  # 96 x 96 needs no resizing
            continue
        image = torch.as_tensor(cv2.imread(d["file_name"])[:, :, ::-1].transpose(2, 0, 1).copy())
        with torch.no_grad():
            expected = model([{"image": image, "height": 96, "width": 96}])[0]["instances"]
        rows = [
            [*b, s, c] for b, s, c in zip(expected.pred_boxes.tensor, expected.scores, expected.pred_classes)
        ]
        _assert_same_boxes(_rows(d), np.array(rows, dtype=float))


def test_batch_size_changes_nothing(teacher, photos, tmp_path):
    for batch_size in (1, 5):
        _generate(teacher, photos, tmp_path / f"labels{batch_size}", batch_size=batch_size)
    one, five = (load_pseudo_labels(tmp_path / f"labels{n}", 0.05) for n in (1, 5))
    for a, b in zip(one, five):
        assert a["image_id"] == b["image_id"] and len(a["annotations"]) == len(b["annotations"])
        _assert_same_boxes(_rows(a), _rows(b))


def test_stopped_and_started_again(teacher, photos, tmp_path, monkeypatch):
    """Stopped after each shard in turn: the result is that of an undisturbed run."""
    _generate(teacher, photos, tmp_path / "undisturbed")
    write, written = pseudo_label_writer.PseudoLabelWriter.write_shard, []

    def write_one_then_stop(self, shard, rows):
        write(self, shard, rows)
        written.append(shard)
        raise KeyboardInterrupt

    monkeypatch.setattr(pseudo_label_writer.PseudoLabelWriter, "write_shard", write_one_then_stop)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            _generate(teacher, photos, tmp_path / "stopped")
    with pytest.raises(InputError, match="not finished"):
        read_manifest(tmp_path / "stopped")
    _generate(teacher, photos, tmp_path / "stopped")
    assert written == [0, 1, 2, 3]  # nothing was labeled twice
    assert load_pseudo_labels(tmp_path / "stopped", 0.05) == load_pseudo_labels(
        tmp_path / "undisturbed", 0.05
    )


def test_only_a_lost_shard_is_labeled_again(teacher, photos, tmp_path):
    _generate(teacher, photos, tmp_path / "labels")
    before = load_pseudo_labels(tmp_path / "labels", 0.05)
    shards = sorted((tmp_path / "labels" / "shards").iterdir())
    shards[1].unlink()
    times = [s.stat().st_mtime_ns for s in shards if s.exists()]
    _generate(teacher, photos, tmp_path / "labels")
    assert load_pseudo_labels(tmp_path / "labels", 0.05) == before
    assert times == [s.stat().st_mtime_ns for i, s in enumerate(shards) if i != 1]


def test_other_teacher_config_or_floor_is_refused(teacher, photos, tmp_path):
    _generate(teacher, photos, tmp_path / "labels")
    with pytest.raises(InputError, match=r"another score_floor: 0\.05 there, 0\.1 now"):
        _generate(teacher, photos, tmp_path / "labels", score_floor=0.1)
    other = teacher.clone()
    other.INPUT.AUGMENTATION.IMAGE_SIZE = 64
    with pytest.raises(InputError, match="another teacher_config_sha256"):
        _generate(other, photos, tmp_path / "labels")


def test_classes_come_with_the_weights_or_must_be_given(teacher, photos, tmp_path):
    state = torch.load(teacher.MODEL.WEIGHTS)
    del state["classes"]
    torch.save(state, teacher.MODEL.WEIGHTS)
    with pytest.raises(InputError, match="--classes"):
        _generate(teacher, photos, tmp_path / "labels")
    manifest = _generate(teacher, photos, tmp_path / "labels", thing_classes=["a", "b"])
    assert manifest["thing_classes"] == ["a", "b"]


def test_a_config_of_other_classes_than_the_teacher_is_refused(teacher, photos, tmp_path):
    """The head would keep its initial values, and every image would be empty."""
    with pytest.raises(InputError, match=r"--classes has other classes than .*\[a, b, c\] \(3\) against"):
        _generate(teacher, photos, tmp_path / "labels", thing_classes=["a", "b", "c"])
    teacher.MODEL.RETINANET.NUM_CLASSES = 3
    with pytest.raises(InputError, match=r"head\.cls_score.*NUM_CLASSES"):
        _generate(teacher, photos, tmp_path / "labels", thing_classes=["a", "b", "c"])
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("carried", "given", "message"),
    [
        (["red", "green"], ["green", "red"], "--classes has other classes than .*in another order"),
        (
            ["red", "green"],
            ["red", "grass"],
            "--classes has other classes than .*lacking green and with grass",
        ),
        (["red", "green"], ["red", "red"], "--classes names red twice"),
        (None, ["red", "red"], "--classes names red twice"),
        (None, ["red", "green", "blue"], r"--classes has 3 classes, but MODEL\.RETINANET\.NUM_CLASSES is 2"),
        (None, None, "DATASETS.TRAIN 'one' has 1 classes, but MODEL.RETINANET.NUM_CLASSES is 2"),
        (["red", "green"], ["red", "green"], None),
        (["red", "green"], None, None),
        (None, ["red", "green"], None),
        ("another program's", ["red", "green"], None),
    ],
)
def test_classes_given_must_be_those_that_the_teacher_knows(
    teacher, photos, tmp_path, carried, given, message
):
    state = torch.load(teacher.MODEL.WEIGHTS)
    state["classes"] = {"thing_classes": carried} if carried is None or isinstance(carried, list) else carried
    torch.save(state, teacher.MODEL.WEIGHTS)
    MetadataCatalog.get("one").thing_classes = ["red"]
    teacher.DATASETS.TRAIN = ("one",)
    arguments = (teacher, photos, ["001.png"], tmp_path / "labels")
    if message is None:
        manifest = generate_pseudo_labels(*arguments, thing_classes=given)
        assert manifest["thing_classes"] == ["red", "green"]
    else:
        with pytest.raises(InputError, match=message):
            generate_pseudo_labels(*arguments, thing_classes=given)
        assert not (tmp_path / "labels").exists()
    MetadataCatalog.remove("one")


@pytest.mark.parametrize("arguments", [{"score_floor": 1.0}, {"score_floor": -0.1}, {"batch_size": 0}])
def test_impossible_arguments(teacher, photos, tmp_path, arguments):
    with pytest.raises(InputError):
        _generate(teacher, photos, tmp_path / "labels", **arguments)


def test_an_image_listed_twice_is_refused_before_any_work(teacher, photos, tmp_path):
    with pytest.raises(InputError, match=r"names 001\.png twice"):
        generate_pseudo_labels(teacher, photos, ["001.png", "002.png", "001.png"], tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_all_images_skipped(teacher, photos, tmp_path):
    manifest = generate_pseudo_labels(teacher, photos, ["broken.jpg", "lost.jpg"], tmp_path / "labels")
    assert set(manifest["skipped"]) == {"broken.jpg", "lost.jpg"}
    assert manifest["labeled"] == manifest["empty"] == manifest["boxes"] == 0


def test_masks_of_a_mask_rcnn_teacher_train_a_student(photos, tmp_path):
    """Teacher's masks, stored and loaded, are its masks; a Mask R-CNN student takes a step on them."""
    cfg = small_rcnn_config("GeneralizedRCNN", MODEL__MASK_ON="True", INPUT__AUGMENTATION__IMAGE_SIZE="96")
    torch.manual_seed(1)
    teacher = build_model(cfg).eval()
    cfg.MODEL.WEIGHTS = str(tmp_path / "mask_rcnn.pth")
    torch.save({"model": teacher.state_dict()}, cfg.MODEL.WEIGHTS)
    _generate(cfg, photos, tmp_path / "labels", thing_classes=["red", "green"])
    dicts = load_pseudo_labels(tmp_path / "labels", 0.05)
    assert sum(len(d["annotations"]) for d in dicts) > 10

    shown = next(d for d in dicts if d["height"] == 96 and d["annotations"])
    teacher.roi_heads.box_predictor.test_score_thresh = 0.05
    image = torch.as_tensor(read_image(shown["file_name"], cfg.INPUT.FORMAT).transpose(2, 0, 1).copy())
    with torch.no_grad():
        expected = teacher([{"image": image, "height": 96, "width": 96}])[0]["instances"].pred_masks.numpy()
    masks = [mask_util.decode(a["segmentation"]) for a in shown["annotations"]]
    # Random weights give masks of 0.5 everywhere: rounding may tip single pixels.
    assert np.stack(masks).shape == expected.shape and expected.any()
    assert (np.stack(masks) != expected).mean() < 1e-3

    cfg.INPUT.MASK_FORMAT = "bitmask"
    mapper = SelfTrainingDatasetMapper(cfg, is_train=True)
    cfg.MODEL.META_ARCHITECTURE = "SelfTrainingGeneralizedRCNN"
    student = build_model(cfg).train()
    with EventStorage():
        losses = student([mapper({**shown, "label_source": source}) for source in ("human", "pseudo")])
    assert "loss_mask_pseudo" in losses
    sum(losses.values()).backward()
