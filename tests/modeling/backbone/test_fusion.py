import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
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


def norms_of(model):
    return [
        m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d, CycleBatchNormList))
    ]


def vary_norms(model):
    for module in norms_of(model):
        for name, kept in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            if name.endswith(("weight", "running_var")):
                nn.init.uniform_(kept, 0.5, 1.5)
            elif name.endswith(("bias", "running_mean")):
                nn.init.normal_(kept, std=0.1)


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
    vary_norms(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse_batch_norms(model)
    assert not norms_of(fused)
    assert model.training
    assert not fused.training
    image = torch.randn(2, 3, 64, 96)
    features = fused(image)
    torch.testing.assert_close(model.state_dict(), before)  # the original is untouched
    for key, expected in model.eval()(image).items():
        assert ((features[key] - expected).abs().max() / expected.abs().max()).item() < 1e-5, key


@pytest.mark.parametrize("affine_per_level", [False, True])
def test_norms_of_levels_in_a_head(small_config, affine_per_level):
    torch.manual_seed(0)
    small_config.MODEL.RETINANET.NORM = "BN"
    small_config.MODEL.RETINANET.NORM_AFFINE_PER_LEVEL = affine_per_level
    head = build_model(small_config).head.eval()
    vary_norms(head)
    fused = fuse_batch_norms(head)
    assert norms_of(head) and not norms_of(fused)
    levels = [torch.randn(1, 16, size, size) for size in (16, 8, 4, 2, 1)]
    for _ in range(2):  # the next image begins with the first level again
        for found, expected in zip(fused(levels), head(levels)):
            for a, b in zip(found, expected):
                torch.testing.assert_close(a, b)


def test_separable_convolutions_with_a_norm():
    """A norm after a convolution that others use too, after one with an activation, and after none."""
    torch.manual_seed(0)
    shared, activated = nn.Conv2d(4, 4, 1), Conv2d(4, 4, 1, activation=nn.ReLU())
    first = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), shared, nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4)
    )
    model = nn.ModuleList(
        [first, nn.Sequential(shared, nn.BatchNorm2d(4)), nn.Sequential(activated, nn.BatchNorm2d(4))]
    )
    vary_norms(model)
    model.eval()
    fused = fuse_batch_norms(model)
    assert len(norms_of(fused)) == 2
    for layers, expected in zip(fused, model):
        image = torch.randn(2, 4, 8, 8)
        torch.testing.assert_close(layers(image), expected(image))
