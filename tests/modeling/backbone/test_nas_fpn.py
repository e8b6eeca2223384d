import numpy as np
import pytest
import torch
from conftest import small_pyramid_config
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone import NASFPN, fuse_batch_norms
from selftrain_d2.modeling.backbone.nas_fpn import CELL, LEVELS, NODE_LEVELS, NASFPNCell, attention, resample

# Nodes 5 to 11 as published (tensorflow/tpu, nasfpn.py): level, kind, inputs, is it an output.
PUBLISHED = [
    (4, "attention", (1, 3), False),
    (4, "sum", (1, 5), False),
    (3, "sum", (0, 6), True),
    (4, "sum", (6, 7), True),
    (5, "attention", (7, 8), True),
    (7, "attention", (6, 9), True),
    (6, "attention", (9, 10), True),
]


def make_config(bottom_up="build_efficientnet_backbone"):
    return small_pyramid_config("NAS_FPN", bottom_up)


class Pyramid(Backbone):
    """Stands for a backbone: strided averages of the image, with a parameter."""

    def __init__(self, strides, channels):
        super().__init__()
        self._out_features = [f"s{s}" for s in strides]
        self._out_feature_strides = {f"s{s}": s for s in strides}
        self._out_feature_channels = {f"s{s}": channels for s in strides}
        self.convs = nn.ModuleDict({f"s{s}": nn.Conv2d(3, channels, 1) for s in strides})

    def forward(self, x):
        return {
            name: conv(nn.functional.avg_pool2d(x, self._out_feature_strides[name], ceil_mode=True))
            for name, conv in self.convs.items()
        }


# ---- an oracle: one cell for one channel, without convolutions, in numpy and straight through ----
def pooled(x, factor):
    height, width = (-(-side // factor) for side in x.shape)
    return np.array(
        [
            [x[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].max() for j in range(width)]
            for i in range(height)
        ]
    )


def copied(x, factor, like):
    rows, columns = np.arange(like.shape[0]) // factor, np.arange(like.shape[1]) // factor
    return x[rows][:, columns]


def gate(x):
    return 1 / (1 + np.exp(-x.max()))


def relu(x):
    return np.maximum(x, 0)


def cell_by_hand(p3, p4, p5, p6, p7):
    n5 = relu(copied(p6, 4, p4) + p4 * gate(p6))
    n6 = relu(p4 + n5)
    out3 = relu(p3 + copied(n6, 2, p3))
    out4 = relu(n6 + pooled(out3, 2))
    out5 = relu(pooled(out4, 2) + pooled(out3, 4) * gate(out4) + p5)
    out7 = relu(pooled(out5, 4) + pooled(n6, 8) * gate(out5) + p7)
    out6 = relu(copied(out7, 2, p6) + pooled(out5, 2) * gate(out7))
    return out3, out4, out5, out6, out7


def identity_cell(channels=1, activation=torch.relu):
    cell = NASFPNCell(channels, norm="", separable=False, activation=activation).double()
    for conv in cell.convs:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        for channel in range(channels):
            conv.weight.data[channel, channel, 1, 1] = 1.0
    return cell


def random_levels(height, width, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for _ in range(LEVELS):
        levels.append(torch.randn(1, channels, height, width, generator=generator, dtype=torch.float64))
        height, width = -(-height // 2), -(-width // 2)
    return levels


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (13, 21), (17, 1), (1, 1)])
def test_values_of_a_cell(size):
    levels = random_levels(*size)
    with torch.no_grad():
        outputs = identity_cell()(levels)
    expected = cell_by_hand(*(x[0, 0].numpy() for x in levels))
    for output, x in zip(outputs, expected):
        np.testing.assert_allclose(output[0, 0].numpy(), x, atol=1e-12)


def test_values_worked_out_on_paper():
    """Constant maps p3..p7 = 1, 2, 3, 0, -1: every node is one number."""
    levels = [
        torch.full((1, 1, 2 ** (4 - k), 2 ** (4 - k)), value, dtype=torch.float64)
        for k, value in enumerate((1.0, 2.0, 3.0, 0.0, -1.0))
    ]
    with torch.no_grad():
        p3, p4, p5, p6, p7 = (x.unique().tolist() for x in identity_cell()(levels))
    # n5 = 0 + 2 * sigmoid(0) = 1; n6 = 2 + 1 = 3; p3 = 1 + 3; p4 = 3 + 4
    assert (p3, p4) == ([4.0], [7.0])
    # p5 = 7 + 4 * sigmoid(7) + 3; p7 = p5 + 3 * sigmoid(p5) - 1; p6 = p7 + p5 * sigmoid(p7)
    assert p5 == [pytest.approx(13.9963556)]
    assert p7 == [pytest.approx(15.9963531)]
    assert p6 == [pytest.approx(29.9927071)]


def test_channels_do_not_mix_in_a_cell_without_convolutions():
    levels = random_levels(16, 16, channels=3)
    with torch.no_grad():
        together = identity_cell(3)(levels)
        alone = [identity_cell(1)([x[:, c : c + 1] for x in levels]) for c in range(3)]
    for level in range(LEVELS):
        torch.testing.assert_close(together[level], torch.cat([outputs[level] for outputs in alone], dim=1))


def test_the_table_is_the_published_one():
    uses, levels = [0] * LEVELS, [3, 4, 5, 6, 7]
    for node, (level, kind, inputs, is_output) in zip(CELL, PUBLISHED):
        assert node.level + 3 == level and set(node.inputs) == set(inputs)
        assert (node.combine is attention) == (kind == "attention")
        if kind == "attention":  # the coarser one gates
            assert NODE_LEVELS[node.inputs[0]] > NODE_LEVELS[node.inputs[1]]
        for i in inputs:
            uses[i] += 1
        unused = tuple(i for i, n in enumerate(uses) if is_output and n == 0 and levels[i] == level)
        assert node.added == unused
        for i in unused:
            uses[i] += 1
        uses.append(0)
        levels.append(level)
    assert len(CELL) == len(PUBLISHED) and all(uses[:7])


@pytest.mark.parametrize("size", [(16, 24), (13, 7), (5, 1), (1, 1)])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_going_down_and_up_a_level_keeps_to_the_grid(size, steps):
    x = torch.randn(2, 3, *size)
    down = resample(x, steps, [-(-side // 2**steps) for side in size])
    up = resample(down, -steps, size)
    assert up.shape == x.shape
    assert (up >= x).all()  # each cell holds the maximum of what it covers
    for image in range(2):
        for channel in range(3):
            expected = pooled(x[image, channel].numpy(), 2**steps)
            np.testing.assert_array_equal(down[image, channel].numpy(), expected)


@pytest.mark.parametrize("bottom_up", ["build_efficientnet_backbone", "build_resnet_backbone"])
@pytest.mark.parametrize("size", [(128, 256), (125, 90), (33, 7)])
def test_shapes_and_gradients(bottom_up, size):
    torch.manual_seed(0)
    backbone = build_backbone(make_config(bottom_up))
    shapes = backbone.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {
        f"p{level}": (16, 2**level) for level in range(3, 8)
    }
    features = backbone(torch.randn(2, 3, *size))
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]
    for name, x in features.items():
        assert x.shape == (2, 16, *(-(-side // shapes[name].stride) for side in size))
    sum(x.square().sum() for x in features.values()).backward()
    without = [name for name, p in backbone.named_parameters() if p.grad is None]
    assert not without


def test_every_input_level_reaches_the_outputs():
    levels = [x.requires_grad_() for x in random_levels(16, 16)]
    sum(x.sum() for x in identity_cell(activation=nn.functional.silu)(levels)).backward()
    assert all((x.grad != 0).any() for x in levels)


@pytest.mark.parametrize(("separable", "norm"), [(True, "BN"), (True, ""), (False, "BN")])
def test_number_of_parameters(separable, norm):
    channels, repeats = 24, 3
    neck = NASFPN(
        bottom_up=Pyramid([8, 16, 32], 40),
        in_features=["s8", "s16", "s32"],
        out_channels=channels,
        repeats=repeats,
        separable=separable,
        norm=norm,
    )
    after = 2 * channels if norm else channels  # weight and bias of the norm, or the convolution's bias
    conv = 9 * channels + channels**2 if separable else 9 * channels**2
    expected = 3 * (40 * channels + after) + repeats * 7 * (conv + after)
    counted = sum(p.numel() for n, p in neck.named_parameters() if not n.startswith("bottom_up"))
    assert counted == expected


def test_one_to_five_features_of_any_strides():
    for strides, first in (([4], 2), ([4, 8, 16, 32, 64], 2), ([8, 16], 3)):
        names = [f"s{s}" for s in strides]
        neck = NASFPN(bottom_up=Pyramid(strides, 8), in_features=names, out_channels=8, repeats=1)
        assert list(neck.output_shape()) == [f"p{first + k}" for k in range(5)]
        assert all(isinstance(conv, nn.Identity) for conv in neck.lateral_convs)  # channels are right
        features = neck.eval()(torch.randn(1, 3, 100, 70))
        assert [x.shape[2] for x in features.values()] == [-(-100 // 2 ** (first + k)) for k in range(5)]


def test_missing_levels_are_maxima_of_the_one_before():
    neck = NASFPN(bottom_up=Pyramid([8, 16, 32], 4), in_features=["s8", "s16", "s32"], out_channels=4)
    seen = []
    neck.cells[0].register_forward_pre_hook(lambda _, args: seen.extend(args[0]))
    neck.cells[0].forward = lambda levels: levels
    with torch.no_grad():
        neck.eval()(torch.randn(1, 3, 320, 200))
    for level in (3, 4):
        for channel in range(4):
            np.testing.assert_array_equal(
                seen[level][0, channel], pooled(seen[level - 1][0, channel].numpy(), 2)
            )


def test_a_retinanet_on_it_trains_and_detects():
    cfg = make_config()
    cfg.MODEL.META_ARCHITECTURE = "SelfTrainingRetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = 2, 1
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    model = build_model(cfg)
    instances = Instances((100, 90))
    instances.gt_boxes, instances.gt_classes = Boxes(torch.tensor([[10.0, 20, 60, 70]])), torch.tensor([1])
    sample = {"image": torch.randint(0, 255, (3, 100, 90), dtype=torch.uint8), "instances": instances}
    with EventStorage():
        losses = model.train()([sample, {**sample, "label_source": "pseudo"}])
    sum(losses.values()).backward()
    assert len(losses) == 4 and all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        assert model.eval()([sample])[0]["instances"].image_size == (100, 90)


def test_batch_norms_fold_into_its_convolutions():
    torch.manual_seed(0)
    backbone = build_backbone(make_config())
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        backbone(images)  # statistics that are not the initial ones
        fused = fuse_batch_norms(backbone)
        assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
        expected = backbone.eval()(images)
        for name, x in fused(images).items():
            torch.testing.assert_close(x, expected[name], rtol=1e-3, atol=1e-3)


def test_norm_constants_come_from_the_config():
    cfg = make_config()
    cfg.MODEL.FPN.NORM_EPS, cfg.MODEL.FPN.NORM_MOMENTUM = 1e-3, 0.003
    neck = build_backbone(cfg)
    norms = [m for n, m in neck.named_modules() if isinstance(m, nn.BatchNorm2d) and "bottom_up" not in n]
    assert len(norms) == 3 + 2 * 7 and {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.003)}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.NAS_FPN.BOTTOM_UP", "build_no_backbone", "BOTTOM_UP.*build_no_backbone"),
        ("MODEL.NAS_FPN.ACTIVATION", "gelu", "ACTIVATION.*gelu.*relu, swish"),
        ("MODEL.NAS_FPN.REPEATS", "0", "REPEATS is 0"),
        ("MODEL.FPN.IN_FEATURES", "[]", "IN_FEATURES.*one to 5"),
        ("MODEL.FPN.IN_FEATURES", "['res2', 'res3']", "IN_FEATURES.*it has.*res3"),
        ("MODEL.FPN.IN_FEATURES", "['res3', 'res5']", r"strides \[8, 32\]"),
        ("MODEL.FPN.IN_FEATURES", "['res5', 'res4']", r"strides \[32, 16\]"),
    ],
)
def test_settings_that_cannot_be_used(key, value, message):
    cfg = make_config()
    cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=message):
        build_backbone(cfg, ShapeSpec(channels=3))
