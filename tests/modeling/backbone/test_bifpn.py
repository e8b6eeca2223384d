import math

import numpy as np
import pytest
import torch
from conftest import small_pyramid_config, small_rcnn_config
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone import BiFPN, fuse_batch_norms
from selftrain_d2.modeling.backbone.bifpn import BiFPNCell, Node, cell_nodes, downsample


def make_config(bottom_up="build_efficientnet_backbone"):
    cfg = small_pyramid_config("BIFPN", bottom_up)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    return cfg


def test_nodes_as_published():
    """google/automl, efficientdet/tf2/fpn_configs.py for P3-P7: (level, inputs)."""
    published = [
        (6, (3, 4)), (5, (2, 5)), (4, (1, 6)), (3, (0, 7)),
        (4, (1, 7, 8)), (5, (2, 6, 9)), (6, (3, 5, 10)), (7, (4, 11)),
    ]  # fmt: skip
    assert cell_nodes(5) == [Node(level - 3, inputs) for level, inputs in published]
    assert [node.level for node in cell_nodes(6)[-6:]] == [0, 1, 2, 3, 4, 5]


# ---- an oracle: one cell of three levels and one channel, in numpy and straight through ---------------
def pooled(x):
    """The definition of "same" padding: as few cells as needed, the odd one at the end."""
    pads = []
    for size in x.shape:
        total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, pads, constant_values=-np.inf)
    return np.array(
        [
            [x[i : i + 3, j : j + 3].max() for j in range(0, x.shape[1] - 2, 2)]
            for i in range(0, x.shape[0] - 2, 2)
        ]
    )


def copied(x, like):
    return x[np.arange(like.shape[0]) // 2][:, np.arange(like.shape[1]) // 2]


def swish(x):
    return x / (1 + np.exp(-x))


def fused(weights, *maps):
    weights = np.maximum(weights, 0)
    return swish(sum(w * x for w, x in zip(weights, maps)) / (weights.sum() + 1e-4))


def cell_by_hand(weights, p3, p4, p5):
    down4 = fused(weights[0], p4, copied(p5, p4))
    out3 = fused(weights[1], p3, copied(down4, p3))
    out4 = fused(weights[2], p4, down4, pooled(out3))
    return out3, out4, fused(weights[3], p5, pooled(out4))


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (13, 21), (17, 1), (1, 1)])
def test_values_of_a_cell(size):
    torch.manual_seed(0)
    cell = BiFPNCell([1, 1, 1], 1, "", "fast").double()
    for node in cell.nodes:  # convolutions do nothing
        node.depthwise.weight.data.zero_()[0, 0, 1, 1] = 1
        nn.init.ones_(node.pointwise.weight)
        nn.init.uniform_(node.weights, -0.5, 2)
    levels = []
    for _ in range(3):
        levels.append(torch.randn(1, 1, *size, dtype=torch.float64))
        size = tuple(math.ceil(side / 2) for side in size)
    with torch.no_grad():
        outputs = cell(levels)
    weights = [node.weights.detach().numpy() for node in cell.nodes]
    expected = cell_by_hand(weights, *(x[0, 0].numpy() for x in levels))
    for output, values in zip(outputs, expected):
        np.testing.assert_allclose(output[0, 0], values, rtol=1e-12, atol=1e-12)


def test_sum_has_no_weights():
    cell = BiFPNCell([4, 4], 4, "", "sum")
    assert not [name for name, _ in cell.named_parameters() if name.endswith("weights")]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
def test_downsampling_halves_and_rounds_up(size):
    assert downsample(torch.zeros(1, 2, size, 5)).shape == (1, 2, -(-size // 2), 3)


@pytest.mark.parametrize("bottom_up", ["build_efficientnet_backbone", "build_resnet_backbone"])
def test_levels(bottom_up):
    backbone = build_backbone(make_config(bottom_up)).eval()
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == {
        f"p{level}": 2**level for level in range(3, 8)
    }
    assert backbone.size_divisibility == 128
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 101, 67))
    assert [tuple(f.shape) for f in features.values()] == [
        (1, 16, math.ceil(101 / 2**level), math.ceil(67 / 2**level)) for level in range(3, 8)
    ]


def sample():
    instances = Instances((96, 96))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 60.0]]))
    instances.gt_classes = torch.tensor([1])
    return {"image": torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8), "instances": instances}


def on_r_cnn():
    cfg = small_rcnn_config("GeneralizedRCNN", MODEL__BACKBONE__NAME="build_bifpn_backbone")
    cfg.MODEL.EFFICIENTNET.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES
    cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.FPN.NORM = 0, "BN"
    return cfg


@pytest.mark.parametrize(("make", "levels"), [(make_config, "34567"), (on_r_cnn, "23456")])
def test_under_detectron2s_heads(make, levels):
    """Every parameter gets a gradient, which training in several processes needs."""
    model = build_model(make())
    assert isinstance(model.backbone, BiFPN) and list(model.backbone.output_shape()) == [
        f"p{k}" for k in levels
    ]
    with EventStorage():
        sum(model([sample(), sample()]).values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval()
    with torch.no_grad():
        assert len(model([sample()])) == 1


def test_only_levels_that_the_heads_use():
    cfg = make_config()
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5"]
    assert list(build_backbone(cfg).output_shape()) == ["p3", "p4", "p5"]


def test_batch_norms_are_the_configs_and_can_be_folded():
    cfg = make_config()
    cfg.MODEL.FPN.NORM_EPS, cfg.MODEL.FPN.NORM_MOMENTUM = 1e-3, 0.01
    backbone = build_backbone(cfg).eval()
    norms = [m for n, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d) and "bottom_up" not in n]
    # of P6; of two cells' nodes; of the first cell's inputs P3, P4 and P5, the last two of which are used twice
    assert len(norms) == 1 + 2 * 8 + 5 and {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    for norm in norms:
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, folded = backbone(images), fuse_batch_norms(backbone)(images)
    for name, level in expected.items():
        torch.testing.assert_close(folded[name], level, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.BIFPN.BOTTOM_UP", "build_no_backbone", "BOTTOM_UP.*build_no_backbone"),
        ("MODEL.BIFPN.ATTENTION", "softmax", "ATTENTION.*softmax.*fast, sum"),
        ("MODEL.BIFPN.REPEATS", "0", "REPEATS is 0"),
        ("MODEL.FPN.IN_FEATURES", "['res2', 'res3']", "IN_FEATURES.*it has.*res3"),
        ("MODEL.FPN.IN_FEATURES", "['res3', 'res5']", r"strides \[8, 32\].*in BiFPN"),
        ("MODEL.RETINANET.IN_FEATURES", "['p3']", "no head uses a coarser level"),
    ],
)
def test_settings_that_cannot_be_used(key, value, message):
    cfg = make_config()
    if "RETINANET" in key:
        cfg.MODEL.FPN.IN_FEATURES = ["res3"]
    cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=message):
        build_backbone(cfg)
