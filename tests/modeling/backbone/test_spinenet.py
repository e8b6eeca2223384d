import math

import pytest
import torch
from conftest import randomize_norms
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.model_table import DenseOutputs
from selftrain_d2.modeling.backbone import SpineNet, batch_norm_builder, fuse_batch_norms
from selftrain_d2.modeling.backbone.spinenet import BLOCKS, SIZES, STEM_BLOCKS, Size
from selftrain_d2.modeling.backbone.spinenet_blocks import (
    BlockGroup,
    Resampling,
    ScalePermutedBlock,
    max_pool,
)

LEVELS = ["p3", "p4", "p5", "p6", "p7"]
# As published (tensorflow/tpu, spinenet.py): level, is it a bottleneck, inputs, is it an output.
PUBLISHED = [
    (2, True, (0, 1), False), (4, False, (0, 1), False), (3, True, (2, 3), False), (4, True, (2, 4), False),
    (6, False, (3, 5), False), (4, True, (3, 5), False), (5, False, (6, 7), False), (7, False, (6, 8), False),
    (5, True, (8, 9), False), (5, True, (8, 10), False), (4, True, (5, 10), True), (3, True, (4, 10), True),
    (5, True, (7, 12), True), (7, True, (5, 14), True), (6, True, (12, 14), True),
]  # fmt: skip
# RetinaNets of 91 classes as the authors' model zoo lists them: pixels, output channels, heads' channels and
# convolutions, parameters (M), operations (G), and parameters (M) of the backbone without its endpoints as we counted
# them before.
PUBLISHED_SIZES = {
    "spinenet-49s": (640, 256, 128, 4, 11.9, 33.8, 8.71),
    "spinenet-49": (640, 256, 256, 4, 28.5, 85.4, 20.65),
    "spinenet-96": (1024, 256, 256, 4, 43.0, 265.4, 35.08),
    "spinenet-143": (1280, 256, 256, 4, 67.0, 524.0, 59.07),
    "spinenet-190": (1280, 512, 512, 7, 163.6, 1885.0, 123.52),
}
TINY = Size(out_channels=8, filter_scale=0.0625)  # 4, 8 and 16 filters
REPEATED = TINY._replace(repeats=2)


def make(size=TINY, kind="BN", **kwargs):
    return SpineNet(size=size, norm=batch_norm_builder(kind, device="cpu"), **kwargs)


def make_config(*options):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SelfTrainingRetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_spinenet_backbone"
    cfg.MODEL.SPINENET.NAME = "spinenet-49s"
    cfg.MODEL.RETINANET.IN_FEATURES = LEVELS
    cfg.MODEL.RETINANET.NORM = "BN"
    cfg.MODEL.RETINANET.NUM_CLASSES = 91
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [2**level, 2**level * 1.26, 2**level * 1.59] for level in range(5, 10)
    ]
    cfg.merge_from_list(list(options))
    return cfg


# ---- The published figures --------------------------------------------------------------------------


def counts(cfg, size):
    """Parameters (M), operations (G), and parameters (M) of the backbone without its endpoints; without memory.

    PyTorch's counter: fvcore traces, and convolutions on the meta device cannot be traced.
    """
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = DenseOutputs(build_model(cfg)).eval()
        model(torch.empty(1, 3, size, size))
    backbone = model.model.backbone
    whole, alone, endpoints = (
        sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, backbone, backbone.endpoints)
    )
    return whole, counter.get_total_flops() / 2e9, alone - endpoints


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("spinenet-49s", "spinenet-190") else pytest.param(name, marks=pytest.mark.slow)
        for name in SIZES
    ],
)
def test_parameters_and_operations_are_the_published_ones(name):
    size, channels, head, convs, *expected = PUBLISHED_SIZES[name]
    cfg = make_config("MODEL.SPINENET.NAME", name, "MODEL.RETINANET.NUM_CONVS", str(convs))
    if head != channels:
        cfg.MODEL.RETINANET.CONV_DIM = head
    assert counts(cfg, size) == pytest.approx(tuple(expected), rel=0.005)


def test_the_released_49s_is_smaller_than_the_published_one():
    """[TF] has 128 output channels: 11.27 million parameters and 30.8 billion operations as counted before."""
    parameters, operations, _ = counts(make_config("MODEL.SPINENET.OUT_CHANNELS", "128"), 640)
    assert (parameters, operations) == pytest.approx((11.27, 30.8), rel=0.005)


@pytest.mark.slow
def test_fvcore_counts_the_same_operations():
    """On the CPU, at 128 pixels, on weights that nobody filled."""
    cfg = make_config("MODEL.DEVICE", "meta", "MODEL.RETINANET.CONV_DIM", "128")
    with torch.device("meta"):
        model = DenseOutputs(build_model(cfg)).eval()
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        analysis = FlopCountAnalysis(model, torch.zeros(1, 3, 128, 128)).unsupported_ops_warnings(False)
        operations = analysis.uncalled_modules_warnings(False).total()
    assert operations / 1e9 * (640 / 128) ** 2 == pytest.approx(33.8, rel=0.005)


# ---- The block table --------------------------------------------------------------------------------


def test_the_table_is_the_published_one():
    """What [TF] finds while it builds, blocks of an output's shape that nothing has used yet, is written in ours."""
    uses, shapes = [0] * STEM_BLOCKS, [(2, True)] * STEM_BLOCKS
    for number, (block, (level, bottleneck, inputs, is_output)) in enumerate(
        zip(BLOCKS, PUBLISHED), STEM_BLOCKS
    ):
        assert (block.level, block.bottleneck, block.inputs, block.is_output) == (
            level, bottleneck, inputs, is_output,
        )  # fmt: skip
        assert max(inputs) < number
        for i in inputs:
            uses[i] += 1
        unused = tuple(
            i for i, n in enumerate(uses) if is_output and n == 0 and shapes[i] == (level, bottleneck)
        )
        assert block.added == unused
        for i in unused:
            uses[i] += 1
        uses.append(0)
        shapes.append((level, bottleneck))
    assert len(BLOCKS) == len(PUBLISHED)
    assert [i for i, n in enumerate(uses) if n == 0] == [
        13,
        15,
        16,
    ]  # outputs, of which 12 and 14 are used too
    assert sorted(block.level for block in BLOCKS if block.is_output) == [3, 4, 5, 6, 7]


# ---- Values: an oracle that walks the published table with the model's weights ----------------------


class Oracle:
    """SpineNet in evaluation mode, straight through; resampling without PyTorch's pooling and interpolation."""

    def __init__(self, model, activation, rule):
        self.weights, self.activation, self.rule = model.state_dict(), activation, rule

    def conv(self, name, x, stride=1, activated=True):
        w = {key: self.weights[f"{name}.{key}"] for key in ("weight", "norm.weight", "norm.bias")}
        mean, variance = (self.weights[f"{name}.norm.running_{key}"] for key in ("mean", "var"))
        x = F.conv2d(x, w["weight"], stride=stride, padding=w["weight"].shape[2] // 2)
        x = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 1e-5).sqrt()
        x = x * w["norm.weight"].view(-1, 1, 1) + w["norm.bias"].view(-1, 1, 1)
        return self.activation(x) if activated else x

    @staticmethod
    def pooled(x, kernel, stride):
        """TensorFlow's "same": all that is missing is on the right and at the bottom, as it is one pixel at most."""
        size = x.shape[2] // stride
        missing = (size - 1) * stride + kernel - x.shape[2]
        x = F.pad(x, (0, max(missing, 0), 0, max(missing, 0)), value=-math.inf)
        windows = [
            x[:, :, i : i + (size - 1) * stride + 1 : stride, j : j + (size - 1) * stride + 1 : stride]
            for i in range(kernel)
            for j in range(kernel)
        ]
        return torch.stack(windows).amax(0)

    def block(self, name, x, bottleneck):
        repeat = 0
        while f"{name}.{repeat}.branch.0.weight" in self.weights:
            one = f"{name}.{repeat}"
            branch = self.conv(f"{one}.branch.0", x)
            branch = self.conv(f"{one}.branch.1", branch, activated=bottleneck)
            if bottleneck:
                branch = self.conv(f"{one}.branch.2", branch, activated=False)
            if f"{one}.shortcut.weight" in self.weights:
                x = self.conv(f"{one}.shortcut", x, activated=False)
            x, repeat = self.activation(x + branch), repeat + 1
        return x

    def resampled(self, name, x, levels):
        x = self.conv(f"{name}.0", x)
        last = 1
        if levels > 0:
            x, last = self.conv(f"{name}.1", x, stride=2), 2
            if self.rule == "pool" and levels > 1:
                x, last = self.pooled(x, 3 if levels == 2 else 5, 2 ** (levels - 1)), 3
            for _ in range((levels - 1) * (self.rule == "repeated_pool")):
                x, last = self.pooled(x, 3, 2), last + 1
            for _ in range((levels - 1) * (self.rule == "conv")):
                x, last = self.conv(f"{name}.{last}", x, stride=2), last + 1
        elif levels < 0:
            rows, columns = (torch.arange(side * 2**-levels) // 2**-levels for side in x.shape[2:])
            x, last = x[:, :, rows][:, :, :, columns], 2
        return self.conv(f"{name}.{last}", x, activated=False)

    def __call__(self, x):
        x = self.pooled(self.conv("stem_conv", x, stride=2), 3, 2)
        outputs, levels, used = [], [2, 2], {0, 1}
        for i in range(2):
            x = self.block(f"stem_blocks.{i}", x, True)
            outputs.append(x)
        features = {}
        for number, (level, bottleneck, inputs, is_output) in enumerate(PUBLISHED, 2):
            used |= set(inputs)
            total = sum(
                self.resampled(f"blocks.{number}.resamplings.{k}", outputs[i], level - levels[i])
                for k, i in enumerate(inputs)
            )
            for i, other in enumerate(outputs):
                if is_output and i not in used and other.shape == total.shape:
                    total, used = total + other, used | {i}
            outputs.append(self.block(f"blocks.{number}.blocks", self.activation(total), bottleneck))
            levels.append(level)
            if is_output:
                features[f"p{level}"] = self.conv(f"endpoints.p{level}", outputs[-1])
        return features


@pytest.mark.parametrize(
    ("resampling", "activation"), [("pool", "relu"), ("repeated_pool", "swish"), ("conv", "relu")]
)
def test_values(resampling, activation):
    torch.manual_seed(0)
    model = make(REPEATED, resampling=resampling, activation=activation)
    model = randomize_norms(model).double().eval()
    image = torch.randn(1, 3, 256, 256, dtype=torch.float64)
    with torch.no_grad():
        expected = Oracle(model, {"relu": torch.relu, "swish": F.silu}[activation], resampling)(image)
        features = model(image)
    assert list(features) == LEVELS
    for name, feature in features.items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-9, atol=1e-9)


def no_norm(channels):
    return nn.Identity()


def test_a_merge_worked_out_on_paper():
    """One channel, convolutions the identity: a parent two levels finer, one a level coarser, and an added block."""
    parts = {"norm": no_norm, "activation": torch.relu}
    resamplings = [Resampling(1, 1, 1, levels, rule="pool", **parts) for levels in (2, -1)]
    block = ScalePermutedBlock(resamplings, BlockGroup(1, 1, 1, bottleneck=False, **parts), torch.relu)
    for layer in block.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            layer.weight.data[0, 0, layer.kernel_size[0] // 2, layer.kernel_size[0] // 2] = 1.0
    resamplings[1][-1].weight.data.fill_(-1.0)  # what is coarser is subtracted
    finer = torch.arange(64.0).view(1, 1, 8, 8)
    coarser = torch.full((1, 1, 1, 1), 53.0)
    added = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    # Every second pixel is 0 2 4 6 / 16 18 20 22 / 32 34 36 38 / 48 50 52 54; maxima of 3x3 from 0 and 2 on:
    # 36 38 / 52 54. Less 53, with what is added: -16 -15 / -1 3; its positive part, doubled by the residual block.
    with torch.no_grad():
        assert block(None, finer, coarser, added)[0, 0].tolist() == [[0.0, 0.0], [0.0, 6.0]]


@pytest.mark.parametrize("rule", ["pool", "repeated_pool", "conv"])
@pytest.mark.parametrize("size", [(8, 8), (8, 24), (40, 16)])
@pytest.mark.parametrize("levels", [-3, -1, 0, 1, 2, 3])
def test_resampling_gives_the_level_its_size(rule, size, levels):
    layers = Resampling(6, 4, 10, levels, rule=rule, norm=no_norm, activation=torch.relu)
    expected = tuple(int(side * 2.0**-levels) for side in size)
    assert layers(torch.randn(2, 6, *size)).shape == (2, 10, *expected)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 4), (5, 8)])
def test_pools_are_tensorflows(kernel, stride):
    x = torch.randn(2, 3, 5 * stride, 5 * stride)
    torch.testing.assert_close(max_pool(x, kernel, stride), Oracle.pooled(x, kernel, stride))


@pytest.mark.parametrize("size", [(128, 256), (125, 90), (130, 7)])
def test_any_size_is_padded_to_the_coarsest_stride(size):
    model = make().eval()
    shapes = model.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {
        f"p{level}": (8, 2**level) for level in range(3, 8)
    }
    padded = [-(-side // 128) * 128 for side in size]
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = model(image)
        expected = model(F.pad(image, (0, padded[1] - size[1], 0, padded[0] - size[0])))
    for name, feature in features.items():
        assert feature.shape == (2, 8, *(side // shapes[name].stride for side in padded))
        torch.testing.assert_close(feature, expected[name])


def test_only_the_blocks_needed_are_built_and_each_gets_a_gradient():
    for out_features, missing in ((LEVELS, set()), (["p3", "p4"], {"11", "14", "15", "16"})):
        torch.manual_seed(0)
        model = make(out_features=out_features)
        assert {str(i) for i in range(2, 17)} - set(model.blocks) >= missing
        sum(x.square().sum() for x in model(torch.randn(2, 3, 128, 256)).values()).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]


# ---- Norms, stochastic depth, memory, formats, precision --------------------------------------------


def test_norm_kinds_and_constants():
    kinds = {"BN": nn.BatchNorm2d, "SyncBN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d}
    for kind, layer in kinds.items():
        with torch.device("meta"):
            model = make(kind=kind, out_features=["p3"])
        assert all(isinstance(m.norm, layer) for m in model.modules() if isinstance(m, Conv2d))
    keys = [
        "MODEL.SPINENET.NORM",
        "BN",
        "MODEL.SPINENET.NORM_EPS",
        "0.5",
        "MODEL.SPINENET.NORM_MOMENTUM",
        "0.25",
    ]
    with torch.device("meta"):
        norms = [m for m in build_backbone(make_config(*keys)).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 100 and {(norm.eps, norm.momentum) for norm in norms} == {(0.5, 0.25)}


def test_stochastic_depth_grows_with_depth():
    torch.manual_seed(0)
    model = make(REPEATED, drop_connect_rate=0.5)
    images = 2000
    scales = model._draw_branch_scales(images)
    assert len(scales) == len(BLOCKS)
    for number, scale in enumerate(scales, 1):
        keep = 1 - 0.5 * number / len(BLOCKS)
        assert scale.shape == (REPEATED.repeats, images, 1, 1, 1)
        assert scale.unique().tolist() == pytest.approx([0.0, 1 / keep])
        tolerance = 5 * math.sqrt((1 - keep) / keep / images)  # five standard errors
        assert scale.mean((1, 2, 3, 4)).tolist() == pytest.approx([1] * REPEATED.repeats, abs=tolerance)


def test_a_dropped_branch_leaves_the_input_and_evaluation_drops_nothing():
    group = BlockGroup(8, 2, 2, bottleneck=True, norm=no_norm, activation=torch.relu)
    x = torch.rand(2, 8, 4, 4)
    scales = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(2, 2, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(group(x, scales)[0], x[0])
        torch.testing.assert_close(group(x, scales)[1], group(x)[1])

    model = make(drop_connect_rate=0.9)
    image = torch.randn(2, 3, 128, 128)
    without = make()
    without.load_state_dict(model.state_dict())  # rates are no part of the weights
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image), without.eval()(image))
        assert not torch.equal(model.train()(image)["p3"], without.train()(image)["p3"])


def test_checkpointing_changes_nothing_but_memory():
    saved = {}

    def run(checkpoint_activations):
        torch.manual_seed(0)
        model = make(activation="swish", drop_connect_rate=0.5, checkpoint_activations=checkpoint_activations)
        image, kept = torch.randn(2, 3, 128, 128), 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            max_pool(model.stem_conv(image), 3, 2)
            stem, kept = kept, 0
            features = model(image)
        sum(f.square().mean() for f in features.values()).backward()
        saved[checkpoint_activations] = kept - stem
        return features, {n: p.grad for n, p in model.named_parameters()}, model.state_dict(), torch.rand(1)

    torch.testing.assert_close(run(True), run(False))
    assert saved[True] < saved[False] / 3


def test_channels_last_changes_no_result():
    torch.manual_seed(0)
    plain, channels_last = make(channels_last=False), make(channels_last=True)
    channels_last.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        expected, features = plain.eval()(image), channels_last.eval()(image)
    assert features["p3"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "swish"])
def test_bfloat16_and_results_without_gradients(activation):
    """Without gradients activations work in place: nothing that is still needed may be overwritten."""
    torch.manual_seed(0)
    model = make(activation=activation, drop_connect_rate=0.2, checkpoint_activations=True)
    image = torch.randn(2, 3, 128, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model(image)
    assert all(f.dtype == torch.bfloat16 for f in features.values())
    sum(f.float().square().mean() for f in features.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    expected, copy = model.eval()(image), image.clone()
    with torch.no_grad():
        torch.testing.assert_close(model(image), expected)
        torch.testing.assert_close(image, copy)


@pytest.mark.slow
def test_a_trace_works_at_other_sizes():
    model = randomize_norms(make()).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(1, 3, 128, 128), strict=False, check_trace=False)
        for shape in ((2, 3, 129, 97), (1, 3, 256, 63)):
            images = torch.randn(shape)
            torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


def test_batch_norms_fold_into_its_convolutions():
    torch.manual_seed(0)
    model = randomize_norms(make(activation="swish")).eval()
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        fused = fuse_batch_norms(model)
        assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
        torch.testing.assert_close(fused(image), model(image), rtol=1e-3, atol=1e-4)


def test_initialization_has_the_variance_of_fan_in():
    """[TF]: normal, cut at two standard deviations, of variance 1 / fan-in."""
    torch.manual_seed(0)
    model = make(Size(filter_scale=0.5))
    for layer in (model.stem_conv, model.blocks["10"].blocks[0].branch[1], model.endpoints["p5"]):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() * math.sqrt(fan_in) == pytest.approx(1, rel=0.05)
        assert layer.weight.abs().max().item() * math.sqrt(fan_in) < 2 / 0.8796


# ---- Config -----------------------------------------------------------------------------------------


def test_heads_take_their_width_and_activation_from_the_config():
    cfg = make_config("MODEL.RETINANET.CONV_DIM", "96", "MODEL.RETINANET.ACTIVATION", "swish")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        head = build_model(cfg).head
    convs = [m for m in head.cls_subnet if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(256, 96), *[(96, 96)] * 3]
    assert head.cls_score.in_channels == head.bbox_pred.in_channels == 96
    assert not [m for m in head.modules() if isinstance(m, nn.ReLU)]
    assert len([m for m in head.modules() if type(m).__name__ == "Swish"]) == 8
    swish = next(m for m in head.cls_subnet if type(m).__name__ == "Swish")
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(swish(x), x * x.sigmoid())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.SPINENET.NAME", "spinenet-50", "NAME 'spinenet-50'.*spinenet-49s, spinenet-49"),
        ("MODEL.SPINENET.ACTIVATION", "gelu", "ACTIVATION 'gelu'.*relu, swish"),
        ("MODEL.SPINENET.RESAMPLING", "max", "RESAMPLING 'max'.*pool, repeated_pool, conv"),
        ("MODEL.SPINENET.NORM", "GN", "Unknown batch norm 'GN'"),
    ],
)
def test_settings_that_cannot_be_used(key, value, message):
    with pytest.raises(InputError, match=message):
        build_backbone(make_config(key, value), ShapeSpec(channels=3))
