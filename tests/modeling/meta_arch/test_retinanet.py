import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage


def _batch(sources, size=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for i, source in enumerate(sources):
        instances = Instances((size, size))
        boxes = torch.tensor([[8.0, 8.0, 40.0 + 4 * i, 48.0]]).repeat(i % 3, 1)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.arange(len(boxes)) % 2
        image = torch.randint(0, 255, (3, size, size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "label_source": source})
    return batch


# What the paper changed in RetinaNet, changed back.
DETECTRON2 = [
    "MODEL.FPN.OUTPUT_NORM", "",
    "MODEL.RETINANET.NORM", "",
    "MODEL.RETINANET.NORM_AFFINE_PER_LEVEL", False,
    "MODEL.RETINANET.FORCE_BEST_ANCHOR", False,
    "MODEL.RETINANET.LOSS_NORMALIZER", "moving_average",
    "MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT", 1.0,
]  # fmt: skip


@pytest.fixture
def model(small_config):
    """With detectron2's losses and head. (test_paper_retinanet.py has the paper's.)"""
    torch.manual_seed(0)
    small_config.MODEL.EFFICIENTNET.DROP_CONNECT_RATE = 0.0
    small_config.merge_from_list(DETECTRON2)
    return build_model(small_config).train()


def _forward(model, batch):
    with EventStorage():
        return model(batch)


def test_mixed_batch_gives_the_losses_of_each_source_alone(model):
    """With batch norm frozen, each source's loss is RetinaNet's loss of that source's images."""
    model.backbone.eval()
    model.normalize_by_batch = True  # an average of one step, as it is without a start value
    batch = _batch(["human", "pseudo", "pseudo", "human", "pseudo"])
    model.loss_weights = (0.25, 3.0)
    mixed = _forward(copy.deepcopy(model), batch)
    assert set(mixed) == {f"loss_{a}_{b}" for a in ("cls", "box_reg") for b in ("human", "pseudo")}
    for source, weight in zip(("human", "pseudo"), model.loss_weights):
        alone = _forward(
            copy.deepcopy(model),
            [{**x, "label_source": "human"} for x in batch if x["label_source"] == source],
        )
        for name, loss in alone.items():
            torch.testing.assert_close(mixed[f"{name}_{source}"], weight * loss)


def test_without_pseudo_labels_it_is_retinanet(model, small_config):
    batch = _batch(["human"] * 3)
    small_config.MODEL.META_ARCHITECTURE = "RetinaNet"
    plain = build_model(small_config).train()
    plain.load_state_dict(model.state_dict())
    model.loss_weights = (0.1, 0.1)  # of no effect here
    ours, theirs = _forward(model, batch), _forward(plain, batch)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_gradient_is_the_weighted_sum_of_both_gradients(model):
    batch = _batch(["human", "human", "pseudo", "pseudo"])
    weights = (1 / 3, 1.7)

    def gradient(pair):
        copied = copy.deepcopy(model)
        copied.loss_weights = pair
        sum(_forward(copied, batch).values()).backward()
        return [p.grad for p in copied.parameters()]

    human, pseudo, both = gradient((1.0, 0.0)), gradient((0.0, 1.0)), gradient(weights)
    for h, p, b in zip(human, pseudo, both):
        torch.testing.assert_close(b, weights[0] * h + weights[1] * p, rtol=1e-4, atol=1e-6)


def test_batch_norm_sees_the_mixed_batch(model):
    """Running statistics are those of one pass over all images, whatever their sources."""
    batch = _batch(["human", "human", "pseudo", "pseudo"])
    other = copy.deepcopy(model)
    _forward(model, batch)
    _forward(other, [{**x, "label_source": "human"} for x in batch])
    for (name, ours), theirs in zip(model.named_buffers(), other.buffers()):
        assert torch.equal(ours, theirs), name


def test_raw_losses_are_unweighted_and_detached(model):
    batch = _batch(["human", "pseudo"])
    model.loss_weights = (0.5, 4.0)
    losses = _forward(model, batch)
    for source, weight in zip(("human", "pseudo"), model.loss_weights):
        raw = model.raw_losses[source]
        assert not raw.requires_grad
        total = losses[f"loss_cls_{source}"] + losses[f"loss_box_reg_{source}"]
        torch.testing.assert_close(raw * weight, total.detach())
    _forward(model, _batch(["human", "human"]))
    assert model.raw_losses["pseudo"] is None


def test_positive_anchors_of_each_source_are_averaged_apart(model):
    """Each average moves once a step and has no start value: losses are divided by the positives from step 1 on."""
    batch = _batch(["human", "human", "human", "pseudo"])  # the pseudo image has no box
    model.normalize_by_batch = True
    by_batch = _forward(model, batch)
    positives = model._normalizers["human"] - 1
    assert positives > 1
    model.normalize_by_batch = False
    for _ in range(10):
        losses = _forward(model, batch)
        # max(number of positives, 1) = 1 of the pseudo image, 1 + the number in `by_batch`
        torch.testing.assert_close(losses["loss_cls_pseudo"], by_batch["loss_cls_pseudo"], rtol=0.1, atol=0)
        averages = {
            source: total / weight for source, (total, weight) in model.positive_anchor_averages.items()
        }
        assert averages == pytest.approx({"human": positives, "pseudo": 1.0})


def test_a_start_value_of_detectron2_does_not_shift_the_ratio_of_sources(model):
    """Equal losses a positive anchor, 800 human and 200 pseudo ones: equal losses of the sources, at every step."""
    model._sources = {"human": [0], "pseudo": [1]}
    for _ in range(3):
        model._normalizers, model._positives = {}, {"human": 800, "pseudo": 200}
        losses = {}
        for source, positives in model._positives.items():
            model._source = source
            losses[source] = positives * 0.5 / model._ema_update("loss_normalizer", positives, 100)
        assert losses["human"] / losses["pseudo"] == pytest.approx(
            1.0
        )  # 2.59 at step 1 with detectron2's 100
    # Without pseudo labels the numbers are detectron2's.
    model._sources, model.positive_anchor_averages, model._source = {"human": [0]}, {}, "human"
    for step in range(1, 4):
        model._normalizers, model._positives = {}, {"human": 800}
        assert model._ema_update("loss_normalizer", 800, 100) == pytest.approx(800 - 700 * 0.9**step)


def test_weights_of_a_plain_retinanet_fit(model, small_config):
    small_config.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert build_model(small_config).state_dict().keys() == model.state_dict().keys()


def test_a_batch_of_empty_pseudo_images_trains(model):
    losses = _forward(model, [_batch(["human"])[0], *_batch(["pseudo"] * 1)])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
