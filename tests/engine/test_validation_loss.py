import json

import pytest
import torch
from conftest import make_coco_set, small_rcnn_config
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from selftrain_d2 import InputError, SelfTrainingTrainer, register_image_folder
from selftrain_d2.data.augmentation import build_augmentations
from selftrain_d2.data.datasets import register_human_labels
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper
from selftrain_d2.engine.validation_loss import ValidationLoss


@pytest.fixture
def validation(tmp_path):
    """Five images, registered."""
    coco = make_coco_set(tmp_path / "validation", 5, seed=9)
    register_human_labels("validation", coco.json_file, coco.images)
    return "validation"


def _samples(cfg):
    """The images with their boxes, resized as for a test."""
    mapper = SelfTrainingDatasetMapper(cfg, is_train=True)
    mapper.augmentations.augs = build_augmentations(cfg, is_train=False)

    return [mapper(d) for d in DatasetCatalog.get("validation")]


def test_it_is_the_training_loss_of_a_model_without_batch_norm(small_config, validation):
    """Then a forward pass in training mode is the same: batches of 2, 2 and 1 images, weighted by their images."""
    cfg = small_config
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (validation,)
    cfg.MODEL.EFFICIENTNET.NORM, cfg.MODEL.EFFICIENTNET.DROP_CONNECT_RATE = "FrozenBN", 0.0
    cfg.MODEL.FPN.NORM = cfg.MODEL.FPN.OUTPUT_NORM = cfg.MODEL.RETINANET.NORM = ""
    cfg.MODEL.RETINANET.LOSS_NORMALIZER = "batch"
    model = build_model(cfg)
    samples = _samples(cfg)
    expected = {}
    with torch.no_grad(), EventStorage():
        for batch in (samples[:2], samples[2:4], samples[4:]):
            for name, loss in model.train()(batch).items():
                expected[name] = expected.get(name, 0.0) + loss.item() * len(batch) / 5
    found = ValidationLoss(cfg)(model)["validation"]
    assert found.pop("loss") == pytest.approx(sum(expected.values()), rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-6) and len(found) == 2


def test_it_changes_nothing_and_depends_on_nothing_but_weights(small_config, validation):
    cfg = small_config
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (validation,)
    cfg.MODEL.RETINANET.LOSS_NORMALIZER = "moving_average"
    model = build_model(cfg)  # with batch norm and drop connect
    model.backbone.eval()
    with EventStorage():
        model(_samples(cfg)[:2])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    averages, raw = dict(model.positive_anchor_averages), dict(model.raw_losses)
    random = torch.get_rng_state()
    validation_loss = ValidationLoss(cfg)
    first = validation_loss(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert (model.positive_anchor_averages, model.raw_losses) == (averages, raw) and averages
    assert not model.normalize_by_batch
    # In another state, of the random numbers and of what moves with training.
    torch.manual_seed(7)
    model.positive_anchor_averages = {"human": (1e4, 1.0)}
    assert validation_loss(model.eval()) == first


def test_sampled_proposals_are_the_same_each_time(validation):
    cfg = small_rcnn_config("SelfTrainingGeneralizedRCNN", MODEL__RPN__BATCH_SIZE_PER_IMAGE=16)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (validation,)
    cfg.INPUT.AUGMENTATION.IMAGE_SIZE, cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 96, 0, 5
    validation_loss, model = ValidationLoss(cfg), build_model(cfg)
    assert validation_loss(model) == validation_loss(model)
    assert set(validation_loss(model)["validation"]) == {
        "loss", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc",
    }  # fmt: skip


def test_it_is_written_with_the_results(student_config, validation, tmp_path):
    cfg = student_config
    cfg.DATASETS.TEST, cfg.TEST.VALIDATION_LOSS, cfg.TEST.EVAL_PERIOD = ("human", validation), True, 1
    cfg.SOLVER.MAX_ITER = 2
    trainer = SelfTrainingTrainer(cfg)
    trainer.train()
    rows = [json.loads(row) for row in (tmp_path / "output" / "metrics.json").read_text().splitlines()]
    rows = [row for row in rows if "validation/validation/loss" in row]
    assert [row["iteration"] for row in rows] == [0, 2]
    assert rows[0]["validation/validation/loss"] != rows[1]["validation/validation/loss"]
    last = ValidationLoss(cfg)(trainer.model)
    assert rows[1]["human/validation/loss"] == last["human"]["loss"]
    assert rows[1]["validation/validation/loss_cls"] == last["validation"]["loss_cls"]


def test_images_without_labels(small_config, coco_set):
    register_image_folder("unlabeled", coco_set.images)
    small_config.DATASETS.TEST = ("unlabeled",)
    with pytest.raises(InputError, match=r"TEST\.VALIDATION_LOSS needs labels, which 'unlabeled'"):
        ValidationLoss(small_config)
