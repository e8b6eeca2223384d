"""FCOS and RetinaNet built by LazyConfig, as projects without a yacs config have them."""

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from selftrain_d2 import LossNormalizer
from selftrain_d2.deployment.export import write_checked
from selftrain_d2.deployment.exported import exportable
from selftrain_d2.modeling.meta_arch import SelfTrainingFCOS, SelfTrainingRetinaNet

CHANNELS, SIZE = 16, 96
LEVELS = [ShapeSpec(channels=CHANNELS)] * 5


def _lazy(architecture, **arguments):
    backbone = LazyCall(FPN)(
        bottom_up=LazyCall(ResNet)(
            stem=LazyCall(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=LazyCall(ResNet.make_default_stages)(depth=18, norm="FrozenBN"),
            out_features=["res3", "res4", "res5"],
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=CHANNELS,
        top_block=LazyCall(LastLevelP6P7)(in_channels=CHANNELS, out_channels=CHANNELS, in_feature="p5"),
    )
    return LazyCall(architecture)(
        backbone=backbone,
        num_classes=2,
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[57.4, 57.1, 58.4],
        **arguments,
    )


def _fcos(architecture):
    head = LazyCall(FCOSHead)(input_shape=LEVELS, num_classes=2, conv_dims=[CHANNELS])
    return _lazy(architecture, head=head)


def _retinanet(architecture):
    return _lazy(
        architecture,
        head=LazyCall(RetinaNetHead)(input_shape=LEVELS, num_classes=2, conv_dims=[CHANNELS], num_anchors=3),
        anchor_generator=LazyCall(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64, 128],
        ),
        box2box_transform=LazyCall(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        anchor_matcher=LazyCall(Matcher)(
            thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
    )


DETECTORS = [(_fcos, FCOS, SelfTrainingFCOS), (_retinanet, RetinaNet, SelfTrainingRetinaNet)]


def _batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for i in range(4):
        instances = Instances((SIZE, SIZE))
        corner = torch.rand(i, 2, generator=generator) * 40
        instances.gt_boxes = Boxes(torch.cat([corner, corner + 30], dim=1))
        instances.gt_classes = torch.arange(i) % 2
        image = torch.randint(0, 255, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        # i boxes: the images of the sources are mixed, and one is empty
        batch.append({"image": image, "instances": instances, "label_source": ("pseudo", "human")[i % 2]})
    return batch


@pytest.mark.parametrize(("lazy", "plain", "ours"), DETECTORS)
def test_losses_and_gradients_are_the_plain_detectors(lazy, plain, ours):
    torch.manual_seed(0)
    plain = instantiate(lazy(plain)).train()
    ours = instantiate(lazy(ours)).train()
    ours.load_state_dict(plain.state_dict())  # the same names
    ours.loss_weights = (0.5, 3.0)
    batch = _batch()
    with EventStorage():
        losses = ours(batch)
    sum(losses.values()).backward()
    expected = 0.0
    for source, weight in zip(("human", "pseudo"), ours.loss_weights):
        # Each source has a moving average of its own, which begins with its own positive anchors.
        total, average_weight = ours.positive_anchor_averages[source]
        plain.loss_normalizer = total / average_weight
        with EventStorage():
            alone = plain([x for x in batch if x["label_source"] == source])
        for name, loss in alone.items():
            torch.testing.assert_close(losses[f"{name}_{source}"], weight * loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            ours.raw_losses[source], sum(alone.values()).detach(), rtol=1e-4, atol=1e-6
        )
        expected = expected + weight * sum(alone.values())
    expected.backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    # its plain forward, where there are no pseudo labels, and at inference
    with EventStorage():
        human_only = ours([{**x, "label_source": "human"} for x in batch])
    assert set(human_only) == set(alone)
    with torch.no_grad():
        for a, b in zip(ours.eval()(batch), plain.eval()(batch)):
            torch.testing.assert_close(a["instances"].scores, b["instances"].scores)


@pytest.mark.parametrize(("lazy", "plain", "ours"), DETECTORS)
def test_in_a_lazy_config_project(lazy, plain, ours):
    """As tools/lazyconfig_train_net.py of detectron2: a model, a loader, an optimizer, SimpleTrainer."""
    torch.manual_seed(0)
    model = instantiate(lazy(ours))
    model.normalize_by_batch = True  # losses of different steps can be compared
    trainer = SimpleTrainer(model, [_batch()] * 12, torch.optim.Adam(model.parameters(), lr=1e-3))
    normalizer = LossNormalizer(alpha=0.5)
    trainer.register_hooks([normalizer])
    trainer.train(0, 12)
    totals = [value for value, _ in trainer.storage.history("human_loss").values()]
    assert normalizer.steps == 12 and totals[-1] < totals[0]


@pytest.mark.parametrize("weight_format", ["onnx", "torchscript"])
@pytest.mark.parametrize("lazy", [_fcos, _retinanet])
def test_ours_can_be_exported(lazy, weight_format, tmp_path):
    torch.manual_seed(0)
    ours = SelfTrainingFCOS if lazy is _fcos else SelfTrainingRetinaNet
    function = exportable(instantiate(lazy(ours)).eval(), "BGR")
    write_checked(function, weight_format, tmp_path / "model", {})
    assert (tmp_path / "model").is_file()
