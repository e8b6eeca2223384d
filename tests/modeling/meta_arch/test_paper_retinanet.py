"""The paper's detector (PAPER: Section 3.2; [TF]: its released code) against formulas written out here."""

import copy
import math

import pytest
import torch
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.soft_nms import soft_nms

SIZE = 96
LEVELS = ["p3", "p4", "p5", "p6", "p7"]


def _batch(sources, seed=0):
    """Images of 0, 1 or 2 boxes, each 34 to 40 pixels wide: of such a box one anchor is clearly the best."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for i, source in enumerate(sources):
        corner = torch.rand((i % 3, 2), generator=generator) * 56
        size = 34 + torch.rand((i % 3, 2), generator=generator) * 6
        instances = Instances((SIZE, SIZE))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.arange(i % 3)
        image = torch.randint(0, 255, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "label_source": source})
    return batch


@pytest.fixture
def paper_config(small_config):
    small_config.MODEL.EFFICIENTNET.DROP_CONNECT_RATE = 0.0
    return small_config


@pytest.fixture
def model(paper_config):
    torch.manual_seed(0)
    model = build_model(paper_config).train()
    for layer in (model.head.cls_score, model.head.bbox_pred):  # far from zero, so that every term counts
        nn.init.normal_(layer.weight, std=0.05)
    return model


def _forward(model, batch):
    with EventStorage():
        return model(batch)


# ---- the oracle: one image, one anchor, one class at a time, in Python floats -------------------------


def _anchors():
    """[TF] dataloader/anchor.py: (level, y, x, scale, aspect ratio), XYXY."""
    for stride in (8, 16, 32, 64, 128):
        cells = math.ceil(SIZE / stride)
        for y in range(cells):
            for x in range(cells):
                for scale in range(3):
                    for height_to_width in (0.5, 1.0, 2.0):
                        size = 4 * stride * 2 ** (scale / 3)
                        w, h = size * height_to_width**-0.5, size * height_to_width**0.5
                        cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
                        yield cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def _iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def _match(anchors, boxes):
    """For each anchor the index of its box, or None. IoU >= 0.5, or the best anchor of a box."""
    overlaps = [[_iou(a, b) for b in boxes] for a in anchors]
    matched = []
    for row in overlaps:
        best = max(row, default=0.0)
        matched.append(row.index(best) if best >= 0.5 else None)
    for i in reversed(range(len(boxes))):
        column = [row[i] for row in overlaps]
        matched[column.index(max(column))] = i
    return matched


def _deltas(anchor, box):
    aw, ah, bw, bh = anchor[2] - anchor[0], anchor[3] - anchor[1], box[2] - box[0], box[3] - box[1]
    dx = (box[0] + box[2] - anchor[0] - anchor[2]) / 2 / aw
    dy = (box[1] + box[3] - anchor[1] - anchor[3]) / 2 / ah
    return dx, dy, math.log(bw / aw), math.log(bh / ah)


def _focal(logit, target, alpha=0.25, gamma=1.5):
    p = 1 / (1 + math.exp(-logit))
    p_true = p if target else 1 - p
    return (alpha if target else 1 - alpha) * (1 - p_true) ** gamma * -math.log(p_true)


def _huber(error, delta=0.1):
    error = abs(error)
    return error**2 / 2 if error <= delta else delta * (error - delta / 2)


def _expected_losses(model, batch, index):
    """Class and box loss of the images with these indices, from the head's outputs for the whole batch."""
    model = copy.deepcopy(model)
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    logits, deltas = (
        [x.detach().double() for x in outputs] for outputs in model.head([features[k] for k in LEVELS])
    )
    anchors = list(_anchors())
    class_loss = box_loss = positives = 0
    for i in index:
        # (A * K, H, W) to (H, W, A, K)
        flat_logits = torch.cat(
            [x[i].permute(1, 2, 0).reshape(-1, model.num_classes) for x in logits]
        ).tolist()
        flat_deltas = torch.cat([x[i].permute(1, 2, 0).reshape(-1, 4) for x in deltas]).tolist()
        assert len(flat_logits) == len(anchors)
        instances = batch[i]["instances"]
        boxes, classes = instances.gt_boxes.tensor.double().tolist(), instances.gt_classes.tolist()
        for anchor, box, logit, delta in zip(anchors, _match(anchors, boxes), flat_logits, flat_deltas):
            for k, value in enumerate(logit):
                class_loss += _focal(value, box is not None and classes[box] == k)
            if box is not None:
                positives += 1
                box_loss += sum(_huber(p - t) for p, t in zip(delta, _deltas(anchor, boxes[box])))
    return class_loss / (positives + 1), 50 * box_loss / (4 * (positives + 1)), positives


def test_losses_of_each_source_are_the_papers(model):
    batch = _batch(["human", "human", "pseudo", "pseudo", "human", "pseudo"])
    model.loss_weights = (0.5, 2.0)
    losses = _forward(model, batch)
    for source, weight in zip(("human", "pseudo"), model.loss_weights):
        index = [i for i, x in enumerate(batch) if x["label_source"] == source]
        class_loss, box_loss, positives = _expected_losses(model, batch, index)
        assert positives > 2
        assert losses[f"loss_cls_{source}"].item() == pytest.approx(weight * class_loss, rel=1e-5)
        assert losses[f"loss_box_reg_{source}"].item() == pytest.approx(weight * box_loss, rel=1e-5)


def test_losses_without_any_box_are_divided_by_one(model):
    batch = [_batch(["human"])[0], _batch(["human"], seed=1)[0]]
    class_loss, _, positives = _expected_losses(model, batch, [0, 1])
    losses = _forward(model, batch)
    assert positives == 0 and losses["loss_box_reg"] == 0
    assert losses["loss_cls"].item() == pytest.approx(class_loss, rel=1e-5)


def test_the_normalizer_keeps_no_state(model):
    batch = _batch(["human"] * 3)
    first = _forward(model, batch)
    for seed in range(3):
        _forward(model, _batch(["human"] * 2, seed=seed))
    torch.testing.assert_close(_forward(model, batch), first)


def test_gradients_are_those_of_the_formula(model):
    """Scaling after the fact must not change the gradient: the box loss' gradient, by finite differences."""
    batch = _batch(["human"] * 3)
    bias = model.head.bbox_pred.bias
    _forward(copy.deepcopy(model), batch)
    _forward(model, batch)["loss_box_reg"].backward()
    step = 1e-3
    for i in (0, 7, 20):
        values = []
        for sign in (1, -1):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other.head.bbox_pred.bias[i] += sign * step
            values.append(_expected_losses(other, batch, range(3))[1])
        assert bias.grad[i].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2, abs=1e-4)


# ---- heads --------------------------------------------------------------------------------------------


def _norm_layers(head):
    return [
        m
        for subnet in (head.cls_subnet, head.bbox_subnet)
        for m in subnet
        if isinstance(m, CycleBatchNormList)
    ]


def test_heads_have_a_whole_batch_norm_for_each_level(model):
    norms = _norm_layers(model.head)
    assert len(norms) == 2
    for layer in norms:
        assert not hasattr(layer, "weight") and len(layer) == 5
        for norm in layer:
            assert norm.affine and norm.eps == 1e-4 and norm.momentum == 0.003
    bias = math.log(0.01 / 0.99)
    torch.testing.assert_close(model.head.cls_score.bias, torch.full_like(model.head.cls_score.bias, bias))


def test_head_computes_shared_convolutions_and_norms_of_the_level(model):
    head = model.head
    for layer in _norm_layers(head):
        for norm in layer:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    features = [torch.randn(2, 16, s, s) * (k + 1) for k, s in enumerate((12, 6, 3, 2, 2))]
    before = copy.deepcopy(head.state_dict())
    logits, deltas = head(features)
    for level, x in enumerate(features):
        for outputs, subnet, last in (
            (logits, head.cls_subnet, head.cls_score),
            (deltas, head.bbox_subnet, head.bbox_pred),
        ):
            conv, norms, _ = subnet
            y = F.conv2d(x, conv.weight, conv.bias, padding=1)
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
            norm = norms[level]
            y = (y - mean.view(1, -1, 1, 1)) / torch.sqrt(var + 1e-4).view(1, -1, 1, 1)
            y = torch.relu(y * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1))
            expected = F.conv2d(y, last.weight, last.bias, padding=1)
            torch.testing.assert_close(outputs[level], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(norm.running_mean, 0.003 * mean, rtol=1e-4, atol=1e-6)
    assert before.keys() == head.state_dict().keys()


def test_default_keys_keep_detectron2s_shared_weight_and_bias(paper_config):
    paper_config.MODEL.RETINANET.NORM = "BN"
    paper_config.MODEL.RETINANET.NORM_AFFINE_PER_LEVEL = False
    ours = build_model(paper_config)
    paper_config.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert ours.state_dict().keys() == build_model(paper_config).state_dict().keys()
    (layer, *_) = _norm_layers(ours.head)
    assert layer.weight.shape == (16,) and not layer[0].affine
    assert layer[0].eps == 1e-4 and layer[0].momentum == 0.003


@pytest.mark.parametrize("norm", ["", "BN", "SyncBN", "FrozenBN"])
def test_every_kind_of_norm_trains_on_a_cpu(paper_config, norm):
    paper_config.MODEL.RETINANET.NORM = paper_config.MODEL.FPN.OUTPUT_NORM = norm
    model = build_model(paper_config).train()
    losses = _forward(model, _batch(["human", "pseudo"]))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- inference ----------------------------------------------------------------------------------------


def _inference(model, seed=0):
    """Detections from random head outputs that leave many candidates."""
    generator = torch.Generator().manual_seed(seed)
    anchors = [Boxes(torch.tensor(list(_anchors())))]
    number = len(anchors[0])
    scores = [torch.rand((number, model.num_classes), generator=generator)]
    deltas = [torch.randn((number, 4), generator=generator) * 0.1]
    model.test_topk_candidates = 300
    return anchors, scores, deltas


@pytest.mark.parametrize("max_detections", [10, 400])
def test_soft_nms_takes_the_place_of_nms(model, max_detections):
    model.soft_nms_sigma, model.test_score_thresh = 0.3, 0.4
    model.max_detections_per_image = max_detections
    anchors, scores, deltas = _inference(model)
    result = model.inference_single_image(anchors, scores, deltas, (SIZE, SIZE))
    candidates = model._decode_multi_level_predictions(anchors, scores, deltas, 0.4, 300, (SIZE, SIZE))
    keep, expected = soft_nms(
        candidates.pred_boxes.tensor,
        candidates.scores,
        candidates.pred_classes,
        sigma=0.3,
        score_thresh=0.4,
        max_detections=max_detections,
    )
    assert torch.equal(result.scores, expected) and len(result) == len(keep) <= max_detections
    assert torch.equal(result.pred_boxes.tensor, candidates.pred_boxes.tensor[keep])
    assert (result.scores > 0.4).all() and (result.scores.diff() <= 0).all()
    assert (result.scores < candidates.scores[keep]).any()
    assert len(result) < len(candidates)


def test_sigma_zero_is_detectron2s_nms(model, paper_config):
    paper_config.MODEL.META_ARCHITECTURE = "RetinaNet"
    plain = build_model(paper_config)
    inputs = _inference(model)
    _inference(plain)
    ours = model.inference_single_image(*inputs, (SIZE, SIZE))
    theirs = plain.inference_single_image(*inputs, (SIZE, SIZE))
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


def test_a_whole_image_with_soft_nms(paper_config):
    paper_config.MODEL.RETINANET.SOFT_NMS_SIGMA = 0.3
    paper_config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.001
    model = build_model(paper_config).eval()
    with torch.no_grad():
        (output,) = model([{**_batch(["human"])[0], "height": 48, "width": 48}])
    instances = output["instances"]
    assert 0 < len(instances) <= 100 and instances.image_size == (48, 48)


@pytest.mark.parametrize(("key", "value"), [("LOSS_NORMALIZER", "ema"), ("SOFT_NMS_SIGMA", -0.1)])
def test_impossible_values(paper_config, key, value):
    paper_config.MODEL.RETINANET[key] = value
    with pytest.raises(InputError, match=f"MODEL.RETINANET.{key}"):
        build_model(paper_config)
