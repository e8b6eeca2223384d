"""EfficientNet with a feature pyramid (FPN): P2-P6 for R-CNNs, P3-P7 for RetinaNet."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone.efficientnet import EfficientNet
from selftrain_d2.modeling.backbone.norm import NORM_KINDS, batch_norm_builder


@BACKBONE_REGISTRY.register()
def build_efficientnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """P2-P6 from res2-res5 (MODEL.FPN.IN_FEATURES); P6 is P5 subsampled, as in detectron2's R-CNN configs."""
    return _build_fpn(cfg, input_shape, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_efficientnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """P3-P7 from res3-res5: P6 is a stride-2 convolution on P5, P7 one on relu(P6) ([TF])."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return _build_fpn(cfg, input_shape, LastLevelP6P7(channels, channels, in_feature="p5"))


def _build_fpn(cfg: CfgNode, input_shape: ShapeSpec, top_block: nn.Module) -> FPN:
    keys = cfg.MODEL.FPN
    if not keys.IN_FEATURES or keys.IN_FEATURES[-1] != "res5":
        raise InputError(
            f"MODEL.FPN.IN_FEATURES is {list(keys.IN_FEATURES)}: it must end with 'res5', "
            "for example ['res3', 'res4', 'res5']."
        )
    norm = keys.NORM
    if norm in NORM_KINDS:  # other kinds (none, GN) need no care for devices and processes
        norm = batch_norm_builder(norm, device=cfg.MODEL.DEVICE)
    return FPN(
        bottom_up=EfficientNet(cfg, input_shape, keys.IN_FEATURES),
        in_features=keys.IN_FEATURES,
        out_channels=keys.OUT_CHANNELS,
        norm=norm,
        top_block=top_block,
        fuse_type=keys.FUSE_TYPE,
    )
