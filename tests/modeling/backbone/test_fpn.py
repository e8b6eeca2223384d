import logging

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint import load_weights, require_complete


def make_config(base=None, name="build_retinanet_efficientnet_fpn_backbone"):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    if base:
        cfg.merge_from_file(model_zoo.get_config_file(base), allow_unsafe=True)
    else:
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.EFFICIENTNET.NAME = "efficientnet-b0"
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def sample(height=100, width=90):
    target = Instances((height, width))
    target.gt_boxes = Boxes(torch.tensor([[10.0, 10, 60, 70], [30, 30, 80, 90]]))
    target.gt_classes = torch.tensor([1, 3])
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 10:70, 10:60] = masks[1, 30:90, 30:80] = True
    target.gt_masks = BitMasks(masks)
    return {"image": torch.randint(0, 255, (3, height, width), dtype=torch.uint8), "instances": target}


def test_registered():
    for name in (
        "build_efficientnet_backbone",
        "build_efficientnet_fpn_backbone",
        "build_retinanet_efficientnet_fpn_backbone",
    ):
        assert name in BACKBONE_REGISTRY


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "build_efficientnet_fpn_backbone"),
        ("Base-RetinaNet.yaml", "build_retinanet_efficientnet_fpn_backbone"),
    ],
)
def test_detectron2_configs_work_with_the_backbone_name_changed(base, name):
    cfg = make_config(base, name)
    if cfg.MODEL.MASK_ON:
        cfg.INPUT.MASK_FORMAT = "bitmask"
    torch.manual_seed(0)
    model = build_model(cfg)
    with EventStorage():
        losses = model([sample(), sample(64, 128)])
    assert len(losses) == (5 if cfg.MODEL.MASK_ON else 2)
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    model.eval()
    with torch.no_grad():
        (output,) = model([sample(101, 67)])  # not a multiple of 32: detectron2 pads
    assert output["instances"].image_size == (101, 67)


def test_levels_of_r_cnns():
    backbone = build_backbone(make_config("Base-RCNN-FPN.yaml", "build_efficientnet_fpn_backbone")).eval()
    assert {k: (s.stride, s.channels) for k, s in backbone.output_shape().items()} == {
        f"p{k}": (2**k, 256) for k in range(2, 7)
    }
    assert backbone.size_divisibility == 32
    features = backbone(torch.randn(1, 3, 64, 128))
    assert {k: tuple(v.shape[-2:]) for k, v in features.items()} == {
        "p2": (16, 32),
        "p3": (8, 16),
        "p4": (4, 8),
        "p5": (2, 4),
        "p6": (1, 2),
    }
    torch.testing.assert_close(features["p6"], features["p5"][..., ::2, ::2])


def test_levels_of_retinanet():
    cfg = make_config()
    cfg.MODEL.FPN.OUT_CHANNELS = 48
    backbone = build_backbone(cfg).eval()
    assert {k: (s.stride, s.channels) for k, s in backbone.output_shape().items()} == {
        f"p{k}": (2**k, 48) for k in range(3, 8)
    }
    features = backbone(torch.randn(2, 3, 128, 256))
    top = backbone.top_block
    p6 = F.conv2d(features["p5"], top.p6.weight, top.p6.bias, stride=2, padding=1)
    p7 = F.conv2d(p6.relu(), top.p7.weight, top.p7.bias, stride=2, padding=1)
    torch.testing.assert_close(features["p6"], p6)
    torch.testing.assert_close(features["p7"], p7)


RETINANET = ("SelfTrainingRetinaNet", "RETINANET", "build_retinanet_efficientnet_fpn_backbone")
SEGMENTOR = ("SelfTrainingSegmentor", "SEM_SEG_HEAD", "build_retinanet_efficientnet_fpn_backbone")
RCNN = ("SelfTrainingGeneralizedRCNN", "ROI_HEADS", "build_efficientnet_fpn_backbone")


@pytest.mark.parametrize(
    ("model", "used", "built"),
    [
        (RETINANET, ["p3", "p4", "p5", "p6", "p7"], ["p3", "p4", "p5", "p6", "p7"]),
        (RETINANET, ["p5", "p3", "p6"], ["p3", "p4", "p5", "p6"]),
        (RETINANET, ["p3", "p4", "p5"], ["p3", "p4", "p5"]),
        (SEGMENTOR, ["p3", "p4", "p5"], ["p3", "p4", "p5"]),
        (RCNN, ["p3", "p4", "p5"], ["p3", "p4", "p5"]),
        (RCNN, ["p3", "p6"], ["p3", "p4", "p5", "p6"]),
    ],
)
def test_levels_above_p5_that_no_head_uses_are_not_built(model, used, built):
    """What is built has the values that it has beside all levels."""
    architecture, head, backbone = model
    cfg = make_config(name=backbone)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.FPN.OUTPUT_NORM = architecture, "BN"
    cfg.MODEL.RPN.IN_FEATURES = ["p3"]
    everything = cfg.clone()
    everything.MODEL[head].IN_FEATURES = ["p7"]
    cfg.MODEL[head].IN_FEATURES = used
    features = {}
    for config in (cfg, everything):
        torch.manual_seed(0)
        net = build_backbone(config).eval()
        with torch.no_grad():
            features[config is cfg] = net(torch.linspace(-1, 1, 3 * 128 * 128).view(1, 3, 128, 128))
        if config is cfg:
            assert list(net.output_shape()) == list(features[True]) == built
            assert {key.split(".")[1] for key in net.state_dict() if key.startswith("output_norms")} == set(
                built
            )
    for name in built:
        torch.testing.assert_close(features[True][name], features[False][name], rtol=0, atol=0)


def test_weights_that_have_those_levels_still_load(tmp_path):
    cfg = make_config()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.FPN.OUTPUT_NORM = "SelfTrainingRetinaNet", "BN"
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.RETINANET.NUM_CONVS = 16, 1
    with_all = build_model(cfg)
    torch.save({"model": with_all.state_dict()}, tmp_path / "old.pth")
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5"]
    model = build_model(cfg)
    report = load_weights(model, str(tmp_path / "old.pth"))
    require_complete(report, "old.pth")
    assert report.unexpected and all("p6" in name or "p7" in name for name in report.unexpected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, with_all.state_dict()[name]), name


@pytest.mark.parametrize("norm", ["", "BN", "SyncBN", "FrozenBN", "GN"])
def test_pyramid_norms_train_on_a_cpu(norm):
    cfg = make_config()
    cfg.MODEL.FPN.NORM = norm
    features = build_backbone(cfg)(torch.randn(2, 3, 64, 64))
    sum(f.sum() for f in features.values()).backward()


def test_plain_backbone_takes_its_features_from_the_config():
    cfg = make_config(name="build_efficientnet_backbone")
    cfg.MODEL.EFFICIENTNET.OUT_FEATURES = ["res4"]
    cfg.MODEL.EFFICIENTNET.NORM = "FrozenBN"
    backbone = build_backbone(cfg)
    assert {k: s.stride for k, s in backbone.output_shape().items()} == {"res4": 16}
    assert not any(n.endswith("_bn0.weight") for n, _ in backbone.named_parameters())


@pytest.mark.parametrize("features", [[], ["res3", "res4"], ["p3", "res5"]])
def test_impossible_in_features(features):
    cfg = make_config()
    cfg.MODEL.FPN.IN_FEATURES = features
    with pytest.raises(InputError, match=r"MODEL\.FPN\.IN_FEATURES"):
        build_backbone(cfg)


def test_frozen_random_layers_are_warned_about(caplog):
    cfg = make_config()
    with caplog.at_level(logging.WARNING, "selftrain_d2"):
        build_backbone(cfg)
        assert not caplog.records
        cfg.MODEL.BACKBONE.FREEZE_AT = 2
        build_backbone(cfg)
    assert "FREEZE_AT" in caplog.text
