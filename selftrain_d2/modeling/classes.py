"""What a model and its weights know of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from selftrain_d2.modeling.meta_arch.classification import CLASSIFICATION_HEAD

# Word in the name of an architecture -> section of MODEL with its NUM_CLASSES.
_SECTIONS = {
    "Segmentor": "SEM_SEG_HEAD",
    "RetinaNet": "RETINANET",
    "RCNN": "ROI_HEADS",
    "Panoptic": "ROI_HEADS",
}


def is_segmentor(cfg: CfgNode) -> bool:
    """Whether a config's model labels pixels alone."""
    return "Segmentor" in cfg.MODEL.META_ARCHITECTURE


def number_of_classes(cfg: CfgNode) -> tuple[str, int] | None:
    """The config key that says how many classes a model has, and its value; None for an architecture that is not ours
    or detectron2's."""
    for word, section in _SECTIONS.items():
        if word in cfg.MODEL.META_ARCHITECTURE:
            return f"MODEL.{section}.NUM_CLASSES", cfg.MODEL[section].NUM_CLASSES
    return None


def stored_classes(checkpoint: Mapping[str, Any], entry: str, key: str) -> list[str] | None:
    """Class names that a checkpoint of our trainer carries; None where it has none, as any other program's.

    Args:
        entry, key: "classes" and "thing_classes" (of boxes or pixels), or "classification" and
            "classification_classes" (of the head for joint training).
    """
    facts = checkpoint.get(entry)
    names = facts.get(key) if isinstance(facts, Mapping) else None
    return list(names) if isinstance(names, (list, tuple)) and names else None


def tensors_of_classes(cfg: CfgNode, model: nn.Module) -> list[str]:
    """Names of a detector's or segmentor's tensors that depend on its classes: of another shape with one class more."""
    other = cfg.clone()
    other.defrost()
    other.MODEL.DEVICE = "meta"
    for section in set(_SECTIONS.values()):
        other.MODEL[section].NUM_CLASSES += 1
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_model(other).state_dict().items()}
    return [
        name for name, value in model.state_dict().items() if value.shape != shapes.get(name, value.shape)
    ]


def tensors_of_image_classes(model: nn.Module) -> list[str]:
    """Names of the tensors of a model's head for joint training, if it has one."""
    return [name for name in model.state_dict() if name.startswith(f"{CLASSIFICATION_HEAD}.")]
