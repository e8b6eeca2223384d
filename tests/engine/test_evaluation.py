"""A run's folder serves other programs: with its config.yaml detectron2 itself finds what our evaluation finds."""

import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from conftest import SMALL_MODEL, make_coco_set
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

from selftrain_d2 import add_selftrain_config
from selftrain_d2.cli import main
from selftrain_d2.cli.common import find_config

#: (height, width): square, wide, tall, small, a side that is rounded, a strip.
SIZES = ((96, 96), (90, 200), (180, 70), (30, 41), (61, 97), (3, 120))
DETECTOR, SEGMENTOR = "Base-RetinaNet-EfficientNet-FPN.yaml", "Base-Segmentor-EfficientNet-NASFPN.yaml"


@pytest.fixture
def photos(tmp_path):
    """A COCO set of images of SIZES, each of them in noise: what resizing does to pixels shows."""
    coco = make_coco_set(tmp_path / "photos", len(SIZES), seed=2, size=200)
    rng = np.random.default_rng(0)
    for image, (height, width) in zip(coco.content["images"], SIZES):
        image.update(height=height, width=width)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        cv2.imwrite(f"{coco.images}/{image['file_name']}", pixels)
    for annotation in coco.content["annotations"]:
        annotation["bbox"], annotation["area"] = [0, 0, 3, 3], 9
    with open(coco.json_file, "w") as file:
        json.dump(coco.content, file)
    return coco


def _random_weights(config, options, file):
    """Weights of a model that finds something everywhere."""
    cfg = _config(find_config(config), options)
    torch.manual_seed(0)
    model = build_model(cfg)
    last = model.head.cls_score if hasattr(model, "head") else model.sem_seg_head.predictor
    torch.nn.init.normal_(last.weight, std=0.3)
    torch.nn.init.constant_(last.bias, -1.0)
    torch.save({"model": model.state_dict()}, file)


def _config(file, options=()):
    """What a program has that knows detectron2 and our keys."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.merge_from_file(str(file))
    cfg.merge_from_list(list(options))
    return cfg


@pytest.mark.parametrize("image_size", [64, 160])
def test_detectron2s_predictor_finds_the_boxes_of_our_evaluation(photos, tmp_path, image_size):
    weights, output = tmp_path / "w.pth", tmp_path / "output"
    options = [*SMALL_MODEL, "INPUT.AUGMENTATION.IMAGE_SIZE", str(image_size)]
    _random_weights(DETECTOR, options, weights)
    words = ["--human-labels", "photos", photos.json_file, photos.images, "--eval-only", *options]
    words += ["DATASETS.TEST", "('photos',)", "MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(output)]
    assert main(["train", "--config-file", DETECTOR, *words]) == 0
    ours = json.loads((output / "inference" / "coco_instances_results.json").read_text())

    predictor = DefaultPredictor(_config(output / "config.yaml"))
    for image in photos.content["images"]:
        found = predictor(cv2.imread(f"{photos.images}/{image['file_name']}"))["instances"]
        expected = [r for r in ours if r["image_id"] == image["id"]]
        assert len(found) == len(expected) > 0
        left, top, width, height = np.array([r["bbox"] for r in expected], np.float32).T
        boxes = np.stack([left, top, left + width, top + height], axis=1)
        np.testing.assert_allclose(found.pred_boxes.tensor.numpy(), boxes, rtol=0, atol=1e-4)
        assert found.scores.tolist() == [r["score"] for r in expected]
        assert [10 * (c + 1) for c in found.pred_classes.tolist()] == [r["category_id"] for r in expected]


def test_and_the_classes_of_pixels(photos, tmp_path):
    weights, output = tmp_path / "w.pth", tmp_path / "output"
    options = [
        *SMALL_MODEL, "MODEL.NAS_FPN.REPEATS", "1", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "MODEL.SEM_SEG_HEAD.NUM_CONVS", "1", "MODEL.FPN.NORM", "BN",
        "MODEL.SEM_SEG_HEAD.NORM", "BN", "INPUT.AUGMENTATION.IMAGE_SIZE", "64",
    ]  # fmt: skip
    _random_weights(SEGMENTOR, options, weights)
    (tmp_path / "masks").mkdir()
    for image in photos.content["images"]:
        mask = np.arange(image["width"], dtype=np.uint8)[None].repeat(image["height"], axis=0) % 3
        Image.fromarray(mask).save(tmp_path / "masks" / image["file_name"])
    words = ["--human-masks", "pixels", photos.images, str(tmp_path / "masks"), "--classes", "a", "b", "c"]
    words += ["--eval-only", *options, "DATASETS.TEST", "('pixels',)", "MODEL.WEIGHTS", str(weights)]
    assert main(["train", "--config-file", SEGMENTOR, *words, "OUTPUT_DIR", str(output)]) == 0
    ours = json.loads((output / "inference" / "sem_seg_predictions.json").read_text())

    predictor = DefaultPredictor(_config(output / "config.yaml"))
    for image in photos.content["images"]:
        file = f"{photos.images}/{image['file_name']}"
        found = predictor(cv2.imread(file))["sem_seg"].argmax(dim=0).numpy()
        assert len(np.unique(found)) > 1 or found.size < 500
        for row in (r for r in ours if r["file_name"] == file):
            np.testing.assert_array_equal(
                mask_util.decode(row["segmentation"]) == 1, found == row["category_id"]
            )
