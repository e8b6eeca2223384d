"""Labels and losses with ignored boxes, against anchors painted into pixels and losses computed by hand."""

import copy

import numpy as np
import pytest
import torch
from conftest import small_rcnn_config
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from test_dense import _fcos, _retinanet

from selftrain_d2 import InputError
from selftrain_d2.engine.replay import _from_plain, _to_plain
from selftrain_d2.engine.step_trainer import split_batch
from selftrain_d2.modeling.meta_arch import SelfTrainingFCOS, SelfTrainingRetinaNet
from selftrain_d2.modeling.meta_arch.ignored_boxes import OverlapRule

SIZE = 96
#: Of a pseudo image: one is over the object, one too small for an anchor, one covers many; no share is just a half.
IGNORED = torch.tensor([[12.3, 8.7, 36.1, 44.9], [56.2, 56.3, 64.9, 61.4], [40.6, 16.2, 92.7, 80.4]])
OBJECT = torch.tensor([[8.0, 8.0, 40.0, 48.0]])


def _batch(ignored=IGNORED):
    """Human, pseudo (with an object), human, pseudo (without), pseudo (nothing ignored)."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for source, objects, boxes in (
        ("human", OBJECT, None),
        ("pseudo", OBJECT, ignored),
        ("human", OBJECT + 30, None),
        ("pseudo", OBJECT[:0], ignored),
        ("pseudo", OBJECT + 20, None if ignored is None else ignored[:0]),
    ):
        instances = Instances((SIZE, SIZE))
        instances.gt_boxes = Boxes(objects.clone())
        instances.gt_classes = torch.arange(len(objects)) + 1
        image = torch.randint(0, 255, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        sample = {"image": image, "instances": instances, "label_source": source}
        batch.append(sample if boxes is None else {**sample, "ignored_boxes": Boxes(boxes)})
    return batch


def _losses(model, batch):
    torch.manual_seed(0)
    with EventStorage():
        return model(batch)


# ---- the rule ---------------------------------------------------------------------------------------


def _painted(box, canvas=200, offset=60):
    """Whole pixels of a box that may reach out of the image, (canvas, canvas) bool."""
    x0, y0, x1, y1 = (int(v) + offset for v in box)
    pixels = np.zeros((canvas, canvas), bool)
    pixels[y0:y1, x0:x1] = True
    return pixels


@pytest.mark.parametrize("overlap", ["covered", "iou"])
@pytest.mark.parametrize("threshold", [0.25, 0.5, 1.0])
def test_what_is_covered_is_counted_in_pixels(overlap, threshold):
    rng = np.random.default_rng(0)
    corners = rng.integers(-20, 60, (40, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 40, (40, 2))], axis=1)
    ignored, others = (
        boxes[:6],
        np.concatenate([boxes[6:], boxes[:2], [[5, 5, 5, 9]]]),
    )  # the last without area
    expected = []
    for other in others:
        shares = []
        for box in ignored:
            one, two = _painted(other), _painted(box)
            whole = one.sum() if overlap == "covered" else (one | two).sum()
            shares.append((one & two).sum() / whole if whole else 0.0)
        expected.append(max(shares) >= threshold)
    rule = OverlapRule(overlap, threshold)
    found = rule.covered(Boxes(torch.tensor(others).float()), Boxes(torch.tensor(ignored).float()))
    assert found.tolist() == expected and any(expected) and not all(expected)
    assert not rule.covered(Boxes(torch.tensor(others).float()), Boxes(torch.zeros(0, 4))).any()


def test_the_rule_of_a_config(small_config):
    keys = ["SELFTRAIN.IGNORE_OVERLAP", "iou", "SELFTRAIN.IGNORE_OVERLAP_THRESH", 0.3]
    small_config.merge_from_list(keys)
    assert build_model(small_config).ignore_rule == OverlapRule("iou", 0.3)
    cfg = small_rcnn_config("SelfTrainingGeneralizedRCNN")
    assert build_model(cfg).ignore_rule == OverlapRule("covered", 0.5)
    cfg.merge_from_list(keys)
    assert build_model(cfg).ignore_rule == OverlapRule("iou", 0.3)


# ---- dense detectors --------------------------------------------------------------------------------


def _covered_anchors(anchors):
    """By COCO's rule, anchor by anchor."""

    def share(x0, y0, x1, y1, a, b, c, d):
        width, height = min(x1, c) - max(x0, a), min(y1, d) - max(y0, b)
        return width * height / ((x1 - x0) * (y1 - y0)) if width > 0 and height > 0 else 0.0

    return torch.tensor(
        [any(share(*anchor, *box) >= 0.5 for box in IGNORED.tolist()) for anchor in anchors.tolist()]
    )


def _covered_locations(anchors):
    x, y = (anchors[:, 0] + anchors[:, 2]) / 2, (anchors[:, 1] + anchors[:, 3]) / 2
    inside = [(x > a) & (x < c) & (y > b) & (y < d) for a, b, c, d in IGNORED]
    return torch.stack(inside).any(dim=0)


def _focal_loss(logits, labels):
    """Lin et al., arXiv:1708.02002, eq. 5; alpha 0.25, gamma 2. labels (R,): K is background; logits (R, K)."""
    targets = labels[:, None] == torch.arange(logits.shape[1])
    p = logits.double().sigmoid()
    p_t, alpha_t = torch.where(targets, p, 1 - p), torch.where(targets, 0.25, 0.75)
    return (-alpha_t * (1 - p_t) ** 2 * p_t.log()).sum()


DENSE = [
    (_retinanet, RetinaNet, SelfTrainingRetinaNet, _covered_anchors, "loss_cls"),
    (_fcos, FCOS, SelfTrainingFCOS, _covered_locations, "loss_fcos_cls"),
]


@pytest.fixture(params=DENSE, ids=["retinanet", "fcos"])
def dense(request):
    """A detector of each kind: with the plain one's labels, the oracle of what is covered, and the loss's name."""
    lazy, plain, ours, covered, name = request.param
    torch.manual_seed(0)
    model = instantiate(lazy(ours)).train()
    model.normalize_by_batch = True
    return model, plain.label_anchors, covered, name


def test_the_class_loss_is_that_of_the_anchors_that_are_not_ignored(dense):
    """The others keep labels, losses and the number that all losses are divided by; ignored ones have no gradient."""
    model, plain_labels, covered, name = dense
    batch, heads = _batch(), []

    def keep(module, inputs, outputs):
        for level in outputs[0]:
            level.retain_grad()
        heads.append(outputs[0])

    with EventStorage():
        model.head.register_forward_hook(keep)
        losses = model(batch)
        anchors = model.anchor_generator([torch.empty(1, 1, *level.shape[2:]) for level in heads[0]])
        labels = plain_labels(model, anchors, [x["instances"] for x in batch])[0]
    is_covered = covered(Boxes.cat(anchors).tensor)

    def by_anchor(levels):  # (N, A * K, H, W) -> (N, R, K)
        return torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, 2) for x in levels], dim=1)

    logits = by_anchor(heads[0])
    for source, images in (("human", [0, 2]), ("pseudo", [1, 3, 4])):
        positives, total, ignored = 0, 0.0, 0
        for image in images:
            counts = labels[image] >= 0
            if len(batch[image].get("ignored_boxes", ())):
                no_background = (labels[image] == 2) & is_covered
                ignored += no_background.sum()
                counts &= ~no_background
            positives += ((labels[image] >= 0) & (labels[image] < 2)).sum()
            total += _focal_loss(logits[image][counts], labels[image][counts])
        assert (ignored > 20) == (source == "pseudo") and positives > 0
        torch.testing.assert_close(
            losses[f"{name}_{source}"].double(), total / (1 + positives), rtol=1e-5, atol=0
        )
    assert ((labels[1] == 1) & is_covered).any()  # certain boxes win over uncertain ones

    sum(losses.values()).backward()
    gradient = by_anchor([level.grad for level in heads[0]]).abs().sum(dim=2)
    for image in (1, 3):
        assert torch.equal(gradient[image] == 0, (labels[image] < 0) | ((labels[image] == 2) & is_covered))
    assert (gradient[4][labels[4] >= 0] > 0).all()

    without = _losses(copy.deepcopy(model), _batch(ignored=None))
    for part in losses:
        if part != f"{name}_pseudo":
            assert torch.equal(losses[part], without[part]), part
    assert losses[f"{name}_pseudo"] < without[f"{name}_pseudo"]


def test_an_accumulated_step_with_ignored_boxes_is_the_step_of_the_whole_batch(dense):
    model, *_ = dense
    model.normalize_by_batch = False
    batch = _batch()[:4]
    whole, in_parts = copy.deepcopy(model), copy.deepcopy(model)
    expected = _losses(whole, batch)
    parts = split_batch(batch, 2)
    with EventStorage(), in_parts.one_step(parts):
        passes = [in_parts(part) for part in parts]
    for name in expected:
        torch.testing.assert_close(sum(p[name] for p in passes) / 2, expected[name], rtol=1e-4, atol=1e-6)
    assert in_parts.positive_anchor_averages == whole.positive_anchor_averages
    counts = in_parts.label_counts["ignored_boxes"]
    assert counts == whole.label_counts["ignored_boxes"]
    assert (counts["pseudo"].images, counts["pseudo"].labels, counts["human"].images) == (2, 6, 0)


def test_nothing_to_ignore_is_nothing_changed(dense):
    model, *_ = dense
    expected = _losses(copy.deepcopy(model), _batch(ignored=None))
    found = _losses(model, _batch(ignored=IGNORED[:0]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# ---- R-CNN ------------------------------------------------------------------------------------------

CASCADE = {"MODEL__ROI_HEADS__NAME": "CascadeROIHeads", "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": "True"}


def _watched(model, monkeypatch):
    """What losses are computed of: RPN's anchors, logits and labels; proposals of the heads, stage by stage."""
    seen = {"rpn": [], "stages": []}
    rpn = model.proposal_generator
    rpn_losses = rpn.losses

    def keep_rpn(anchors, logits, labels, *others):
        seen["rpn"].append((Boxes.cat(anchors).tensor, torch.cat(logits, 1).detach(), torch.stack(labels)))
        return rpn_losses(anchors, logits, labels, *others)

    monkeypatch.setattr(rpn, "losses", keep_rpn)
    predictors = model.roi_heads.box_predictor
    for predictor in predictors if isinstance(predictors, torch.nn.ModuleList) else [predictors]:

        def keep(predictions, proposals, losses=predictor.losses):
            seen["stages"].append(proposals)
            return losses(predictions, proposals)

        monkeypatch.setattr(predictor, "losses", keep)
    return seen


def _rows(proposals, of=slice(None)):
    """Boxes and classes as a set of tuples."""
    rows = torch.cat([proposals.proposal_boxes.tensor, proposals.gt_classes[:, None].float()], dim=1)
    return {tuple(round(v, 3) for v in row) for row in rows[of].tolist()}


@pytest.mark.parametrize("options", [{}, CASCADE], ids=["faster", "cascade"])
def test_an_rcnn_samples_nothing_that_is_ignored_as_background(monkeypatch, options):
    """Here every anchor and proposal is sampled, so that those that are left out can be told."""
    cfg = small_rcnn_config("SelfTrainingGeneralizedRCNN", **options)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    seen = _watched(model, monkeypatch)
    plain = _losses(model, _batch(ignored=None))
    before = {part: list(seen[part]) for part in seen}
    seen["rpn"].clear(), seen["stages"].clear()
    losses = _losses(model, _batch())

    covered = _covered_anchors(seen["rpn"][1][0])
    (_, _, human), (_, logits, labels) = seen["rpn"]
    assert torch.equal(human, before["rpn"][0][2])
    expected = before["rpn"][1][2].clone()
    expected[:2][(expected[:2] == 0) & covered] = -1
    assert torch.equal(labels, expected) and (labels == -1).sum() > 20 and ((labels == 1) & covered).any()
    counted = labels >= 0
    targets = labels[counted].double()
    logits = logits[counted].double()
    by_hand = (logits.clamp(min=0) - logits * targets + (-logits.abs()).exp().log1p()).sum() / (100000 * 3)
    torch.testing.assert_close(losses["loss_rpn_cls_pseudo"].double(), by_hand)

    stages = len(seen["stages"]) // 2
    assert stages == (3 if options else 1)
    left_out = 0
    for stage in range(stages):
        now, was = seen["stages"][stages + stage], before["stages"][stages + stage]
        for image in range(3):
            is_covered = _covered_anchors(was[image].proposal_boxes.tensor)
            dropped = is_covered & (was[image].gt_classes == 2) & (image < 2)
            left_out += dropped.sum()
            if stage == 0:  # later ones have boxes that this one predicts
                assert _rows(now[image]) == _rows(was[image], ~dropped)
            elif image < 2:
                ours = _covered_anchors(now[image].proposal_boxes.tensor)
                assert not (ours & (now[image].gt_classes == 2)).any()
    assert left_out > 20
    human = [name for name in plain if name.endswith("_human")]
    assert human and all(torch.equal(losses[name], plain[name]) for name in human)
    sum(losses.values()).backward()
    # The RPN and the heads are as they were.
    for part in (model.proposal_generator, model.roi_heads):
        assert not {n for n in vars(part) if "sample" in n or "match_and_label" in n}


def test_others_are_sampled_in_place_of_what_is_ignored(monkeypatch):
    cfg = small_rcnn_config("SelfTrainingGeneralizedRCNN")
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 24
    torch.manual_seed(0)
    model = build_model(cfg).train()
    seen = _watched(model, monkeypatch)
    _losses(model, _batch())
    assert ((seen["rpn"][1][2] >= 0).sum(dim=1) == 24).all()
    assert [len(p) for p in seen["stages"][1]] == [24] * 3


def test_an_rcnn_without_anything_to_ignore_is_as_ever():
    torch.manual_seed(0)
    model = build_model(
        small_rcnn_config("SelfTrainingGeneralizedRCNN", MODEL__RPN__BATCH_SIZE_PER_IMAGE="32")
    )
    expected = _losses(model.train(), _batch(ignored=None))
    found = _losses(model, _batch(ignored=IGNORED[:0]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_architectures_that_cannot_ignore_say_so():
    cfg = small_rcnn_config("SelfTrainingSemanticSegmentor")
    batch = [{**x, "sem_seg": torch.zeros(SIZE, SIZE, dtype=torch.int64)} for x in _batch(IGNORED[:0])]
    with pytest.raises(InputError, match=r"SemanticSegmentor.*label boxes.*IGNORE_SCORE_THRESH to 0"):
        _losses(build_model(cfg).train(), batch)
    model = build_model(small_rcnn_config("SelfTrainingGeneralizedRCNN")).train()
    other = copy.copy(model.roi_heads)

    def own_sampling(proposals, targets):
        return type(other).label_and_sample_proposals(other, proposals, targets)

    model.roi_heads.label_and_sample_proposals = own_sampling
    with pytest.raises(InputError, match=r"GeneralizedRCNN.*sample boxes.*IGNORE_CROWD to False"):
        _losses(model, _batch())
    assert model.roi_heads.label_and_sample_proposals is own_sampling


def test_a_saved_batch_has_its_ignored_boxes():
    sample = _batch()[1]
    again = _from_plain(_to_plain(sample))
    assert torch.equal(again["ignored_boxes"].tensor, IGNORED)
    assert "ignored_boxes" not in _from_plain(_to_plain(_batch()[0]))
