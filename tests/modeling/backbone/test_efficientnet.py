import math
import sys

import numpy as np
import pytest
import torch
from conftest import randomize_norms
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.utils import comm
from efficientnet_pytorch import EfficientNet as ReferenceEfficientNet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone import EFFICIENTNET_NAMES, EfficientNet, batch_norm_builder, efficientnet
from selftrain_d2.modeling.backbone.inverted_bottleneck import SameConv2d

FEATURES = ["res2", "res3", "res4", "res5"]

# The table of the EfficientNet paper's scaling: stem, C2-C5, blocks.
ARCHITECTURES = {
    "efficientnet-b0": (32, (24, 40, 112, 320), 16),
    "efficientnet-b1": (32, (24, 40, 112, 320), 23),
    "efficientnet-b2": (32, (24, 48, 120, 352), 23),
    "efficientnet-b3": (40, (32, 48, 136, 384), 26),
    "efficientnet-b4": (48, (32, 56, 160, 448), 32),
    "efficientnet-b5": (48, (40, 64, 176, 512), 39),
    "efficientnet-b6": (56, (40, 72, 200, 576), 45),
    "efficientnet-b7": (64, (48, 80, 224, 640), 55),
    "efficientnet-b8": (72, (56, 88, 248, 704), 61),
    "efficientnet-l2": (136, (104, 176, 480, 1376), 88),
    "efficientnet-lite0": (32, (24, 40, 112, 320), 16),
}


def make(name="efficientnet-b0", out_features=FEATURES, kind="BN", **kwargs):
    norm = batch_norm_builder(kind, device="cpu", eps=1e-3, momentum=0.01)
    return EfficientNet(name=name, out_features=out_features, norm=norm, **kwargs)


def deviation(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_is_the_papers(name):
    stem, channels, blocks = ARCHITECTURES[name]
    with torch.device("meta"):
        model = make(name)
    assert model._conv_stem.out_channels == stem
    assert len(model._blocks) == blocks
    shapes = model.output_shape()
    assert [shapes[f].channels for f in FEATURES] == list(channels)
    assert [shapes[f].stride for f in FEATURES] == [4, 8, 16, 32]
    features = model(torch.empty(2, 3, 33, 64, device="meta"))
    assert [tuple(features[f].shape) for f in FEATURES] == [
        (2, c, math.ceil(33 / s), math.ceil(64 / s)) for c, s in zip(channels, (4, 8, 16, 32))
    ]


@pytest.fixture(scope="module")
def meta_model():
    with torch.device("meta"):
        return make().eval()


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70))
def test_any_input_size(meta_model, height, width):
    features = meta_model(torch.empty(1, 3, height, width, device="meta"))
    for name, feature in features.items():
        stride = 2 ** int(name[-1])
        assert feature.shape[-2:] == (math.ceil(height / stride), math.ceil(width / stride))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([3, 5]), st.sampled_from([1, 2]))
def test_same_padding_is_tensorflows(height, width, kernel, stride):
    """Oracle: TensorFlow's definition, one output pixel at a time."""
    torch.manual_seed(height * 13 + width)
    conv = SameConv2d(1, 1, kernel, stride).double()
    image = torch.randn(1, 1, height, width, dtype=torch.float64)
    weight, pixels = conv.weight[0, 0].detach().numpy(), image[0, 0].numpy()

    out_height, out_width = math.ceil(height / stride), math.ceil(width / stride)
    before = [
        max((out - 1) * stride + kernel - size, 0) // 2
        for out, size in ((out_height, height), (out_width, width))
    ]
    expected = np.zeros((out_height, out_width))
    for i, j, u, v in np.ndindex(out_height, out_width, kernel, kernel):
        y, x = i * stride + u - before[0], j * stride + v - before[1]
        if 0 <= y < height and 0 <= x < width:
            expected[i, j] += weight[u, v] * pixels[y, x]
    np.testing.assert_allclose(conv(image)[0, 0].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("size", [(64, 64), (65, 97)])
@pytest.mark.parametrize("name", ["efficientnet-b0", "efficientnet-b1"])
def test_weights_of_efficientnet_pytorch_load_as_they_are(name, size):
    torch.manual_seed(0)
    reference = ReferenceEfficientNet.from_name(name, image_size=None).eval()
    randomize_norms(reference)
    model = make(name).eval()
    result = model.load_state_dict(reference.state_dict(), strict=False)
    assert not result.missing_keys
    assert {key.split(".")[0] for key in result.unexpected_keys} == {"_conv_head", "_bn1", "_fc"}

    image = torch.randn(2, 3, *size)
    expected = reference.extract_endpoints(image)
    for feature, value in model(image).items():
        assert deviation(value, expected[f"reduction_{feature[-1]}"]) < 1e-5


def test_only_the_blocks_needed_are_built():
    full, short = make(), make(out_features=["res3", "res1"])
    assert list(short.output_shape()) == ["res1", "res3"]
    assert len(short._blocks) == 5
    # Depth counts the whole network: a shorter one drops the same blocks with the same probability.
    torch.testing.assert_close(short._keep_rates, full._keep_rates[:5])
    image = torch.randn(1, 3, 32, 32)
    short.load_state_dict(full.state_dict(), strict=False)
    torch.testing.assert_close(short.eval()(image)["res3"], full.eval()(image)["res3"])


def test_initialization_has_the_variance_of_fan_out():
    torch.manual_seed(0)
    for module in make("efficientnet-b3").modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            per_group = module.out_channels // module.groups
            fan_out = per_group * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "efficientnet-b9"}, "efficientnet-b8"),
        ({"out_features": ["p3"]}, "res5"),
        ({"out_features": []}, "res5"),
        ({"kind": "LN"}, "FrozenBN"),
    ],
)
def test_bad_input_names_the_choices(arguments, words):
    with pytest.raises(InputError, match=words):
        make(**arguments)


def test_lite_without_its_package(monkeypatch):
    efficientnet._architecture.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match=r"pip install 'selftrain_d2\[lite\]'"):
        make("efficientnet-lite0")


def test_all_names_build():
    for name in EFFICIENTNET_NAMES:
        with torch.device("meta"):
            assert make(name).output_shape()["res5"].stride == 32


# ---- Norms, drop connect, freezing ------------------------------------------------------------------


def test_norm_kinds():
    assert type(make()._bn0) is nn.BatchNorm2d
    frozen = make(kind="FrozenBN")
    assert isinstance(frozen._blocks[3]._bn1, FrozenBatchNorm2d)
    assert frozen._blocks[3]._bn1.eps == 1e-3
    synced = make(kind="SyncBN")
    synced(torch.randn(2, 3, 32, 32))["res5"].sum().backward()  # nn.SyncBatchNorm would raise on a CPU
    assert synced._bn0.momentum == 0.01
    assert make().state_dict().keys() == synced.state_dict().keys()


def test_sync_norm_of_several_processes(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    assert isinstance(batch_norm_builder("SyncBN", device="cpu")(4), NaiveSyncBatchNorm)
    assert isinstance(batch_norm_builder("SyncBN", device="cuda:1")(4), nn.SyncBatchNorm)
    assert type(batch_norm_builder("BN", device="cuda")(4)) is nn.BatchNorm2d


def test_drop_connect_grows_with_depth():
    torch.manual_seed(0)
    model = make(drop_connect_rate=0.5)
    images = 4000
    for index, scale in enumerate(model._draw_branch_scales(images)):
        keep = 1 - 0.5 * index / 16
        assert scale.shape == (images, 1, 1, 1)
        assert set(scale.unique().tolist()) <= {0.0, torch.tensor(1 / keep).item()}
        tolerance = 5 * math.sqrt((1 - keep) / keep / images)  # five standard errors
        assert scale.mean().item() == pytest.approx(1, abs=tolerance + 1e-6)


def test_dropped_branch_leaves_the_input_and_evaluation_drops_nothing():
    model = make(drop_connect_rate=0.9).eval()
    block = next(b for b in model._blocks if b.has_skip)
    x = torch.randn(2, block._expand_conv.in_channels, 8, 8)
    scale = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)
    out, plain = block(x, scale), block(x)
    torch.testing.assert_close(out[0], x[0])
    torch.testing.assert_close(out[1], x[1] + 2 * (plain[1] - x[1]), rtol=1e-4, atol=1e-5)

    image = torch.randn(2, 3, 64, 64)
    without = make(drop_connect_rate=0.0).eval()
    without.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(image), without(image))


@pytest.mark.parametrize(("freeze_at", "frozen_blocks"), [(0, -1), (1, 0), (2, 3), (3, 5), (5, 16)])
def test_frozen_stages(freeze_at, frozen_blocks):
    model = make(freeze_at=freeze_at, drop_connect_rate=0.2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    features = model(torch.randn(2, 3, 64, 64))
    if freeze_at < 5:
        sum(f.sum() for f in features.values() if f.requires_grad).backward()
    after = model.state_dict()
    stem = [name for name in before if name.startswith(("_conv_stem", "_bn0"))]
    frozen = stem if freeze_at else []
    frozen = [
        *frozen,
        *(n for n in before if n.startswith("_blocks") and int(n.split(".")[1]) < frozen_blocks),
    ]
    parameters = dict(model.named_parameters())
    for name in before:
        if name in frozen:
            assert name not in parameters or not parameters[name].requires_grad
            assert torch.equal(before[name], after[name]), name
        elif name in parameters:
            assert parameters[name].grad is not None, name
        else:
            assert not torch.equal(before[name], after[name]), name
    assert (model._keep_rates[: max(frozen_blocks, 0)] == 1).all()


# ---- Memory, formats, precision ---------------------------------------------------------------------


@pytest.mark.parametrize("freeze_at", [0, 2])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, NaiveSyncBatchNorm])
def test_checkpointing_changes_nothing_but_memory(norm, freeze_at):
    saved = {}

    def run(checkpoint_activations):
        torch.manual_seed(0)
        model = EfficientNet(
            name="efficientnet-b0",
            out_features=FEATURES,
            norm=norm,
            drop_connect_rate=0.5,
            freeze_at=freeze_at,
            checkpoint_activations=checkpoint_activations,
        )
        image = torch.randn(2, 3, 64, 64)
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        if checkpoint_activations:  # kept for the recomputation, unseen by the hooks
            for block in model._blocks:
                block.register_forward_pre_hook(lambda _, inputs: (count(inputs[0]), None)[1])
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            features = model(image)
        sum(f.square().mean() for f in features.values()).backward()
        saved[checkpoint_activations] = kept
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return features, gradients, model.state_dict(), torch.rand(1)

    plain, checkpointed = run(False), run(True)
    assert len(plain[1]) > 50
    torch.testing.assert_close(checkpointed, plain)
    assert saved[True] < saved[False] / 3


def test_checkpointing_restores_the_norms_and_is_off_without_gradients():
    model = make(checkpoint_activations=True)
    model(torch.randn(2, 3, 32, 32))["res5"].sum().backward()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.momentum == 0.01 and m.track_running_stats and m.num_batches_tracked == 1 for m in norms)
    with torch.no_grad():
        assert not model(torch.randn(2, 3, 32, 32))["res5"].requires_grad


def test_results_without_gradients_are_the_same():
    """Without gradients activations work in place: nothing that is still needed may be overwritten."""
    for name in ("efficientnet-b0", "efficientnet-lite0"):
        model = make(name).eval()
        image = torch.randn(2, 3, 64, 64)
        copy = image.clone()
        expected = model(image)
        with torch.no_grad():
            torch.testing.assert_close(model(image), expected)
        torch.testing.assert_close(image, copy)


def test_channels_last():
    torch.manual_seed(0)
    plain, channels_last = make(), make(channels_last=True)
    channels_last.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    for model in (plain.eval(), channels_last.eval()):
        sum(f.square().mean() for f in model(image).values()).backward()
    expected, features = plain(image), channels_last(image)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features.values())
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    for name, parameter in channels_last.named_parameters():
        expected = plain.get_parameter(name).grad
        assert deviation(parameter.grad, expected) < 1e-3, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("name", ["efficientnet-b0", "efficientnet-lite0"])
def test_autocast(name, dtype, tolerance):
    torch.manual_seed(0)
    model = make(name, drop_connect_rate=0.2, checkpoint_activations=True)
    image = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=dtype):
        features = model(image)
    assert all(f.dtype == dtype for f in features.values())
    sum(f.float().square().mean() for f in features.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    expected = model(image)
    with torch.autocast("cpu", dtype=dtype):
        features = model(image)
    for feature, value in features.items():
        assert deviation(value.float(), expected[feature]) < tolerance


@pytest.mark.parametrize("name", ["efficientnet-b0", "efficientnet-lite0"])
def test_a_trace_works_at_other_sizes(name):
    """ "Same" padding depends on the size: as a constant of the trace it would crop or shift features silently."""
    model = EfficientNet(
        name=name, out_features=["res3", "res5"], norm=batch_norm_builder("BN", device="cpu")
    ).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64), strict=False, check_trace=False)
        for shape in ((2, 3, 65, 97), (1, 3, 96, 63)):
            images = torch.randn(shape)
            expected, found = model(images), traced(images)
            for feature, value in expected.items():
                torch.testing.assert_close(found[feature], value, rtol=1e-4, atol=1e-6)
