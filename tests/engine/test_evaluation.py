"""A run's folder serves other programs: with its config.yaml detectron2 itself finds what our evaluation finds."""

import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from conftest import SMALL_MODEL, assert_refused, make_coco_set
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from selftrain_d2 import InputError, add_selftrain_config
from selftrain_d2.cli import main
from selftrain_d2.cli.common import find_config
from selftrain_d2.engine.launch import evaluate
from selftrain_d2.engine.loop.summary import to_markdown
from selftrain_d2.experiments.grid.cell_record import collect_results

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


# ---- several names in DATASETS.TEST ----
@pytest.fixture
def cities(tmp_path):
    """Arguments of `train`: two sets of images, whose ids are 1 to 3 and 101 to 103."""
    words = []
    for number, name in enumerate(("bonn", "oslo")):
        coco = make_coco_set(tmp_path / name, 3, seed=number)
        for key, entries in (("id", coco.content["images"]), ("image_id", coco.content["annotations"])):
            for entry in entries:
                entry[key] += 100 * number
        with open(coco.json_file, "w") as file:
            json.dump(coco.content, file)
        words += ["--human-labels", name, coco.json_file, coco.images]
    keys = ["DATASETS.TRAIN", "('bonn',)", "DATASETS.TEST", "('bonn','oslo')", "SOLVER.MAX_ITER", "2"]
    keys += [
        "MODEL.RETINANET.SCORE_THRESH_TEST",
        "0.0",
        "TEST.EVAL_PERIOD",
        "1",
        "OUTPUT_DIR",
        str(tmp_path / "output"),
    ]
    return ["train", "--config-file", DETECTOR, *words, *SMALL_MODEL, *keys]


def test_every_test_set_is_evaluated_in_a_folder_of_its_own(cities, tmp_path, capsys):
    output = tmp_path / "output"
    assert main([*cities, "SELFTRAIN.WEIGHT_EMA_DECAY", "0.5"]) == 0
    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["bonn", "oslo"]
    logged = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()][-1]
    for number, (name, tasks) in enumerate(results.items()):
        found = output / "inference" / name / "coco_instances_results.json"
        assert {r["image_id"] // 100 for r in json.loads(found.read_text())} == {number}
        truth = COCO(str(tmp_path / name / "labels.json"))
        judge = COCOeval(truth, truth.loadRes(str(found)), "bbox")
        judge.evaluate(), judge.accumulate(), judge.summarize()
        assert tasks["bbox"]["AP"] == pytest.approx(100 * judge.stats[0], abs=1e-6)
        assert logged[f"{name}/bbox/AP"] == tasks["bbox"]["AP"]
    # What reads results.json: a grid's cell, by the names that the curves have.
    metrics, curve = collect_results(output)
    assert (
        metrics["oslo/bbox/AP"] == results["oslo"]["bbox"]["AP"] and None in metrics.values()
    )  # no large boxes
    assert len(curve) == 2 and curve[-1]["oslo/bbox/AP"] == results["oslo"]["bbox"]["AP"]
    assert main(["plot-metrics", str(output)]) == 0

    capsys.readouterr()
    last = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "again")]
    # The average was evaluated, which the checkpoint carries.
    assert main([*cities[:3], "--eval-only", "--weight-average", *cities[3:], *last]) == 0
    for name in results:
        found, same = (
            json.loads((folder / "inference" / name / "coco_instances_results.json").read_text())
            for folder in (output, tmp_path / "again")
        )
        assert found == same and found
    printed = capsys.readouterr()
    assert f"oslo, bbox: AP {results['oslo']['bbox']['AP']:.2f}" in printed.out + printed.err


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        (["DATASETS.TEST", "('oslo','bonn','oslo')"], ["'oslo', 'bonn', 'oslo'", "name each dataset once"]),
        (["TEST.EXPECTED_RESULTS", "[['bbox','AP',38.5,0.2]]"], ["TEST.EXPECTED_RESULTS", "one dataset"]),
    ],
)
@pytest.mark.parametrize("way", [[], ["--dry-run"], ["--eval-only"]])
def test_test_sets_that_cannot_be_told_apart(cities, tmp_path, capsys, keys, fragments, way):
    keys = [*keys, "MODEL.WEIGHTS", "w.pth"] if way == ["--eval-only"] else keys
    assert_refused([*cities[:3], *way, *cities[3:], *keys], capsys, *fragments)
    assert not (tmp_path / "output" / "inference").exists()


def test_a_summary_has_a_row_for_each_test_set():
    one, two = {"mIoU": 10.0, "IoU-road": 10.0}, {"mIoU": 20.0, "IoU-road": None}
    trained = {"steps": 3, "human_images_per_step": 2, "pseudo_images_per_step": 0, "seconds": 60.0}
    stages = {
        "teacher": {**trained, "metrics": {"sem_seg": one}},
        "student": {**trained, "metrics": {"bonn": {"sem_seg": one}, "oslo": {"sem_seg": two}}},
        "control": {**trained, "metrics": {}},
    }
    versions = {"torch": "2", "detectron2": "0.6"}
    summary = {"stages": stages, "task": "segmentation", "seed": 0, "versions": versions}
    page = to_markdown({**summary, "in_words": ["Of no account here."]})
    for row in (
        "| teacher | 10.0 | - | - | 3 | 2 + 0 | 1.0 |",
        "| student on bonn | 10.0 | - | - | 3 | 2 + 0 | 1.0 |",
        "| student on oslo | 20.0 | - | - | 3 | 2 + 0 | 1.0 |",
        "| control | - | - | - | 3 | 2 + 0 | 1.0 |",
        "| class | teacher | student on bonn | student on oslo |",
        "| road | 10.0 | 10.0 | - |",
    ):
        assert row in page.splitlines()


# ---- classes of the weights ----
@pytest.mark.parametrize(
    ("classes", "options", "fragments"),
    [
        (
            ["green", "red"],
            [],
            ["evaluation dataset 'oslo' has other classes than the weights", "in another order"],
        ),
        (["red", "blue"], [], ["'oslo'", "lacking blue and with green"]),
        (
            None,
            ["MODEL.RETINANET.NUM_CLASSES", "3"],
            ["MODEL.RETINANET.NUM_CLASSES is 3", "'oslo' has 2 classes"],
        ),
        (["red", "green"], [], None),
        (None, [], None),
    ],
)
def test_weights_are_evaluated_on_the_classes_that_they_know(
    cities, tmp_path, capsys, classes, options, fragments
):
    weights = tmp_path / "w.pth"
    _random_weights(DETECTOR, [*SMALL_MODEL, *options], weights)
    if classes is not None:
        torch.save({**torch.load(weights), "classes": {"thing_classes": classes}}, weights)
    keys = [*options, "DATASETS.TEST", "('oslo',)", "MODEL.WEIGHTS", str(weights)]
    command = [*cities[:3], "--eval-only", *cities[3:], *keys]
    if fragments is None:
        assert main(command) == 0
    else:
        assert_refused(command, capsys, *fragments)


def test_classes_that_are_known_once_a_dataset_is_read(small_config, cities, tmp_path):
    """Those of detectron2's register_coco_instances."""
    cfg, weights = small_config, tmp_path / "w.pth"
    _random_weights(DETECTOR, SMALL_MODEL, weights)
    torch.save({**torch.load(weights), "classes": {"thing_classes": ["green", "red"]}}, weights)
    register_coco_instances(
        "read_later", {}, str(tmp_path / "oslo/labels.json"), str(tmp_path / "oslo/images")
    )
    cfg.DATASETS.TEST, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = (
        ("read_later",),
        str(weights),
        str(tmp_path / "output"),
    )
    with pytest.raises(InputError, match="'read_later' has other classes than the weights"):
        evaluate(cfg)
