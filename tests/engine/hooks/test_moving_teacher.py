"""Labels made in the training step are those that the same weights write to disk."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import make_coco_set, small_rcnn_config
from detectron2.modeling import build_model
from detectron2.structures import BoxMode

from selftrain_d2 import (
    InputError,
    SelfTrainingTrainer,
    generate_pseudo_labels,
    load_pseudo_labels,
    register_image_folder,
    register_pseudo_labels,
)
from selftrain_d2.data.datasets import register_human_labels
from selftrain_d2.data.loader import build_selftrain_train_loader
from selftrain_d2.data.pseudo_labels.shards import (
    flat_values,
    list_shards,
    localization_scores,
    make_row,
    read_shards,
)
from selftrain_d2.data.segmentation_datasets import register_segmentation_folder
from selftrain_d2.data.training_sets import get_human_dicts
from selftrain_d2.data.unlabeled_mapper import UnlabeledImageMapper
from selftrain_d2.engine.checks import check_training
from selftrain_d2.engine.hooks.moving_teacher import step_selection
from selftrain_d2.engine.hooks.teacher_check import TeacherCheck

NAMES = [f"{i:03d}.png" for i in range(1, 7)]


@pytest.fixture
def images(tmp_path, coco_set):
    content = json.loads(Path(coco_set.json_file).read_text())
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    Path(coco_set.json_file).write_text(json.dumps(content))
    register_human_labels("human", coco_set.json_file, coco_set.images)
    unlabeled = make_coco_set(tmp_path / "unlabeled", len(NAMES), seed=5)
    register_image_folder("plain", unlabeled.images)
    return unlabeled.images


def _student(cfg, tmp_path, classes=("red", "green"), **keys):
    """A student of a teacher with random weights, whose scores are spread."""
    cfg.DATASETS.TRAIN, cfg.DATASETS.PSEUDO_TRAIN, cfg.DATASETS.TEST = ("human",), ("plain",), ()
    cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.PSEUDO_IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
    cfg.SELFTRAIN.TEACHER = "moving_average"
    cfg.SEED = 3
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.AUGMENTATION.IMAGE_SIZE = 96
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "predictor.cls_score" in name:
                parameter.mul_(0.03)  # else all scores are 0 or 1
            else:
                parameter.add_(0.02 * torch.randn_like(parameter))
    cfg.MODEL.WEIGHTS = str(tmp_path / "teacher.pth")
    torch.save({"model": model.state_dict(), "classes": {"thing_classes": list(classes)}}, cfg.MODEL.WEIGHTS)
    return cfg


def _label(cfg, images, tmp_path):
    """Label the images on disk; a score that about a third of the boxes reach, and one that two thirds reach.

    Each where no box is near, which could fall on either side.
    """
    generate_pseudo_labels(cfg, images, NAMES, tmp_path / "labels", score_floor=0.001, batch_size=1)
    dicts = load_pseudo_labels(tmp_path / "labels", 0.001)
    scores = np.sort([a["score"] for a in _boxes(dicts)])
    assert len(scores) > 50
    places = [slice(part * len(scores) // 6, (part + 1) * len(scores) // 6) for part in (4, 2)]
    gaps = [scores[place][i : i + 2] for place in places for i in [np.diff(scores[place]).argmax()]]
    return [float(gap.mean()) for gap in gaps]


def _boxes(dicts):
    return [a for d in dicts for a in d["annotations"]]


def _close(one, two):
    """But for how the network rounds in another batch."""
    if one.dtype == torch.bool:
        assert one.shape == two.shape and (one != two).sum() <= 1e-3 * one.numel()
    else:
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3)


def _same(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        if key == "instances":
            assert value.image_size == two[key].image_size
            for name, field in value.get_fields().items():
                tensors = [getattr(f, "tensor", f) for f in (field, two[key].get(name))]
                _close(*tensors)
        elif key == "ignored_boxes":
            _close(value.tensor, two[key].tensor)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, two[key]), key
        else:
            assert value == two[key], key


@pytest.mark.parametrize(
    ("policy", "masks", "between"),
    [
        ("S1", False, "gt_weights"),
        ("S1", True, "gt_weights"),
        ("S1", False, "gt_scores"),
        ("S4", False, None),
        ("S4", True, None),
    ],
)
def test_a_step_is_that_of_the_same_labels_on_disk(images, small_config, tmp_path, policy, masks, between):
    """What lies between the two thresholds is ignored, or weighed, or a soft label."""
    if masks:
        cfg = small_rcnn_config("SelfTrainingGeneralizedRCNN", MODEL__MASK_ON=True)
        cfg.INPUT.MASK_FORMAT = "bitmask"
        cfg.TEST.DETECTIONS_PER_IMAGE = 20
    else:
        cfg = small_config
    cfg = _student(cfg, tmp_path, INPUT__AUGMENTATION__POLICY=policy)
    floors = _label(cfg, images, tmp_path)
    cfg.SELFTRAIN.SCORE_THRESH, cfg.SELFTRAIN.IGNORE_SCORE_THRESH = floors
    cfg.SELFTRAIN.SCORE_WEIGHTED = between == "gt_weights"
    cfg.SELFTRAIN.SOFT_LABELS = between == "gt_scores"
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.moving_teacher.before_train()
    trainer.moving_teacher.batch_size = (
        1  # an R-CNN of random weights makes other boxes of what is rounded otherwise
    )
    steps = [trainer.moving_teacher.label(b) for b, _ in zip(build_selftrain_train_loader(cfg), range(3))]

    register_pseudo_labels(
        "labels",
        tmp_path / "labels",
        floors[0],
        ignore_score_thresh=floors[1],
        score_weighted=between is not None,
    )
    cfg.SELFTRAIN.TEACHER, cfg.DATASETS.PSEUDO_TRAIN = "labels", ("labels",)
    found = uncertain = 0
    for step, expected in zip(steps, build_selftrain_train_loader(cfg)):
        for one, two in zip(step, expected):
            _same(one, two)
            if one["label_source"] == "pseudo":
                found += len(one["instances"])
                if between is None:
                    uncertain += len(one["ignored_boxes"])
                else:
                    limit = 1 if between == "gt_weights" else floors[0]
                    uncertain += int((one["instances"].get(between) < limit).sum())
    assert found > 10 and uncertain > 10


def test_a_step_of_several_views_is_that_of_the_same_labels_on_disk(images, small_config, tmp_path):
    cfg = _student(
        small_config,
        tmp_path,
        SELFTRAIN__TTA__FLIP=True,
        SELFTRAIN__TTA__SCALES=(1.0, 1.5),
        SELFTRAIN__TTA__BOX_VOTING=0.5,
        MODEL__RETINANET__SCORE_THRESH_TEST=0.001,  # as boxes on disk, which all have a vote
        TEST__DETECTIONS_PER_IMAGE=20,
    )
    thresh = _label(cfg, images, tmp_path)[0]
    (table,) = read_shards([file for _, file in list_shards(tmp_path / "labels" / "shards")])
    localization = np.sort(localization_scores(table)[flat_values(table, "scores") >= thresh])
    middle = localization[len(localization) // 4 : -len(localization) // 4]
    gap = np.diff(middle).argmax()
    cfg.SELFTRAIN.SCORE_THRESH = thresh
    cfg.SELFTRAIN.LOCALIZATION_THRESH = float(middle[gap : gap + 2].mean())
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.moving_teacher.before_train()
    steps = [trainer.moving_teacher.label(b) for b, _ in zip(build_selftrain_train_loader(cfg), range(3))]

    register_pseudo_labels(
        "labels", tmp_path / "labels", thresh, localization_thresh=cfg.SELFTRAIN.LOCALIZATION_THRESH
    )
    cfg.SELFTRAIN.TEACHER, cfg.DATASETS.PSEUDO_TRAIN = "labels", ("labels",)
    found = 0
    for step, expected in zip(steps, build_selftrain_train_loader(cfg)):
        for one, two in zip(step, expected):
            _same(one, two)
            found += len(one["instances"]) if one["label_source"] == "pseudo" else 0
    assert 5 < found < len(localization)


def _train(cfg, resume=False):
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def test_a_resumed_run_is_one_that_was_not_stopped(images, small_config, tmp_path):
    cfg = _student(small_config, tmp_path, SELFTRAIN__SCORE_THRESH=0.02, SELFTRAIN__TEACHER_CHECK_PERIOD=2)
    cfg.SELFTRAIN.THRESHOLDS, cfg.SELFTRAIN.IGNORE_SCORE_THRESH = "counts", 0.015
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.005
    _train(cfg)
    output = tmp_path / "output"
    files = [output / "model_final.pth", output / "moving_teacher" / "model_final.pth"]
    expected = [torch.load(file, weights_only=True) for file in files]
    for file in files:
        file.unlink()
    (output / "last_checkpoint").write_text("model_0000001.pth")
    assert _train(cfg, resume=True).start_iter == 2
    for file, before in zip(files, expected):
        after = torch.load(file, weights_only=True)
        assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert any("teacher_agreement" in row for row in rows)
    state = expected[0]["trainer"]["hooks"]["MovingTeacher"]["counts"]
    assert state["boxes"].sum() > 0 and 7 < state["images"] < 8  # 2 a step, the earlier ones a little less


def test_a_teacher_that_becomes_worse_gives_way_to_its_last_good_weights(
    images, small_config, tmp_path, caplog
):
    cfg = _student(small_config, tmp_path, SELFTRAIN__SCORE_THRESH=0.02, SELFTRAIN__TEACHER_CHECK_PERIOD=1)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 6, 100
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(False)
    teacher, seen = trainer.moving_teacher, []
    values = iter([0.5, 0.45, 0.39, 0.0, 0.39])  # under 0.8 * 0.5 from the third on

    def agreement(*_):
        seen.append([value.clone() for value in teacher.model.parameters()])
        return next(values)

    teacher.check.agreement = agreement
    with caplog.at_level("WARNING"):
        trainer.train()
    assert teacher.stopped and len(seen) == 5  # the sixth step asks no more
    assert "agreement with people 0.39, 0.50 at its best" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(teacher.model.parameters(), seen[1]))
    assert not all(torch.equal(a, b) for a, b in zip(seen[1], seen[4]))
    assert teacher.state_dict()["stopped"] is True


def test_what_is_judged_is_f1_against_people(coco_set, tmp_path, small_config):
    register_human_labels("human", coco_set.json_file, coco_set.images)
    register_image_folder("plain", coco_set.images)
    cfg = _student(small_config, tmp_path)
    mapper = UnlabeledImageMapper(cfg, is_train=True)
    with_truth = get_human_dicts(cfg)
    check = TeacherCheck(with_truth, mapper)
    assert [d["image_id"] for d in check.dicts] == list(range(1, 9))
    boxes = [
        [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in d["annotations"]]
        for d in check.dicts
    ]

    class Finds:
        masks = False

        def __init__(self, score):
            self.score = score

        def __call__(self, samples, most):
            assert all([image.shape for image in sample["images"]] == [(3, 96, 96)] for sample in samples)
            return [
                make_row(
                    *("", 96, 96, found, [self.score] * len(found)),
                    [a["category_id"] for a in d["annotations"][: len(found)]],
                )
                for found, d in zip([*boxes[:-1], []], check.dicts)  # all but those of the last image
            ]

    total, last = sum(map(len, boxes)), len(boxes[-1])
    selection = step_selection(cfg)
    found = total - last
    assert check.agreement(Finds(0.9), selection, 8) == pytest.approx(2 * found / (found + total))
    assert check.agreement(Finds(0.4), selection, 8) == 0.0  # under SCORE_THRESH nothing is learned


def test_accumulation_and_bfloat16(images, small_config, tmp_path):
    cfg = _student(small_config, tmp_path, SELFTRAIN__SCORE_THRESH=0.012)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.ACCUMULATION_STEPS = 2, 2
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION = True, "bfloat16"
    trainer = _train(cfg)
    assert trainer.moving_teacher.batch_size == 1
    assert trainer.model.label_counts["boxes"]["pseudo"].images == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_pixels_of_a_step_are_those_of_the_same_masks_on_disk(tmp_path):
    rng = np.random.default_rng(0)
    for name in NAMES:
        for folder, shape, most in (("images", (64, 96, 3), 255), ("masks", (64, 96), 3)):
            (tmp_path / folder).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / folder / name), rng.integers(0, most, shape, dtype=np.uint8))
    images = str(tmp_path / "images")
    register_segmentation_folder("human", images, str(tmp_path / "masks"), ["a", "b", "c"])
    register_image_folder("plain", images)
    cfg = _student(
        small_rcnn_config("SelfTrainingSemanticSegmentor"), tmp_path, "abc", INPUT__AUGMENTATION__POLICY="S4"
    )
    cfg.SELFTRAIN.SCORE_THRESH = 0.4
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.moving_teacher.before_train()
    steps = [trainer.moving_teacher.label(b) for b, _ in zip(build_selftrain_train_loader(cfg), range(3))]

    generate_pseudo_labels(
        cfg, images, NAMES, tmp_path / "labels", score_floor=0.1, thing_classes=["a", "b", "c"]
    )
    register_pseudo_labels("labels", tmp_path / "labels", 0.4)
    cfg.SELFTRAIN.TEACHER, cfg.DATASETS.PSEUDO_TRAIN = "labels", ("labels",)
    shares = []
    for step, expected in zip(steps, build_selftrain_train_loader(cfg)):
        for one, two in zip(step, expected):
            assert one.keys() == two.keys() and torch.equal(one["image"], two["image"])
            assert (one["sem_seg"] != two["sem_seg"]).float().mean() < 1e-3
            if one["label_source"] == "pseudo":
                shares.append(one["valid_pixel_share"])
    assert len(shares) == 6 and 0 < np.mean(shares) < 1
    agreement = trainer.moving_teacher.check.agreement(
        trainer.moving_teacher.teacher, trainer.moving_teacher.selection, 2
    )
    assert 0 < agreement < 1


@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        ({"MODEL__WEIGHTS": ""}, "begins as a trained teacher"),
        ({"SELFTRAIN__BOXES_PER_IMAGE": 1.0}, "SELFTRAIN.THRESHOLDS to counts"),
        ({"SELFTRAIN__LOCALIZATION_THRESH": 0.5}, "needs a teacher that looks several times"),
        ({"DATALOADER__PSEUDO_SAMPLER_TRAIN": "RepeatFactorTrainingSampler"}, "set it to TrainingSampler"),
    ],
)
def test_what_does_not_go_with_it(images, small_config, tmp_path, keys, fragment):
    cfg = _student(small_config, tmp_path)
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    for refuse in (SelfTrainingTrainer, check_training):
        with pytest.raises(InputError, match=fragment):
            refuse(cfg)
