"""What feature pyramids on any backbone (NAS-FPN, BiFPN) have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from selftrain_d2.errors import InputError


class Pyramid(Backbone):
    """Levels p_k of one width, of consecutive strides 2^k, on some features of a backbone."""

    def __init__(
        self, bottom_up: Backbone, in_features: Sequence[str], strides: Sequence[int], out_channels: int
    ):
        """
        Args:
            bottom_up: any backbone.
            in_features: those of its features that the pyramid starts from, from fine to coarse.
            strides: of the levels, from fine to coarse.
            out_channels: of every level.
        """
        super().__init__()
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        self._out_features = [f"p{int(math.log2(stride))}" for stride in strides]
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._out_feature_strides = dict(zip(self._out_features, strides))

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self.bottom_up.padding_constraints


def build_bottom_up_of(pyramid: str, cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The backbone that a pyramid stands on: MODEL.``pyramid``.BOTTOM_UP.

    Raises:
        InputError: no backbone of that name is registered.
    """
    name = cfg.MODEL[pyramid].BOTTOM_UP
    if name not in BACKBONE_REGISTRY:
        raise InputError(
            f"MODEL.{pyramid}.BOTTOM_UP is {name!r}, which is no registered backbone: use for example "
            "build_efficientnet_backbone or build_resnet_backbone."
        )
    return BACKBONE_REGISTRY.get(name)(cfg, input_shape)


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
