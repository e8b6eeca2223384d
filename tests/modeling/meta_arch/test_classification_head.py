import pytest
import torch
from conftest import small_rcnn_config
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from selftrain_d2 import InputError
from selftrain_d2.modeling.meta_arch import add_classification_head
from selftrain_d2.modeling.meta_arch.classification import ClassificationHead, bottom_up_features

K = 4
WEIGHT = 0.3


def _detection_batch():
    """Two human-labeled images and one pseudo-labeled, of 64 pixels."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for source in ("human", "human", "pseudo"):
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 4.0, 60.0, 50.0]]))
        instances.gt_classes = torch.tensor([0, 1])
        image = torch.randint(0, 255, (3, 64, 64), generator=generator, dtype=torch.uint8)
        sem_seg = torch.randint(0, 3, (64, 64), generator=generator)
        batch.append({"image": image, "instances": instances, "sem_seg": sem_seg, "label_source": source})
    return batch


def _classification_batch(size=48):
    """Of another size than the detector's images, and one that its pyramid would have to pad."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 255, (5, 3, size, size), generator=generator, dtype=torch.uint8)
    return [
        {"image": image, "class_id": i % K, "label_source": "classification"}
        for i, image in enumerate(images)
    ]


def _retinanet(cfg):
    cfg.MODEL.EFFICIENTNET.NORM = "FrozenBN"
    cfg.MODEL.EFFICIENTNET.DROP_CONNECT_RATE = 0.0
    cfg.MODEL.FPN.OUTPUT_NORM = cfg.MODEL.RETINANET.NORM = ""
    cfg.MODEL.RETINANET.NORM_AFFINE_PER_LEVEL = False
    cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]  # without batch norm, small numbers vanish in 16 blocks
    return cfg


def _nas_segmentor():
    cfg = small_rcnn_config("SelfTrainingSegmentor")
    cfg.MODEL.BACKBONE.NAME = "build_nas_fpn_backbone"
    cfg.MODEL.NAS_FPN.REPEATS = 1
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.NORM = ""
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemSegPyramidSumHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CONVS = 1
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 16
    return cfg


CONFIGS = {
    "RetinaNet": None,
    "GeneralizedRCNN": lambda: small_rcnn_config("SelfTrainingGeneralizedRCNN"),
    "SemanticSegmentor": lambda: small_rcnn_config("SelfTrainingSemanticSegmentor"),
    "Segmentor on NAS-FPN": _nas_segmentor,
}


@pytest.fixture(params=CONFIGS)
def model(request, small_config):
    torch.manual_seed(0)
    make = CONFIGS[request.param]
    model = build_model(_retinanet(small_config) if make is None else make()).train()
    model.loss_weights = (0.25, 3.0)
    add_classification_head(model, K, WEIGHT)
    nn.init.normal_(model.classification_head.predictor.bias)
    return model


def _gradients(model, batch):
    """Losses, and gradients by name (None as 0)."""
    model.zero_grad()
    # Moving averages of anchors would differ from call to call.
    model.positive_anchor_averages = {}
    torch.manual_seed(0)
    with EventStorage() as storage:
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return losses, gradients, storage


def _by_hand(model, batch):
    """Cross entropy and accuracy, written out."""
    losses, right = [], 0
    for sample in batch:
        pixels = (sample["image"][None].float() - model.pixel_mean) / model.pixel_std
        features = model.backbone.bottom_up(pixels)["res5"]
        pooled = features.flatten(2).sum(2)[0] / features.shape[2] / features.shape[3]
        predictor = model.classification_head.predictor
        scores = (predictor.weight * pooled).sum(1) + predictor.bias
        losses.append(scores.exp().sum().log() - scores[sample["class_id"]])
        right += int(scores.argmax() == sample["class_id"])
    return sum(losses) / len(losses), right / len(batch)


def test_joint_training_adds_the_weighted_gradient_of_classification(model):
    detection, classification = _detection_batch(), _classification_batch()
    losses, joint, storage = _gradients(model, detection + classification)
    expected_losses, expected, _ = _gradients(model, detection)
    loss, accuracy = _by_hand(model, classification)
    model.zero_grad()
    loss.backward()

    assert losses.keys() == expected_losses.keys() | {"loss_classification"}
    torch.testing.assert_close(losses["loss_classification"], WEIGHT * loss)
    for name, value in expected_losses.items():
        torch.testing.assert_close(losses[name], value)
    assert storage.history("classification_accuracy").latest() == pytest.approx(accuracy)
    moved = 0
    for name, parameter in model.named_parameters():
        alone = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            joint[name], expected[name] + WEIGHT * alone, rtol=1e-3, atol=1e-5, msg=name
        )
        moved += int(alone.abs().max() > 1e-3)
    assert moved > 10  # the backbone learns from it, not the head alone
    # What LossNormalizer averages and what is counted is of detection alone.
    raw = {source: loss.clone() for source, loss in model.raw_losses.items()}
    _gradients(model, detection + classification)
    assert raw == model.raw_losses


def test_without_classification_images_the_head_is_idle(model):
    assert "loss_classification" not in _gradients(model, _detection_batch())[0]


def test_inference_does_not_meet_the_head(model):
    model.eval()
    batch = [{**sample, "height": 64, "width": 64} for sample in _detection_batch()]
    model.classification_head.register_forward_hook(lambda *_: pytest.fail("the head was used"))
    with torch.no_grad():
        assert len(model(batch)) == 3


def test_running_statistics_are_those_of_the_detectors_images(small_config):
    cfg = small_config
    cfg.MODEL.EFFICIENTNET.DROP_CONNECT_RATE = 0.0
    detection, classification = _detection_batch(), _classification_batch()
    buffers, losses = [], []
    for batch, checkpoint in (
        (detection, False),
        (detection + classification, False),
        (detection + classification, True),
    ):
        cfg.MODEL.EFFICIENTNET.CHECKPOINT_ACTIVATIONS = checkpoint
        torch.manual_seed(0)
        model = build_model(cfg).train()
        add_classification_head(model, K, WEIGHT)
        losses.append(_gradients(model, batch)[0])
        buffers.append(dict(model.named_buffers()))
    assert any("num_batches_tracked" in name for name in buffers[0])
    for name, value in buffers[0].items():
        for other in buffers[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=name)
    # Its own statistics: in training the loss does not depend on the detector's images, or on what was before.
    torch.manual_seed(0)
    model = build_model(cfg).train()
    add_classification_head(model, K, WEIGHT)
    torch.testing.assert_close(
        losses[1]["loss_classification"], WEIGHT * _by_hand_together(model, classification)
    )


def _by_hand_together(model, batch):
    """As `_by_hand`, of one batch: batch norm sees all images."""
    pixels = (torch.stack([x["image"] for x in batch]).float() - model.pixel_mean) / model.pixel_std
    predictor = model.classification_head.predictor
    pooled = model.backbone.bottom_up(pixels)["res5"].mean((2, 3))
    scores = (pooled[:, None] * predictor.weight).sum(2) + predictor.bias
    right = scores[torch.arange(len(batch)), [x["class_id"] for x in batch]]
    return (scores.exp().sum(1).log() - right).mean()


def test_a_backbone_without_a_pyramid():
    cfg = small_rcnn_config("SelfTrainingGeneralizedRCNN")
    cfg.MODEL.BACKBONE.NAME = "build_efficientnet_backbone"
    cfg.MODEL.EFFICIENTNET.OUT_FEATURES = ["res3", "res4"]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    model = build_model(cfg).train()
    add_classification_head(model, K, 1.0)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(bottom_up_features(model.backbone, images), model.backbone(images)["res4"])
    assert "loss_classification" in _gradients(model, _detection_batch() + _classification_batch())[0]


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_weights_that_are_none(weight):
    with pytest.raises(InputError, match=r"CLASSIFICATION_LOSS_WEIGHT must be a number >= 0"):
        ClassificationHead(8, K, weight)


def test_a_plain_architecture_is_refused():
    with pytest.raises(InputError, match="GeneralizedRCNN cannot be trained jointly"):
        add_classification_head(build_model(small_rcnn_config("GeneralizedRCNN")), K, 1.0)


def test_half_precision_features_are_averaged_in_full():
    """1000 pixels of 100 sum to more than float16 has."""
    head = ClassificationHead(1, 2, 1.0)
    nn.init.ones_(head.predictor.weight)
    features = torch.full((1, 1, 100, 100), 100.0, dtype=torch.float16)
    torch.testing.assert_close(head(features), torch.full((1, 2), 100.0))
