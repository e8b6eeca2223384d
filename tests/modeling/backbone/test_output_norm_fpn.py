import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn
from torch.nn import functional as F

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.errors import InputError

RETINANET_EFFICIENTNET = "build_retinanet_efficientnet_fpn_backbone"
RETINANET_RESNET = "build_retinanet_resnet_fpn_p5_backbone"


def make_config(name, output_norm="BN"):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = name, 0
    cfg.MODEL.EFFICIENTNET.NAME, cfg.MODEL.EFFICIENTNET.DROP_CONNECT_RATE = "efficientnet-b0", 0.0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 24
    cfg.MODEL.FPN.OUTPUT_NORM = output_norm
    cfg.MODEL.FPN.NORM_EPS, cfg.MODEL.FPN.NORM_MOMENTUM = 1e-4, 0.003
    return cfg


@pytest.mark.parametrize(
    "name", [RETINANET_EFFICIENTNET, RETINANET_RESNET, "build_efficientnet_fpn_backbone"]
)
def test_every_level_is_normalized_after_all_convolutions(name):
    torch.manual_seed(0)
    normed = build_backbone(make_config(name))
    plain = build_backbone(make_config(name, output_norm=""))
    missing, extra = plain.load_state_dict(normed.state_dict(), strict=False)
    assert not missing and all(key.startswith("output_norms.") for key in extra)
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        features, raw = normed(images), plain(images)
    assert list(features) == list(raw)
    for level, norm in normed.output_norms.items():
        assert (norm.eps, norm.momentum) == (1e-4, 0.003)
        mean, var = raw[level].mean((0, 2, 3)), raw[level].var((0, 2, 3), unbiased=False)
        expected = (raw[level] - mean[:, None, None]) / torch.sqrt(var + 1e-4)[:, None, None]
        torch.testing.assert_close(features[level], expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_mean, 0.003 * mean, rtol=1e-3, atol=1e-6)
    convs = [m for m in (*normed.lateral_convs, *normed.output_convs)]
    assert all(conv.bias is not None and conv.norm is None for conv in convs)


@pytest.mark.parametrize("name", [RETINANET_EFFICIENTNET, RETINANET_RESNET])
def test_p6_comes_from_p5_without_its_norm(name):
    backbone = build_backbone(make_config(name)).eval()
    nn.init.constant_(backbone.output_norms["p5"].bias, 100.0)  # would show in P6
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        features = backbone(images)
        p5 = (features["p5"] - 100.0) * (1 + 1e-4) ** 0.5  # undo: mean 0, variance 1, weight 1
        top = backbone.top_block
        p6 = F.conv2d(p5, top.p6.weight, top.p6.bias, stride=2, padding=1)
        p7 = F.conv2d(p6.relu(), top.p7.weight, top.p7.bias, stride=2, padding=1)
    scale = (1 + 1e-4) ** -0.5
    torch.testing.assert_close(features["p6"], p6 * scale, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(features["p7"], p7 * scale, rtol=1e-3, atol=1e-3)


def test_resnet_takes_its_constants_from_the_config():
    cfg = make_config(RETINANET_RESNET)
    cfg.MODEL.RESNETS.NORM_EPS, cfg.MODEL.RESNETS.NORM_MOMENTUM = 1e-3, 0.01
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    bottom_up = build_backbone(cfg).bottom_up
    norms = [m for m in bottom_up.modules() if isinstance(m, nn.BatchNorm2d)]
    frozen = [m for m in bottom_up.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == 42 and len(frozen) == 11  # of 53: the stem's, and res2's ten
    assert {m.eps for m in (*norms, *frozen)} == {1e-3} and {m.momentum for m in norms} == {0.01}


def test_without_keys_the_constants_are_detectron2s():
    cfg = make_config(RETINANET_RESNET, output_norm="")
    cfg.MODEL.FPN.NORM_EPS, cfg.MODEL.FPN.NORM_MOMENTUM = 1e-5, 0.1
    cfg.MODEL.FPN.NORM = "BN"
    for module in build_backbone(cfg).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)


def test_a_feature_that_the_backbone_does_not_give():
    cfg = make_config(RETINANET_RESNET)
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    with pytest.raises(InputError, match=r"MODEL\.FPN\.IN_FEATURES.*res4"):
        build_backbone(cfg)
