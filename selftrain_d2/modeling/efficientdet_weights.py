"""Weights of the package effdet (github.com/rwightman/efficientdet-pytorch) as those of our EfficientDets.

effdet's ``tf_efficientdet_*`` are the authors' own weights, from TensorFlow. They differ from ours in names and in two
orders: a box is (y, x, height, width), and COCO's 80 classes sit in the 90 slots of its category ids.
"""

from __future__ import annotations

import re

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model

from selftrain_d2.config import CONFIGS, add_selftrain_config
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.weight_names import find_prefix, timm_names

EFFICIENTDET_NAMES = tuple(f"efficientdet-d{size}" for size in (*range(8), "7x"))
#: Of COCO's category ids 1 to 90, which effdet's classes are, 80 are in use: their names by id.
COCO_CLASSES = {c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]}
COCO_SLOTS = 90
ANCHORS = 9  # at each location

_CLASS_TENSORS = ("head.cls_score.1.weight", "head.cls_score.1.bias")
_BOX_TENSORS = ("head.bbox_pred.1.weight", "head.bbox_pred.1.bias")

# Patterns of effdet's names and ours; {} is the place of a batch norm's or convolution's tensor.
_LAYERS = {"conv_dw": "depthwise", "conv_pw": "pointwise", "bn": "pointwise.norm"}
_RESAMPLE = {"conv": "", "bn": ".norm"}
_SUBNETS = {"class_net": ("cls_subnet", "cls_score"), "box_net": ("bbox_subnet", "bbox_pred")}


def config_of(name: str) -> CfgNode:
    """The shipped config of one of EFFICIENTDET_NAMES."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.merge_from_file(str(CONFIGS / config_file(name)), allow_unsafe=False)
    return cfg


def config_file(name: str) -> str:
    """Name of that config, for ``--config-file``."""
    return f"efficientdet/{name.removeprefix('efficientdet-')}.yaml"


def detector_shapes(name: str, num_classes: int = len(COCO_CLASSES)) -> dict[str, torch.Size]:
    """Names and shapes of a detector's tensors; built on the meta device, which takes no memory."""
    cfg = config_of(name)
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    with torch.device("meta"):
        return {key: value.shape for key, value in build_model(cfg).state_dict().items()}


def effdet_names(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """effdet's tensor names to ours, whatever stands before them (``module.``, ``model.``)."""
    prefix = find_prefix(state, "fpn.cell.0.fnode.0.after_combine.conv.conv_dw.weight")
    names = [name for name in state if name.startswith(prefix)]
    backbone = f"{prefix}backbone."
    result = {
        name: f"backbone.bottom_up.{target}"
        for name, target in timm_names([name for name in names if name.startswith(backbone)]).items()
    }
    for name in names:
        target = _fpn_name(name[len(prefix) :]) or _head_name(name[len(prefix) :])
        if target:
            result[name] = target
    return result


def _fpn_name(name: str) -> str | None:
    lateral = re.fullmatch(r"fpn\.resample\.\d+\.conv\.(conv|bn)\.(\w+)", name)
    if lateral:
        return f"backbone.coarser_lateral{_RESAMPLE[lateral[1]]}.{lateral[2]}"
    node = re.fullmatch(r"fpn\.cell\.(\d+)\.fnode\.(\d+)\.(.+)", name)
    if not node:
        return None
    place = f"backbone.cells.{node[1]}.nodes.{node[2]}"
    if node[3] == "combine.edge_weights":
        return f"{place}.weights"
    resample = re.fullmatch(r"combine\.resample\.(\d+)\.conv\.(conv|bn)\.(\w+)", node[3])
    if resample:
        return f"{place}.laterals.{resample[1]}{_RESAMPLE[resample[2]]}.{resample[3]}"
    layer = re.fullmatch(r"after_combine\.conv\.(conv_dw|conv_pw|bn)\.(\w+)", node[3])
    return layer and f"{place}.{_LAYERS[layer[1]]}.{layer[2]}"


def _head_name(name: str) -> str | None:
    # Our subnets are sequences of depthwise convolution, 1x1 convolution, batch norms of all levels, swish.
    conv = re.fullmatch(r"(class_net|box_net)\.conv_rep\.(\d+)\.(conv_dw|conv_pw)\.(\w+)", name)
    if conv:
        return f"head.{_SUBNETS[conv[1]][0]}.{4 * int(conv[2]) + (conv[3] == 'conv_pw')}.{conv[4]}"
    norm = re.fullmatch(r"(class_net|box_net)\.bn_rep\.(\d+)\.(\d+)\.bn\.(\w+)", name)
    if norm:
        return f"head.{_SUBNETS[norm[1]][0]}.{4 * int(norm[2]) + 2}.{norm[3]}.{norm[4]}"
    last = re.fullmatch(r"(class_net|box_net)\.predict\.(conv_dw|conv_pw)\.(\w+)", name)
    return last and f"head.{_SUBNETS[last[1]][1]}.{int(last[2] == 'conv_pw')}.{last[3]}"


def in_our_order(model: dict[str, torch.Tensor], source: object) -> dict[str, torch.Tensor]:
    """effdet's tensors under our names, with the rows of the last convolutions as ours.

    Of 90 classes, those of COCO's category ids, the 80 that are in use; others as they are.

    Args:
        model: not changed.
        source: named in errors.

    Raises:
        InputError: there are no such rows.
    """
    for name in (*_CLASS_TENSORS, *_BOX_TENSORS):
        if name not in model or len(model[name]) % ANCHORS:
            raise InputError(f"{source} is no detector of effdet with {ANCHORS} anchors at each location.")
    classes = list(range(number_of_classes(model)))
    if len(classes) == COCO_SLOTS:
        classes = [category - 1 for category in COCO_CLASSES]
    result = dict(model)
    for names, rows in ((_CLASS_TENSORS, classes), (_BOX_TENSORS, [1, 0, 3, 2])):
        for name in names:
            result[name] = model[name].unflatten(0, (ANCHORS, -1))[:, rows].flatten(0, 1)
    return result


def number_of_classes(model: dict[str, torch.Tensor]) -> int:
    """Of a detector's tensors, under our names."""
    return len(model[_CLASS_TENSORS[0]]) // ANCHORS


def detector_facts(name: str, model: dict[str, torch.Tensor]) -> dict[str, object]:
    """What checkpoints of our trainer say of a detector beside its tensors: its classes, if COCO's, and its anchors."""
    sizes = config_of(name).MODEL.ANCHOR_GENERATOR.SIZES
    facts: dict[str, object] = {"anchors": {"anchor_sizes": [[float(s) for s in level] for level in sizes]}}
    if number_of_classes(model) == len(COCO_CLASSES):
        facts["classes"] = {"thing_classes": list(COCO_CLASSES.values())}
    return facts
