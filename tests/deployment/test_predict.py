"""Predictions against detectron2's evaluation, and what the files say."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import assert_refused, make_coco_set, small_rcnn_config
from deployment.test_export import run_folder
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from selftrain_d2 import Detector, InputError, SelfTrainingTrainer
from selftrain_d2.cli import main
from selftrain_d2.data.datasets import register_human_labels
from selftrain_d2.data.pseudo_labels.masks import read_mask
from selftrain_d2.deployment.run import run_config


@pytest.fixture
def run(small_config, tmp_path):
    """A detector with random weights that finds something everywhere."""
    small_config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.25
    run = run_folder(small_config, tmp_path / "run")
    file = Path(run, "model_final.pth")
    weights = torch.load(file)
    weights["model"]["head.cls_score.bias"].fill_(-1.0)
    torch.save(weights, file)
    return run


@pytest.fixture
def photos(tmp_path):
    """Images of three shapes, larger and smaller than the network's."""
    coco = make_coco_set(tmp_path / "photos", 6, seed=4, size=120)
    for i, crop in enumerate([(slice(0, 80), slice(None)), (slice(None), slice(0, 64))], start=1):
        file = f"{coco.images}/{i:03d}.png"
        cropped = cv2.imread(file)[crop]
        cv2.imwrite(file, cropped)
        coco.content["images"][i - 1].update(height=cropped.shape[0], width=cropped.shape[1])
    inside = {image["id"]: image for image in coco.content["images"]}
    coco.content["annotations"] = [
        a
        for a in coco.content["annotations"]
        if a["bbox"][0] + a["bbox"][2] <= inside[a["image_id"]]["width"]
        and a["bbox"][1] + a["bbox"][3] <= inside[a["image_id"]]["height"]
    ]
    Path(coco.json_file).write_text(json.dumps(coco.content))
    return coco


CLASSES = ["--classes", "red", "green"]


def test_ap_of_the_file_is_the_evaluators(run, photos, tmp_path):
    output = tmp_path / "out"
    command = ["predict", run, "--images", photos.json_file, "--image-root", photos.images]
    assert main([*command, *CLASSES, "--output", str(output), "--no-pictures"]) == 0
    truth = COCO(photos.json_file)
    judge = COCOeval(truth, truth.loadRes(str(output / "predictions.json")), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()

    cfg = run_config(run)
    register_human_labels("photos", photos.json_file, photos.images)
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("photos",), str(tmp_path / "evaluation")
    model = build_model(cfg)
    model.load_state_dict(torch.load(cfg.MODEL.WEIGHTS)["model"])
    loader = SelfTrainingTrainer.build_test_loader(cfg, "photos")
    evaluator = SelfTrainingTrainer.build_evaluator(cfg, "photos")
    expected = inference_on_dataset(model, loader, evaluator)["bbox"]
    assert expected["AP50"] > 0
    for place, key in enumerate(("AP", "AP50", "AP75")):
        assert 100 * judge.stats[place] == pytest.approx(expected[key], abs=1e-6)


def test_a_coco_file_is_read_once(run, photos, tmp_path, monkeypatch):
    """Ids and images are of one reading; a file of a million images takes a minute to read."""
    reads, loads = [], json.loads

    def counted(text, *args, **options):
        content = loads(text, *args, **options)
        if isinstance(content, dict) and "images" in content:
            reads.append(len(content["images"]))
        return content

    monkeypatch.setattr(json, "loads", counted)
    command = ["predict", run, "--images", photos.json_file, "--image-root", photos.images, *CLASSES]
    assert main([*command, "--output", str(tmp_path / "out"), "--no-pictures"]) == 0
    assert reads == [6]


def test_files_without_ids(run, photos, tmp_path):
    output = tmp_path / "out"
    Path(photos.images, "broken.png").write_bytes(b"no image")
    assert main(["predict", run, *CLASSES, "--output", str(output), "--images", photos.images]) == 0
    entries = json.loads((output / "predictions.json").read_text())
    detector = Detector(run, class_names=["red", "green"])
    names = [f"{i:03d}.png" for i in range(1, 7)]
    found = detector([f"{photos.images}/{name}" for name in names])
    assert [e["file_name"] for e in entries] == [n for n, f in zip(names, found) for _ in range(len(f))]
    assert len(entries) > 50 and all(e["image_id"] == e["file_name"] for e in entries)
    boxes = torch.cat([f.pred_boxes.tensor for f in found]).numpy()
    written = np.array([e["bbox"] for e in entries])
    written[:, 2:] += written[:, :2]
    np.testing.assert_allclose(written, boxes, atol=1e-3)
    classes = torch.cat([f.pred_classes for f in found]).tolist()
    assert [e["category_id"] for e in entries] == [c + 1 for c in classes]
    assert [e["category_name"] for e in entries] == [("red", "green")[c] for c in classes]
    with open(output / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["score"]) for r in rows] == [e["score"] for e in entries]
    np.testing.assert_allclose([float(r["x_max"]) for r in rows], boxes[:, 2], atol=1e-3)
    for name in names:
        picture = Image.open(output / "pictures" / f"{name}.jpg")
        assert picture.size == Image.open(f"{photos.images}/{name}").size
    assert not list(output.rglob("*broken*"))


def test_a_config_and_weights_in_place_of_a_run(run, photos, tmp_path, capsys):
    image, outputs = f"{photos.images}/002.png", [tmp_path / "one", tmp_path / "other"]
    end = ["--images", image, "--no-pictures", *CLASSES, "--output"]
    config = ["predict", "--config-file", f"{run}/config.yaml"]
    assert main(["predict", run, *end, str(outputs[0])]) == 0
    assert main([*config, *end, str(outputs[1]), "MODEL.WEIGHTS", f"{run}/model_final.pth"]) == 0
    one, other = ((output / "predictions.json").read_text() for output in outputs)
    assert one == other and len(json.loads(one)) > 5
    capsys.readouterr()
    assert_refused([*config, *end, str(tmp_path / "out")], capsys, "MODEL.WEIGHTS is empty")


def same(one, other):
    assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
    assert torch.equal(one.scores, other.scores) and torch.equal(one.pred_classes, other.pred_classes)


def test_paths_pictures_and_arrays_are_one(run, photos):
    file = f"{photos.images}/001.png"
    detector = Detector(run, class_names=["red", "green"], batch_size=1)
    expected = detector(file)
    assert len(expected) > 5 and expected.image_size == (80, 120)
    same(detector(Image.open(file)), expected)
    same(detector(np.asarray(Image.open(file))), expected)
    bgr = Detector(run, class_names=["red", "green"], channel_order="BGR")
    same(bgr(cv2.imread(file)), expected)
    assert detector([]) == []
    for wrong in (np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(InputError, match=r"\(H, W, 3\) uint8"):
            detector(wrong)


def test_the_last_student_is_found_with_the_weights_its_config_names(small_config, tmp_path):
    for number, place in enumerate(("student", "round_2/student", "round_10/student")):
        folder = tmp_path / place
        folder.parent.mkdir(exist_ok=True)
        small_config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.1 * number
        folder.mkdir()
        (folder / "config.yaml").write_text(small_config.dump())
        (folder / "model_final.pth").touch()
    cfg = run_config(tmp_path)
    assert pytest.approx(0.2) == cfg.MODEL.RETINANET.SCORE_THRESH_TEST
    assert str(folder / "model_final.pth") == cfg.MODEL.WEIGHTS
    (folder / "weight_average").mkdir()
    (folder / "weight_average" / "model_final.pth").touch()
    small_config.SELFTRAIN.WEIGHT_EMA_DECAY = 0.9
    (folder / "config.yaml").write_text(small_config.dump())
    assert str(folder / "weight_average" / "model_final.pth") == run_config(tmp_path).MODEL.WEIGHTS


def test_segmentor(tmp_path, photos):
    cfg = small_rcnn_config("SelfTrainingSemanticSegmentor", MODEL__BACKBONE__FREEZE_AT=0)
    run = run_folder(cfg, tmp_path / "run")
    output, names = tmp_path / "out", ["sky", "tree", "car"]
    image = f"{photos.images}/001.png"
    assert main(["predict", run, "--images", image, "--classes", *names, "--output", str(output)]) == 0
    (mask,) = (output / "masks").rglob("*.png")
    classes = read_mask(mask).classes
    assert classes.shape == (80, 120)
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(run_config(run).MODEL.WEIGHTS)["model"])
    cfg.DATASETS.TEST = ()
    from selftrain_d2 import SelfTrainingDatasetMapper

    sample = SelfTrainingDatasetMapper(cfg, is_train=False)({"file_name": image, "height": 80, "width": 120})
    with torch.no_grad():
        expected = model([sample])[0]["sem_seg"].argmax(0).numpy()
    assert (classes == expected).mean() > 0.999
    with open(output / "predictions.csv", newline="") as file:
        pixels = {row["category"]: int(row["pixels"]) for row in csv.DictReader(file)}
    assert pixels == {name: n for i, name in enumerate(names) if (n := int((classes == i).sum()))}
    assert len(list((output / "pictures").rglob("*.jpg"))) == 1


def test_video(run, tmp_path):
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (96, 64))
    for level in range(5):
        writer.write(np.full((64, 96, 3), 40 * level, np.uint8))
    writer.release()
    output = tmp_path / "out"
    command = ["predict", run, "--images", str(path), *CLASSES, "--batch-size", "2", "--output"]
    assert main([*command, str(output)]) == 0
    capture = cv2.VideoCapture(str(output / "clip.mp4"))
    frames = []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame)
    assert len(frames) == 5 and frames[0].shape == (64, 96, 3)
    names = {e["file_name"] for e in json.loads((output / "predictions.json").read_text())}
    assert names == {f"clip.mp4#{i}" for i in range(5)}


def test_mistakes(run, photos, tmp_path, capsys):
    output = tmp_path / "out"
    start = ["predict", run, *CLASSES, "--output", str(output), "--images"]
    assert_refused([*start, str(tmp_path / "lost.mp4")], capsys, "lost.mp4 does not exist", output=output)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert_refused([*start, str(tmp_path / "bad.mp4")], capsys, "OpenCV", output=output)
    inside = ["predict", run, *CLASSES, "--output", f"{photos.images}/out", "--images", photos.images]
    assert_refused(inside, capsys, "lies in the image folder")
    assert_refused(
        ["predict", str(tmp_path), "--images", photos.images, "--output", str(output)],
        capsys,
        "no config.yaml",
    )
    lost = [*start, str(tmp_path / "lost")]
    assert_refused(lost, capsys, f"--images {tmp_path / 'lost'} does not exist", output=output)
    rooted = [*start, photos.images, "--image-root", str(tmp_path)]
    assert_refused(rooted, capsys, "--image-root goes with lists", output=output)
    both = [*start, photos.images, "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml"]
    assert_refused(both, capsys, "either the folder of a run or --config-file", output=output)
