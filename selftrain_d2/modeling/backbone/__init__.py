"""EfficientNet, SpineNet, FPN, NAS-FPN and BiFPN. Importing this package registers them with detectron2."""

from selftrain_d2.modeling.backbone.bifpn import BiFPN, build_bifpn_backbone
from selftrain_d2.modeling.backbone.efficientnet import (
    EFFICIENTNET_NAMES,
    EfficientNet,
    build_efficientnet_backbone,
)
from selftrain_d2.modeling.backbone.fpn import (
    build_efficientnet_fpn_backbone,
    build_retinanet_efficientnet_fpn_backbone,
)
from selftrain_d2.modeling.backbone.fusion import fuse_batch_norms
from selftrain_d2.modeling.backbone.nas_fpn import NASFPN, build_nas_fpn_backbone
from selftrain_d2.modeling.backbone.norm import batch_norm_builder
from selftrain_d2.modeling.backbone.spinenet import SpineNet, build_spinenet_backbone

__all__ = [
    "EFFICIENTNET_NAMES",
    "NASFPN",
    "BiFPN",
    "EfficientNet",
    "SpineNet",
    "batch_norm_builder",
    "build_bifpn_backbone",
    "build_efficientnet_backbone",
    "build_efficientnet_fpn_backbone",
    "build_nas_fpn_backbone",
    "build_retinanet_efficientnet_fpn_backbone",
    "build_spinenet_backbone",
    "fuse_batch_norms",
]
