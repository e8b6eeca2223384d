import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.modeling.backbone import fuse_batch_norms


def make(name, norm, efficientnet="efficientnet-b0", freeze_at=0):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.EFFICIENTNET.NAME = efficientnet
    cfg.MODEL.EFFICIENTNET.NORM = cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.DEVICE = "cpu"
    return build_backbone(cfg)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize(
    ("name", "efficientnet"),
    [
        ("build_efficientnet_fpn_backbone", "efficientnet-b0"),
        ("build_efficientnet_fpn_backbone", "efficientnet-lite0"),
        ("build_resnet_fpn_backbone", "efficientnet-b0"),
    ],
)
def test_fused_features_are_the_same(name, efficientnet, norm):
    torch.manual_seed(0)
    model = make(name, norm, efficientnet, freeze_at=2)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse_batch_norms(model)
    assert not [m for m in fused.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]
    assert model.training
    assert not fused.training
    image = torch.randn(2, 3, 64, 96)
    features = fused(image)
    torch.testing.assert_close(model.state_dict(), before)  # the original is untouched
    for key, expected in model.eval()(image).items():
        assert ((features[key] - expected).abs().max() / expected.abs().max()).item() < 1e-5, key
