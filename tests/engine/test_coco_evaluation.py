"""The truth that is evaluated on is the repaired one, whoever registered it; a perfect detector gets AP 100."""

import copy
import json

import pytest
import torch
from conftest import SMALL_MODEL, make_coco_set
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import Boxes, Instances

from selftrain_d2 import InputError, SelfTrainingTrainer
from selftrain_d2.cli import main
from selftrain_d2.data.datasets import register_human_labels
from selftrain_d2.engine.coco_evaluation import RepairedCOCOEvaluator, check_evaluation

CONFIG = "Base-RetinaNet-EfficientNet-FPN.yaml"


class Perfect(torch.nn.Module):
    """Detects the boxes of a COCO file as they are."""

    def __init__(self, content, keypoints=None, masks=False):
        super().__init__()
        self.found = {
            image["id"]: [a for a in content["annotations"] if a["image_id"] == image["id"]]
            for image in content["images"]
        }
        self.keypoints, self.masks = keypoints, masks

    def forward(self, samples):
        return [{"instances": self._instances(sample)} for sample in samples]

    def _instances(self, sample):
        annotations = self.found[sample["image_id"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([a["category_id"] // 10 - 1 for a in annotations])
        instances = Instances(
            (96, 96), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)), pred_classes=classes
        )
        if self.masks:  # those of boxes of whole pixels
            instances.pred_masks = torch.zeros((len(boxes), 96, 96), dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(instances.pred_masks, boxes.int().tolist()):
                mask[y0:y1, x0:x1] = True
        if self.keypoints:  # as a head gives them: the pixels' centres
            points = (
                torch.tensor(self.keypoints, dtype=torch.float32).reshape(1, -1, 3).repeat(len(boxes), 1, 1)
            )
            points[:, :, :2] += 0.5
            instances.pred_keypoints = points
        return instances


REGISTER = {
    "ours": register_human_labels,
    "detectron2's": lambda name, json_file, images: register_coco_instances(name, {}, json_file, images),
}


def _without(*keys):
    def change(annotations):
        for annotation in annotations:
            for key in keys:
                del annotation[key]

    return change


def _ids(ids):
    def change(annotations):
        for annotation, new in zip(annotations, ids):
            annotation["id"] = new

    return change


FAULTS = {
    "ids from 0": _ids(range(99)),
    "one id": _ids([7] * 99),
    "ids as text": _ids("abcdefghijklmnopqrstuvwxyz"),
    "no ids": _without("id"),
    "no area, no iscrowd": _without("area", "iscrowd"),
    "broken polygons": lambda annotations: [a.update(segmentation=[[1, 1]]) for a in annotations],
}


@pytest.mark.parametrize("whose", REGISTER)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_perfect_detector_gets_everything(coco_set, small_config, tmp_path, whose, fault):
    content = copy.deepcopy(coco_set.content)
    FAULTS[fault](content["annotations"])
    with open(coco_set.json_file, "w") as file:
        json.dump(content, file)
    REGISTER[whose]("test", coco_set.json_file, coco_set.images)
    small_config.DATASETS.TEST, small_config.OUTPUT_DIR = ("test",), str(tmp_path / "output")
    results = SelfTrainingTrainer.test(small_config, Perfect(coco_set.content))
    assert results["bbox"]["AP"] == pytest.approx(100) and results["bbox"]["APm"] == pytest.approx(100)


def test_one_box_of_id_0(coco_set, small_config, tmp_path):
    content = {**coco_set.content, "annotations": [{**coco_set.content["annotations"][0], "id": 0}]}
    with open(coco_set.json_file, "w") as file:
        json.dump(content, file)
    register_human_labels("test", coco_set.json_file, coco_set.images)
    small_config.DATASETS.TEST, small_config.OUTPUT_DIR = ("test",), str(tmp_path / "output")
    results = SelfTrainingTrainer.test(small_config, Perfect(content))
    assert results["bbox"]["AP50"] == pytest.approx(100)


def test_numbers_of_a_sound_file_are_those_of_detectron2(coco_set, small_config, tmp_path):
    """Boxes too large by a fifth, so that the numbers are neither 0 nor 100."""
    from detectron2.evaluation import COCOEvaluator, inference_on_dataset

    register_human_labels("test", coco_set.json_file, coco_set.images)
    guess = copy.deepcopy(coco_set.content)
    for annotation in guess["annotations"]:
        annotation["bbox"][2] *= 1.2
    small_config.OUTPUT_DIR = str(tmp_path)
    loader = SelfTrainingTrainer.build_test_loader(small_config, "test")
    ours, theirs = (
        inference_on_dataset(Perfect(guess), loader, evaluator("test", output_dir=str(tmp_path)))
        for evaluator in (RepairedCOCOEvaluator, COCOEvaluator)
    )
    assert 0 < ours["bbox"]["AP"] < 100
    assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=0, nan_ok=True)


def test_masks_are_judged_against_those_that_can_be_read(coco_set, small_config, tmp_path):
    """... and the box without one is out of the truth of boxes too: nobody asks for it."""
    for annotation in coco_set.content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    broken = copy.deepcopy(coco_set.content)
    broken["annotations"][0]["segmentation"] = [[1, 1, 5, 5]]
    with open(coco_set.json_file, "w") as file:
        json.dump(broken, file)
    register_human_labels("test", coco_set.json_file, coco_set.images)
    small_config.MODEL.MASK_ON = True
    small_config.DATASETS.TEST, small_config.OUTPUT_DIR = ("test",), str(tmp_path / "output")
    seen = {**coco_set.content, "annotations": coco_set.content["annotations"][1:]}
    results = SelfTrainingTrainer.test(small_config, Perfect(seen, masks=True))
    assert results["bbox"]["AP"] == pytest.approx(100) and results["segm"]["AP"] == pytest.approx(100)


def test_no_copy_of_an_earlier_dataset_of_that_name_is_evaluated_on(coco_set, small_config, tmp_path):
    """detectron2 keeps ``NAME_coco_format.json`` in the output folder and takes it for the truth of any later run."""
    output = tmp_path / "output"
    small_config.DATASETS.TEST, small_config.OUTPUT_DIR = ("mine",), str(output)
    for seed in (1, 2):
        labels = make_coco_set(tmp_path / str(seed), 3, seed)
        dicts = load_coco_json(labels.json_file, labels.images, f"read {seed}")
        DatasetCatalog.register("mine", lambda dicts=dicts: dicts)
        MetadataCatalog.get("mine").thing_classes = ["red", "green"]
        results = SelfTrainingTrainer.test(small_config, Perfect(labels.content))
        assert results["bbox"]["AP"] == pytest.approx(100)
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")


@pytest.fixture
def two_keypoints(coco_set):
    for category in coco_set.content["categories"]:
        category["keypoints"] = ["head", "foot"]
    for annotation in coco_set.content["annotations"]:
        annotation["keypoints"] = [30, 30, 2, 50, 50, 2]
    with open(coco_set.json_file, "w") as file:
        json.dump(coco_set.content, file)
    return coco_set


def test_keypoints_need_a_sigma_each(two_keypoints, small_config, tmp_path, capsys):
    cfg = small_config
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR, cfg.MODEL.KEYPOINT_ON = ("test",), str(tmp_path / "output"), True
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 2
    register_human_labels("test", two_keypoints.json_file, two_keypoints.images)
    for sigmas in ([], [0.05] * 17):
        cfg.TEST.KEYPOINT_OKS_SIGMAS = sigmas
        with pytest.raises(InputError, match=f"2 keypoints, but TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} "):
            check_evaluation(cfg)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.05, 0.05]
    check_evaluation(cfg)
    results = SelfTrainingTrainer.test(cfg, Perfect(two_keypoints.content, [30, 30, 2, 50, 50, 2]))
    assert results["keypoints"]["AP"] == pytest.approx(100)
    results = SelfTrainingTrainer.test(cfg, Perfect(two_keypoints.content, [40, 30, 2, 60, 50, 2]))
    assert results["keypoints"]["AP"] < 50


def test_what_is_wrong_with_the_truth_is_told_before_training(coco_set, tmp_path, capsys):
    other = make_coco_set(tmp_path / "other", 2, seed=4)
    other.content["annotations"][0]["iscrowd"] = "no"
    with open(other.json_file, "w") as file:
        json.dump(other.content, file)
    register_coco_instances("test", {}, other.json_file, other.images)
    train = ["train", "--config-file", CONFIG, "--human-labels", "human", coco_set.json_file, coco_set.images]
    keys = [*SMALL_MODEL, "DATASETS.TRAIN", "('human',)", "DATASETS.TEST", "('test',)"]
    for words in ([*train, "--dry-run", *keys], [*train, *keys, "OUTPUT_DIR", str(tmp_path / "output")]):
        assert main(words) == 2
        assert "annotations[0] (id 1, image_id 1): its 'iscrowd' is \"no\"" in capsys.readouterr().err
    assert not list(tmp_path.glob("output/*.pth"))
