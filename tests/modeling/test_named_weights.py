"""Weights by name, from a cache that the test makes: nothing is downloaded."""

from urllib.error import URLError

import effdet
import huggingface_hub
import pytest
import timm
import torch
from conftest import SMALL_MODEL, assert_refused, make_coco_set
from detectron2.modeling import build_model
from safetensors.torch import save_file

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint import check_input_statistics, load_weights
from selftrain_d2.modeling.efficientdet_weights import config_of
from selftrain_d2.modeling.named_weights import scheme_of

NAME = "tf_efficientnet_b0.ap_in1k"  # AdvProp: trained with other statistics than ImageNet's


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of timm, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill(cache, name):
    """What the hub's client leaves in its cache after a download."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    folder = cache / f"models--timm--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(model.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")
    return model


@pytest.mark.parametrize(
    ("name", "backbone", "mean"),
    [(NAME, "efficientnet-b0", 127.5), ("tf_efficientnet_lite0.in1k", "efficientnet-lite0", 127.5)],
)
def test_the_backbone_is_timms(name, backbone, mean, cache, small_config):
    reference = fill(cache, name)
    small_config.MODEL.EFFICIENTNET.NAME = backbone
    model = build_model(small_config)
    report = load_weights(model, f"timm://{name}")
    stem = model.backbone.bottom_up._conv_stem.weight
    assert torch.equal(stem, reference.conv_stem.weight)
    assert torch.equal(
        model.backbone.bottom_up._blocks[15]._project_conv.weight, reference.blocks[6][0].conv_pwl.weight
    )
    assert report.input["pixel_mean"] == [mean] * 3
    small_config.MODEL.PIXEL_MEAN = [103.53, 116.28, 123.675]
    assert "MODEL.PIXEL_MEAN [127.5, 127.5, 127.5]" in check_input_statistics(report.input, small_config)


def test_another_backbone_is_refused(cache, small_config):
    fill(cache, NAME)
    small_config.MODEL.EFFICIENTNET.NAME = "efficientnet-b1"
    with pytest.raises(InputError, match="give weights of the same backbone"):
        load_weights(build_model(small_config), f"timm://{NAME}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (NAME, "not in timm's cache and cannot be fetched"),
        ("tf_efficientnet_b0.no_such_tag", "no such weights"),
        ("resnet50.a1_in1k", "only timm's tf_efficientnet"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(name, words, cache, small_config):
    with pytest.raises(InputError, match=words):
        load_weights(build_model(small_config), f"timm://{name}")


def build_efficientdet_d0():
    cfg = config_of("efficientdet-d0")
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of files from addresses, which timm's hub shares with PyTorch's, and no network."""

    def unreachable(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(timm.models._hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(timm.models._hub, "download_url_to_file", unreachable)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    ("name", "mean"), [("tf_efficientdet_d0", 123.675), ("tf_efficientdet_d0_ap", 127.5)]
)
def test_the_detector_is_effdets(name, mean, hub):
    torch.manual_seed(0)
    config = effdet.get_efficientdet_config(name)
    reference = effdet.EfficientDet(config, pretrained_backbone=False)
    torch.save(reference.state_dict(), hub / config.url.rsplit("/", 1)[1])
    model = build_efficientdet_d0()
    report = load_weights(model, f"effdet://{name}")
    stem = model.backbone.bottom_up._conv_stem.weight
    assert torch.equal(stem, reference.backbone.conv_stem.weight)
    places = [key for key in report.missing if "anchor" not in key]
    assert not places and report.input["pixel_mean"][0] == mean


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tf_efficientdet_d0", "not in timm's cache and cannot be fetched"),
        ("tf_efficientdet_d9", "of tf_efficientdet_d0 to d7 and d7x"),
        ("efficientdet_d0", "of tf_efficientdet_d0 to d7 and d7x"),  # pads otherwise
    ],
)
def test_what_cannot_be_had_from_effdet_is_one_sentence(name, words, hub):
    with pytest.raises(InputError, match=words):
        load_weights(build_efficientdet_d0(), f"effdet://{name}")


def test_paths_are_no_names():
    assert scheme_of("output/timm/model.pth") is None
    assert scheme_of("https://example.org/model.pth") is None
    assert scheme_of(f"timm://{NAME}")[1] == NAME


def test_the_loop_says_what_it_cannot_fetch(cache, coco_set, tmp_path, capsys):
    command = ["self-train", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml"]
    command += ["--labeled-json", coco_set.json_file, "--labeled-images", coco_set.images]
    unlabeled = make_coco_set(tmp_path / "unlabeled", 2, seed=7).images
    command += ["--unlabeled-images", unlabeled, "--output", str(tmp_path / "run"), *SMALL_MODEL]
    assert_refused(
        [*command, "MODEL.WEIGHTS", f"timm://{NAME}"], capsys, "cannot be fetched", f"timm://{NAME}"
    )
