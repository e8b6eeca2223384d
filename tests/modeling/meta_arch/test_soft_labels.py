"""Soft labels: matching, targets and losses by hand, against detectron2's own, and from a folder of pseudo labels."""

import numpy as np
import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss
from test_box_weights import (
    _check_refused,
    _image,
    _iou,
    _l1_loss,
    _losses,
    _model,
    _plain_mapper,
    _predictions,
    _pseudo_labels,
    _weighted,
)
from test_dense import _batch

from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.engine.config_checks import check_score_weights
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.matcher import BestAnchorMatcher, labels_of_each_box
from selftrain_d2.modeling.meta_arch.soft_labels import soft_focal_loss, soft_targets


@pytest.mark.parametrize(
    "matcher",
    [
        BestAnchorMatcher([0.5], [0, 1]),
        BestAnchorMatcher([0.4, 0.5], [0, -1, 1]),
        Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        Matcher([0.4, 0.5], [0, -1, 1]),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_labels_of_each_box_are_the_matchers_of_one_row(matcher, seed):
    # Few distinct values: ties and exact thresholds. The first box meets no anchor.
    overlap = torch.randint(0, 9, (6, 8), generator=torch.Generator().manual_seed(seed)) / 10
    overlap[0] *= 0
    rows = [matcher(row[None])[1] for row in overlap]
    assert torch.equal(labels_of_each_box(matcher, overlap), torch.stack(rows))
    assert labels_of_each_box(matcher, torch.zeros(0, 7)).shape == (0, 7)


def test_targets_by_hand():
    """Three guesses, two at one place; the anchor that nearly predicts a box learns less that it is background."""
    labels = torch.tensor([[1, 1, -1, 0], [1, 0, 0, 0], [-1, 1, 0, 0]], dtype=torch.int8)
    classes, scores = torch.tensor([0, 2, 0]), torch.tensor([0.6, 0.3, 0.9])
    targets, weights = soft_targets(labels, classes, scores, 3)
    assert torch.equal(targets, torch.tensor([[0.6, 0, 0.3], [0.9, 0, 0], [0, 0, 0], [0, 0, 0]]))
    torch.testing.assert_close(weights, torch.tensor([1 - (0.9 - 0.6), 1, 1 - 0.6, 1]))
    targets, weights = soft_targets(labels[:0], classes[:0], scores[:0], 3)
    assert torch.equal(targets, torch.zeros(4, 3)) and torch.equal(weights, torch.ones(4))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 1.5), (0.25, 2.0), (-1, 2.0)])
def test_soft_focal_loss(alpha, gamma):
    """The focal loss at 0 and 1; 0, its least value, where the probability is the target."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    hard = torch.arange(50) % 2.0
    expected = sigmoid_focal_loss(logits, hard, alpha, gamma)
    torch.testing.assert_close(soft_focal_loss(logits, hard, alpha, gamma), expected)
    target = torch.tensor(0.3)
    probabilities = torch.linspace(0.05, 0.95, 19)
    losses = soft_focal_loss(probabilities.logit(), target.expand(19), alpha, gamma)
    assert losses.argmin() == 5 and losses[5] < 1e-6
    assert (losses[:6].diff() < 0).all() and (losses[5:].diff() > 0).all()


def _soft(batch, *scores):
    return _weighted(batch, *scores, field="gt_scores")


def _apart():
    """A batch whose pseudo-labeled boxes share no anchor."""
    batch = _batch()
    batch[2]["instances"].gt_boxes = Boxes(torch.tensor([[2.0, 2, 30, 34], [56, 50, 92, 90]]))
    return batch


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_scores_of_one_are_hard_labels(kind):
    model, batch = _model(kind), _apart()
    expected, gradients = _losses(model, batch)
    found, found_gradients = _losses(model, _soft(batch, 1.0, 1.0))
    assert found == pytest.approx(expected, rel=1e-4)
    for one, other in zip(found_gradients, gradients):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_ignored_boxes_are_still_ignored(kind):
    model, batch = _model(kind), _apart()
    torch.nn.init.zeros_(model.head.cls_score.bias)  # background has a loss worth naming
    batch[2]["ignored_boxes"] = Boxes(torch.tensor([[20.0, 20.0, 90.0, 90.0]]))
    expected, _ = _losses(model, batch)
    assert expected != pytest.approx(_losses(model, _apart())[0], rel=1e-4)
    assert _losses(model, _soft(batch, 1.0, 1.0))[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_parts_of_a_batch_are_the_batch(kind):
    """Gradient accumulation: the number of positive anchors is that of the step."""
    model, batch = _model(kind), _soft(_batch(), 0.3, 0.8)
    model.normalize_by_batch = kind == "retinanet"
    whole, gradients = _losses(model, batch)
    model.positive_anchor_averages = {}
    model.zero_grad()
    parts = [[batch[2], batch[1]], [batch[0], batch[3]]]
    with EventStorage(), model.one_step(parts):
        for part in parts:
            (sum(model(part).values()) / 2).backward()
    for one, other in zip((p.grad for p in model.parameters() if p.grad is not None), gradients):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert whole["loss_cls_pseudo" if kind == "retinanet" else "loss_fcos_cls_pseudo"] > 0


def test_losses_of_two_guesses_by_hand():
    """Matching, loss towards both classes and L1 loss of RetinaNet in numpy, anchor by anchor."""
    model = _model("retinanet")
    model.normalize_by_batch = True
    image = _image()
    boxes, classes, scores = np.array([[8.0, 8, 40, 48], [10, 8, 42, 46]]), [1, 0], [0.3, 0.8]
    instances = Instances((96, 96), gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    instances.gt_classes, instances.gt_scores = torch.tensor(classes), torch.tensor(scores)
    found, _ = _losses(model, [{"image": image, "instances": instances, "label_source": "pseudo"}])
    assert model.label_counts["boxes"]["pseudo"].labels == pytest.approx(1.1)

    logits, deltas, anchors = _predictions(model, image)
    iou = np.stack([_iou(box, anchors) for box in boxes])
    best_of_box = iou == iou.max(axis=1, keepdims=True)
    of_class, of_box, positives = 0.0, 0.0, 0.0
    for i, anchor in enumerate(anchors):
        positive = [iou[box, i] >= 0.5 or best_of_box[box, i] for box in range(2)]
        nearly = [iou[box, i] >= 0.4 and not positive[box] for box in range(2)]
        most = max(score * is_one for score, is_one in zip(scores, positive))
        weight = 1 - max(0, *(score - most for score, is_near in zip(scores, nearly) if is_near), 0)
        for box, k in enumerate(classes):  # of two classes each has one box
            p = 1 / (1 + np.exp(-logits[i, k]))
            target = scores[box] * positive[box]
            cross_entropy = -target * np.log(p) - (1 - target) * np.log1p(-p)
            of_class += weight * (0.25 * target + 0.75 * (1 - target)) * (target - p) ** 2 * cross_entropy
        best = int(iou[:, i].argmax())
        if iou[best, i] >= 0.5 or best_of_box[:, i].any():
            positives += scores[best]
            of_box += scores[best] * _l1_loss(deltas[i], anchor, boxes[best])
    assert positives > 1.5
    assert found["loss_cls_pseudo"] == pytest.approx(of_class / (positives + 1), rel=1e-4)
    assert found["loss_box_reg_pseudo"] == pytest.approx(of_box / (positives + 1), rel=1e-4)


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_from_labels_on_disk(kind, tmp_path):
    """The second guess at a place is learned too, and only with the key; people's boxes stay hard."""
    _pseudo_labels(tmp_path / "labels", tmp_path, [[8, 8, 40, 40], [9, 8, 40, 41]], [0.6, 0.35])
    mapper = _plain_mapper("SOFT_LABELS")
    dataset = load_pseudo_labels(tmp_path / "labels", 0.5, ignore_score_thresh=0.1, score_weighted=True)
    sample = mapper(dataset[0])
    assert sample["instances"].gt_scores.tolist() == pytest.approx([0.6, 0.35])
    assert not sample["instances"].has("gt_weights")
    assert not mapper({**dataset[0], "label_source": "human"})["instances"].has("gt_scores")

    by_hand = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40], [9, 8, 40, 41]])))
    by_hand.gt_classes, by_hand.gt_scores = torch.tensor([0, 1]), torch.tensor([0.6, 0.35])
    model = _model(kind)
    found, _ = _losses(model, [sample])
    assert found == pytest.approx(_losses(model, [{**sample, "instances": by_hand}])[0], rel=1e-6)
    by_hand.gt_scores = torch.tensor([0.6, 0.1])
    assert found != pytest.approx(_losses(model, [{**sample, "instances": by_hand}])[0], rel=1e-3)


def test_refusals():
    message = "SelfTrainingGeneralizedRCNN has no class loss .* set SELFTRAIN.SOFT_LABELS False"
    cfg, model = _check_refused("SelfTrainingGeneralizedRCNN", "SOFT_LABELS", "gt_scores", message)
    cfg.SELFTRAIN.SCORE_WEIGHTED = True
    with pytest.raises(InputError, match="set one of them False"):
        check_score_weights(cfg, model)
