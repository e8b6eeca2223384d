"""Feature pyramids (FPN) on EfficientNet and ResNet: P2-P6 for R-CNNs, P3-P7 for RetinaNet.

Levels above P5 that the configured heads do not use are not built: their parameters would get no gradient, which
training in several processes cannot have.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone.efficientnet import EfficientNet
from selftrain_d2.modeling.backbone.norm import configured_norm, set_batch_norm_constants

#: Part of MODEL.META_ARCHITECTURE -> the nodes below MODEL whose IN_FEATURES its heads use.
_HEADS = {
    "RetinaNet": ("RETINANET",),
    "RCNN": ("RPN", "ROI_HEADS"),
    "PanopticFPN": ("RPN", "ROI_HEADS", "SEM_SEG_HEAD"),
    "Segmentor": ("SEM_SEG_HEAD",),
}


@BACKBONE_REGISTRY.register()
def build_efficientnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """P2-P6 from res2-res5 (MODEL.FPN.IN_FEATURES); P6 is P5 subsampled, as in detectron2's R-CNN configs."""
    top_block = LastLevelMaxPool() if coarsest_level(cfg) >= 6 else None
    return _build_fpn(cfg, top_block, EfficientNet(cfg, input_shape, cfg.MODEL.FPN.IN_FEATURES))


@BACKBONE_REGISTRY.register()
def build_retinanet_efficientnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """P3-P7 from res3-res5: P6 is a stride-2 convolution on P5, P7 one on relu(P6) ([TF])."""
    return _build_fpn(cfg, _p6_p7_from_p5(cfg), EfficientNet(cfg, input_shape, cfg.MODEL.FPN.IN_FEATURES))


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_p5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """detectron2's ResNet with the levels above: its own RetinaNet backbone takes P6 from res5, not P5."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    keys = cfg.MODEL.RESNETS
    set_batch_norm_constants(bottom_up, eps=keys.NORM_EPS, momentum=keys.NORM_MOMENTUM)
    return _build_fpn(cfg, _p6_p7_from_p5(cfg), bottom_up)


class LastLevelP6(LastLevelP6P7):
    """P6 alone, under the name that it has beside P7."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_levels = 1
        del self.p7

    def forward(self, p5: torch.Tensor) -> list[torch.Tensor]:
        return [self.p6(p5)]


class OutputNormFPN(FPN):
    """FPN with a norm on each output level, P6 and P7 included ([TF]).

    The norms come after all convolutions: P6 is made of P5 before its norm. Convolutions keep their biases.
    """

    def __init__(self, *args, output_norm: str | Callable[[int], nn.Module], **kwargs):
        """
        Args:
            args, kwargs: as for ``FPN``.
            output_norm: a kind of norm or a function of channels, see ``detectron2.layers.get_norm``.
        """
        super().__init__(*args, **kwargs)
        self.output_norms = nn.ModuleDict(
            {name: get_norm(output_norm, shape.channels) for name, shape in self.output_shape().items()}
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: self.output_norms[name](level) for name, level in super().forward(x).items()}


def _build_fpn(cfg: CfgNode, top_block: nn.Module | None, bottom_up: Backbone) -> FPN:
    keys = cfg.MODEL.FPN
    features = keys.IN_FEATURES
    if not features or features[-1] != "res5" or not bottom_up.output_shape().keys() >= set(features):
        raise InputError(
            f"MODEL.FPN.IN_FEATURES is {list(features)}: it must end with 'res5', for example "
            f"['res3', 'res4', 'res5'], and the backbone has {list(bottom_up.output_shape())}."
        )
    kwargs = {
        "bottom_up": bottom_up,
        "in_features": features,
        "out_channels": keys.OUT_CHANNELS,
        "norm": _norm(cfg, keys.NORM),
        "top_block": top_block,
        "fuse_type": keys.FUSE_TYPE,
    }
    if keys.OUTPUT_NORM:
        return OutputNormFPN(**kwargs, output_norm=_norm(cfg, keys.OUTPUT_NORM))
    return FPN(**kwargs)


def _p6_p7_from_p5(cfg: CfgNode) -> LastLevelP6P7 | None:
    channels, coarsest = cfg.MODEL.FPN.OUT_CHANNELS, coarsest_level(cfg)
    top_block = LastLevelP6 if coarsest == 6 else LastLevelP6P7
    # Made in any case: what is not needed must not change the random numbers of what follows.
    top_block = top_block(channels, channels, in_feature="p5")
    return top_block if coarsest >= 6 else None


def coarsest_level(cfg: CfgNode) -> int:
    """k of the last P_k that the heads use; 7 if they name no level of a pyramid, as detectron2's defaults do."""
    nodes = next((nodes for name, nodes in _HEADS.items() if name in cfg.MODEL.META_ARCHITECTURE), ())
    names = [feature for node in nodes for feature in cfg.MODEL[node].IN_FEATURES]
    return max((int(name[1:]) for name in names if re.fullmatch(r"p\d", name)), default=7)


def _norm(cfg: CfgNode, kind: str) -> str | Callable[[int], nn.Module]:
    return configured_norm(kind, cfg.MODEL.FPN, cfg.MODEL.DEVICE)
