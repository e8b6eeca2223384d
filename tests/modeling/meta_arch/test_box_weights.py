"""Losses of boxes that weigh less: by hand with numpy, and against detectron2's own."""

import cv2
import numpy as np
import pytest
import torch
from conftest import small_rcnn_config
from detectron2.config import get_cfg, instantiate
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from test_dense import _batch, _fcos, _retinanet

from selftrain_d2 import add_selftrain_config
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.engine.config_checks import check_score_weights
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.meta_arch import SelfTrainingFCOS, SelfTrainingRetinaNet
from selftrain_d2.modeling.meta_arch.box_weights import matched_weights, weighted_losses


def _model(kind):
    torch.manual_seed(0)
    lazy = _fcos(SelfTrainingFCOS) if kind == "fcos" else _retinanet(SelfTrainingRetinaNet)
    return instantiate(lazy).train()


def _weighted(batch, *weights, field="gt_weights"):
    """A copy whose image 2, a pseudo-labeled one of two boxes, has these weights."""
    copied = [{**x, "instances": x["instances"][:]} for x in batch]
    copied[2]["instances"].set(field, torch.tensor(weights))
    return copied


def _losses(model, batch):
    """The losses by name, and all gradients, of a step of its own."""
    model.positive_anchor_averages = {}
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return {name: loss.item() for name, loss in losses.items()}, gradients


def _image():
    return torch.randint(0, 255, (3, 96, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def _predictions(model, image):
    """Of a RetinaNet of two classes, in numpy: logits (R, 2), deltas (R, 4), anchors (R, 4)."""
    with torch.no_grad():
        features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
        features = [features[name] for name in model.head_in_features]
        logits, deltas = model._transpose_dense_predictions(model.head(features), [2, 4])
        anchors = np.concatenate([a.tensor.numpy() for a in model.anchor_generator(features)])
    logits, deltas = (torch.cat(x, dim=1)[0].double().numpy() for x in (logits, deltas))
    return logits, deltas, anchors


def _l1_loss(deltas, anchor, box):
    size, wanted = anchor[2:] - anchor[:2], box[2:] - box[:2]
    centers = (box[:2] + wanted / 2) - (anchor[:2] + size / 2)
    return np.abs(deltas - np.concatenate([centers / size, np.log(wanted / size)])).sum()


def _pseudo_labels(folder, image_root, boxes, scores):
    """A finished folder with one image of noise, on which the teacher sees one box of each of two classes."""
    cv2.imwrite(str(image_root / "a.png"), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    identity = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": str(image_root)}
    with PseudoLabelWriter(folder, identity, ["a.png"]) as writer:
        writer.write_shard(0, [make_row("a.png", 64, 64, boxes, scores, [0, 1])])
        writer.finish()


def _plain_mapper(key):
    """By a config with this key of SELFTRAIN set; it augments nothing."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.SELFTRAIN[key] = True
    mapper = SelfTrainingDatasetMapper(cfg, True)
    mapper.augmentations = T.AugmentationList([])
    return mapper


def _check_refused(architecture, key, field, message):
    """The config's key is refused when a student is built, and the field of its boxes in a step; a teacher may have it.

    Returns:
        the student's config, and its model.
    """
    cfg = small_rcnn_config(architecture, **{f"SELFTRAIN__{key}": True})
    model = build_model(cfg)
    instances = Instances((96, 96), gt_boxes=Boxes(torch.tensor([[10.0, 10.0, 60.0, 60.0]])))
    instances.gt_classes = torch.tensor([0])
    instances.set(field, torch.tensor([0.5]))
    sample = {"image": torch.zeros(3, 96, 96), "instances": instances, "label_source": "pseudo"}
    with pytest.raises(InputError, match=message), EventStorage():
        model([sample])
    check_score_weights(cfg, model)  # a teacher
    cfg.DATASETS.PSEUDO_TRAIN = ("pseudo",)
    with pytest.raises(InputError, match=message):
        check_score_weights(cfg, model)
    return cfg, model


def _iou(box, anchors):
    low, high = np.maximum(box[:2], anchors[:, :2]), np.minimum(box[2:], anchors[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    return common / ((box[2:] - box[:2]).prod() + (anchors[:, 2:] - anchors[:, :2]).prod(axis=1) - common)


def test_losses_of_two_boxes_by_hand():
    """Matching, focal loss and L1 loss of RetinaNet in numpy, anchor by anchor."""
    model = _model("retinanet")
    model.normalize_by_batch = True
    image = _image()
    boxes, classes, weights = np.array([[8.0, 8, 40, 48], [50, 30, 90, 80]]), [1, 0], [0.3, 0.8]
    instances = Instances((96, 96), gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    instances.gt_classes, instances.gt_weights = torch.tensor(classes), torch.tensor(weights)
    found, _ = _losses(model, [{"image": image, "instances": instances, "label_source": "pseudo"}])

    logits, deltas, anchors = _predictions(model, image)
    iou = np.stack([_iou(box, anchors) for box in boxes])
    of_class, of_box, positives = 0.0, 0.0, 0
    for i, anchor in enumerate(anchors):
        best = int(iou[:, i].argmax())
        forced = any(iou[k, i] == iou[k].max() for k in range(2))
        if 0.4 <= iou[best, i] < 0.5 and not forced:
            continue
        positive = iou[best, i] >= 0.5 or forced
        weight = weights[best] if positive else 1.0
        for k in range(2):
            p = 1 / (1 + np.exp(-logits[i, k]))
            hit = positive and classes[best] == k
            of_class += weight * (-0.25 * (1 - p) ** 2 * np.log(p) if hit else -0.75 * p**2 * np.log1p(-p))
        if positive:
            positives += 1
            of_box += weight * _l1_loss(deltas[i], anchor, boxes[best])
    assert positives > 4
    normalizer = positives + 1
    assert found["loss_cls_pseudo"] == pytest.approx(of_class / normalizer, rel=1e-4)
    assert found["loss_box_reg_pseudo"] == pytest.approx(of_box / normalizer, rel=1e-4)


@pytest.mark.parametrize("kind", ["fcos", "smooth_l1", "giou"])
def test_losses_are_linear_in_the_weight_of_a_box(kind):
    """From the box left to no loss at all up to detectron2's own losses; human images are as ever."""
    model = _model(kind)
    if kind != "fcos":
        model.box_reg_loss_type, model.smooth_l1_beta, model.box_reg_loss_weight = kind, 0.1, 2.0
    batch = _batch()
    full, full_gradients = _losses(model, batch)
    ones, _ = _losses(model, _weighted(batch, 1.0, 1.0))
    assert ones == pytest.approx(full, rel=1e-4)
    none, none_gradients = _losses(model, _weighted(batch, 0.0, 1.0))
    quarter, quarter_gradients = _losses(model, _weighted(batch, 0.25, 1.0))
    for name, loss in full.items():
        if name.endswith("human"):
            assert none[name] == quarter[name] == loss
        else:
            assert none[name] < loss
            assert quarter[name] == pytest.approx(none[name] + 0.25 * (loss - none[name]), rel=1e-4)
    for a, zero, whole in zip(quarter_gradients, none_gradients, full_gradients):
        torch.testing.assert_close(a, zero + 0.25 * (whole - zero), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
def test_box_losses_of_single_anchors_are_detectron2s(kind):
    model = _model("retinanet")
    model.box_reg_loss_type, model.smooth_l1_beta = kind, 0.1
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 7, 2, generator=generator) * 50
    anchors, boxes = torch.cat([corners, corners + 20], dim=2)
    deltas = torch.randn(7, 4, generator=generator) / 5
    found = model.losses_of_positives(anchors, deltas, boxes)["loss_box_reg"]
    for i in range(7):
        chosen = torch.arange(7).eq(i)[None]
        expected = _dense_box_regression_loss(
            [Boxes(anchors)], model.box2box_transform, [deltas[None]], [boxes], chosen, kind, 0.1
        )
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_ignored_boxes_are_still_ignored(kind):
    """Weights of 1 beside ignored boxes change nothing."""
    model, batch = _model(kind), _batch()
    torch.nn.init.zeros_(model.head.cls_score.bias)  # background has a loss worth naming
    batch[2]["ignored_boxes"] = Boxes(torch.tensor([[30.0, 30.0, 90.0, 90.0]]))
    expected, _ = _losses(model, batch)
    assert expected != pytest.approx(_losses(model, _batch())[0], rel=1e-4)
    assert _losses(model, _weighted(batch, 1.0, 1.0))[0] == pytest.approx(expected, rel=1e-4)


def test_weighted_parts_of_a_batch_are_the_batch():
    """Gradient accumulation."""
    model = _model("retinanet")
    model.normalize_by_batch = True
    batch = _weighted(_batch(), 0.3, 0.6)
    whole, _ = _losses(model, batch)
    parts = [batch[:2], batch[2:]]
    with EventStorage(), model.one_step(parts):
        passes = [model(part) for part in parts]
    for name, loss in whole.items():
        assert sum(p[name] for p in passes).item() / 2 == pytest.approx(loss, rel=1e-4)


def test_objects_are_told_by_box_and_class():
    instances = Instances(
        (96, 96), gt_boxes=Boxes(torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8], [1, 0, 8, 8]]))
    )
    instances.gt_classes = torch.tensor([0, 1, 1])
    boxes, classes = instances.gt_boxes.tensor[[2, 0, 1, 1]], torch.tensor([1, 0, 1, 1])
    assert matched_weights(boxes, classes, instances).tolist() == [1, 1, 1, 1]
    instances.gt_weights = torch.tensor([0.25, 0.5, 0.75])
    assert matched_weights(boxes, classes, instances).tolist() == [0.75, 0.25, 0.5, 0.5]
    assert matched_weights(boxes[:0], classes[:0], instances[:0]).tolist() == []


def _rcnn_batch(weights=None):
    """Human, pseudo (two boxes), pseudo (none)."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for source, number in (("human", 1), ("pseudo", 2), ("pseudo", 0)):
        boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 4.0, 60.0, 50.0]])[:number]
        instances = Instances((64, 64), gt_boxes=Boxes(boxes), gt_classes=torch.arange(number))
        if weights is not None and source == "pseudo":
            instances.gt_weights = torch.tensor(weights)[:number]
        image = torch.randint(0, 255, (3, 64, 64), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "label_source": source})
    return batch


@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
def test_losses_of_an_rcnn_are_linear_in_the_weight_of_a_box(heads):
    cascade = {"MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True} if heads.startswith("Cascade") else {}
    torch.manual_seed(0)
    model = build_model(
        small_rcnn_config("SelfTrainingGeneralizedRCNN", MODEL__ROI_HEADS__NAME=heads, **cascade)
    ).train()

    def losses(weights=None):
        torch.manual_seed(0)  # of the sampling
        with EventStorage() as storage:
            found = model(_rcnn_batch(weights))
            return {name: loss.item() for name, loss in found.items()}, set(storage.latest())

    (full, logged), (ones, _) = losses(), losses([1.0, 1.0])
    assert ones == pytest.approx(full, rel=1e-4)
    (none, _), (quarter, logged_too) = losses([0.0, 1.0]), losses([0.25, 1.0])
    assert logged == logged_too
    for name, loss in full.items():
        if name.endswith("human"):
            assert none[name] == quarter[name] == loss
        else:
            assert none[name] <= loss
            assert quarter[name] == pytest.approx(none[name] + 0.25 * (loss - none[name]), rel=1e-4, abs=1e-7)
    changed = {name for name, loss in full.items() if none[name] < loss}
    assert {"loss_rpn_cls_pseudo", "loss_rpn_loc_pseudo"} < changed and any("box_reg" in n for n in changed)


def test_losses_of_three_proposals_by_hand():
    """Cross-entropy and L1 loss, divided by the number of proposals, whatever their weights."""
    model = build_model(small_rcnn_config("SelfTrainingGeneralizedRCNN", MODEL__ROI_HEADS__NUM_CLASSES=2))
    predictor = model.roi_heads.box_predictor
    predictor.box2box_transform.weights, predictor.loss_weight = (1.0, 1.0, 1.0, 1.0), {}
    predictor.smooth_l1_beta = 0.0
    objects = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])))
    objects.gt_classes, objects.gt_weights = torch.tensor([1, 0]), torch.tensor([0.3, 0.8])
    proposals = Instances(
        (64, 64), proposal_boxes=Boxes(torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 5, 5]]))
    )
    proposals.gt_classes = torch.tensor([1, 0, 2])  # the last is background
    proposals.gt_boxes = Boxes(objects.gt_boxes.tensor[[0, 1, 0]])
    scores = torch.tensor([[0.0, 1.0, 0.5], [0.2, 0.0, 0.0], [0.0, 0.0, 2.0]])
    deltas = torch.zeros(3, 8)
    deltas[0, 4:], deltas[1, :4] = 0.1, 0.2  # of their classes; the boxes fit, so all targets are 0
    with EventStorage(), weighted_losses(model, [{"instances": objects}]):
        found = predictor.losses((scores, deltas), [proposals])
    p = np.exp(scores.numpy()) / np.exp(scores.numpy()).sum(axis=1, keepdims=True)
    of_class = -(0.3 * np.log(p[0, 1]) + 0.8 * np.log(p[1, 0]) + np.log(p[2, 2])) / 3
    assert found["loss_cls"].item() == pytest.approx(of_class, rel=1e-5)
    assert found["loss_box_reg"].item() == pytest.approx((0.3 * 4 * 0.1 + 0.8 * 4 * 0.2) / 3, rel=1e-5)


@pytest.fixture(params=["retinanet", "fcos", "StandardROIHeads", "CascadeROIHeads"])
def architecture(request):
    """A model in training; of an R-CNN, Faster or Cascade."""
    if request.param in ("retinanet", "fcos"):
        return _model(request.param)
    keys = {"MODEL__ROI_HEADS__NAME": request.param}
    if request.param == "CascadeROIHeads":
        keys["MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG"] = True
    torch.manual_seed(0)
    return build_model(small_rcnn_config("SelfTrainingGeneralizedRCNN", **keys)).train()


def test_scores_between_two_thresholds_weigh_by_hand(architecture, tmp_path):
    """Labels on disk, their thresholds 0.2 and 0.6, the mapper and the losses of every architecture.

    A score of 0.3 counts a quarter: (0.3 - 0.2) / (0.6 - 0.2). What counts nothing has the losses of 0.2, what counts
    fully those of the paper, without weights.
    """
    mapper = _plain_mapper("SCORE_WEIGHTED")

    def losses(score, **selection):
        folder = tmp_path / f"{score}"
        if not folder.exists():
            _pseudo_labels(folder, tmp_path, [[8, 8, 40, 40], [20, 4, 60, 50]], [score, 0.9])
        dataset = load_pseudo_labels(folder, 0.6, ignore_score_thresh=0.2, **selection)
        torch.manual_seed(0)  # of an R-CNN's sampling
        return _losses(architecture, [mapper(sample) for sample in dataset])[0]

    none, quarter, high, sure = (losses(score, score_weighted=True) for score in (0.2, 0.3, 0.6, 0.8))
    assert sure == high == pytest.approx(losses(0.8), rel=1e-4)
    for name, loss in high.items():
        assert quarter[name] == pytest.approx(0.75 * none[name] + 0.25 * loss, rel=1e-4, abs=1e-7)
    assert any(none[name] < 0.99 * loss for name, loss in high.items())


def test_weights_are_refused_where_no_loss_knows_them():
    message = "SelfTrainingSemanticSegmentor has no loss of each box .* set SELFTRAIN.SCORE_WEIGHTED False"
    _check_refused("SelfTrainingSemanticSegmentor", "SCORE_WEIGHTED", "gt_weights", message)
