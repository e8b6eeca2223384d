"""The part of a backbone that image classifiers share, below the pyramid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from selftrain_d2.errors import InputError


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


def pyramid_input_strides(
    shapes: Mapping[str, ShapeSpec], in_features: Sequence[str], pyramid: str, most: int = 5
) -> list[int]:
    """Strides of the features that a pyramid starts from, after a check.

    Args:
        shapes: of the backbone's features.
        in_features: names of some of them, from fine to coarse.
        pyramid: its name, for messages.
        most: features that it takes.

    Raises:
        InputError: no feature, too many, or one that the backbone does not have; or strides that are not consecutive
            powers of 2.
    """
    if not 1 <= len(in_features) <= most or not shapes.keys() >= set(in_features):
        raise InputError(
            f"MODEL.FPN.IN_FEATURES is {list(in_features)}: give one to {most} features of the backbone, for "
            f"example ['res3', 'res4', 'res5']; it has {list(shapes)}."
        )
    strides = [shapes[name].stride for name in in_features]
    finest = int(math.log2(strides[0]))
    if strides != [2 ** (finest + level) for level in range(len(strides))]:
        raise InputError(
            f"MODEL.FPN.IN_FEATURES is {list(in_features)}, of strides {strides}: in {pyramid} each stride is a power "
            "of 2 and twice the one before."
        )
    return strides
