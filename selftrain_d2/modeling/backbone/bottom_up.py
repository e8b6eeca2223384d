"""The part of a backbone that image classifiers share, below the pyramid."""

from __future__ import annotations

from detectron2.modeling import Backbone
from torch import nn


def bottom_up_name(backbone: nn.Module) -> str | None:
    """Name of the submodule below the pyramid that FPN (``bottom_up``) or ViTDet (``net``) add; None without one."""
    return next((name for name in ("bottom_up", "net") if hasattr(backbone, name)), None)


def bottom_up_of(backbone: Backbone) -> Backbone:
    """The backbone without its pyramid; itself if it has none."""
    name = bottom_up_name(backbone)
    return backbone if name is None else getattr(backbone, name)


def coarsest_feature(backbone: Backbone) -> str:
    """Name of its feature map of the largest stride (C5)."""
    shapes = backbone.output_shape()
    return max(shapes, key=lambda name: shapes[name].stride)
