"""Tensor names of other packages' classifiers under the names of our backbones."""

from __future__ import annotations

import re
from collections.abc import Iterable

from selftrain_d2.errors import InputError


def timm_names(state: Iterable[str]) -> dict[str, str]:
    """timm counts blocks by stage and names layers by their order; ours are counted through."""
    prefix = find_prefix(state, "conv_stem.weight")
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0"}
    separable = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    bottleneck = {
        "conv_pw": "_expand_conv",
        "bn1": "_bn0",
        "conv_dw": "_depthwise_conv",
        "bn2": "_bn1",
        "conv_pwl": "_project_conv",
        "bn3": "_bn2",
    }
    squeeze = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}

    names = [n for n in state if n.startswith(prefix)]
    block = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.(\d+)\.(.+)\.(\w+)$")
    places = sorted({(int(m[1]), int(m[2])) for m in map(block.match, names) if m})
    index = {place: i for i, place in enumerate(places)}
    result = {}
    for name in names:
        match = block.match(name)
        if match:
            layers = {**squeeze, **(separable if match[1] == "0" else bottleneck)}
            layer = layers.get(match[3])
            flat = index[int(match[1]), int(match[2])]
            target = layer and f"_blocks.{flat}.{layer}.{match[4]}"
        else:
            layer, _, kind = name[len(prefix) :].rpartition(".")
            target = layer in top and f"{top[layer]}.{kind}"
        if target:
            result[name] = target
    return result


def efficientnet_pytorch_names(state: Iterable[str]) -> dict[str, str]:
    """Our names are efficientnet-pytorch's; its classifier (with the top-level ``_bn1``) is left out."""
    prefix = find_prefix(state, "_conv_stem.weight")
    ours = re.compile(re.escape(prefix) + r"((?:_conv_stem|_bn0|_blocks)\..+)$")
    return {m[0]: m[1] for m in map(ours.match, state) if m}


def torchvision_resnet_names(state: Iterable[str]) -> dict[str, str]:
    """torchvision's ResNet, as most SimCLR code has it, to detectron2's; also as an ``nn.Sequential``."""
    sequential = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    prefix, modules = find_prefix(state, "4.0.conv1.weight", required=False), sequential
    if prefix is None:
        prefix = find_prefix(state, "layer1.0.conv1.weight")
        modules = {module: module for module in sequential.values()}
    result = {}
    for name in state:
        module, _, rest = name[len(prefix) :].partition(".")
        if name.startswith(prefix) and module in modules:
            result[name] = _detectron2_resnet_name(f"{modules[module]}.{rest}")
    return result


def _detectron2_resnet_name(name: str) -> str:
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)


def find_prefix(state: Iterable[str], landmark: str, required: bool = True) -> str | None:
    """What stands before a known name in the file (``module.encoder.``)."""
    prefixes = [n[: -len(landmark)] for n in state if n.endswith(landmark)]
    prefixes = [p for p in prefixes if p == "" or p.endswith(".")]
    if not prefixes and required:
        raise InputError(f"The source has no tensor {landmark!r}: check --format.")
    # Momentum encoders come in pairs; the trained one is meant.
    followers = ("encoder_k", "momentum", "target", "teacher")
    return min(prefixes, key=lambda p: any(word in p for word in followers), default=None)
