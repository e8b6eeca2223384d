"""Feature pyramids (FPN) on EfficientNet and ResNet: P2-P6 for R-CNNs, P3-P7 for RetinaNet."""

from __future__ import annotations

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


@BACKBONE_REGISTRY.register()
def build_efficientnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """P2-P6 from res2-res5 (MODEL.FPN.IN_FEATURES); P6 is P5 subsampled, as in detectron2's R-CNN configs."""
    return _build_fpn(cfg, LastLevelMaxPool(), EfficientNet(cfg, input_shape, cfg.MODEL.FPN.IN_FEATURES))


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


def _build_fpn(cfg: CfgNode, top_block: nn.Module, bottom_up: Backbone) -> FPN:
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


def _p6_p7_from_p5(cfg: CfgNode) -> LastLevelP6P7:
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return LastLevelP6P7(channels, channels, in_feature="p5")


def _norm(cfg: CfgNode, kind: str) -> str | Callable[[int], nn.Module]:
    return configured_norm(kind, cfg.MODEL.FPN, cfg.MODEL.DEVICE)
