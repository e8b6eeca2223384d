"""EfficientDets to their class and box outputs on all levels, without what comes after: ours, and those of effdet."""

from __future__ import annotations

from detectron2.modeling import build_model
from torch import nn

from selftrain_d2.errors import InputError
from selftrain_d2.experiments.model_table import DenseOutputs
from selftrain_d2.modeling.efficientdet_weights import COCO_CLASSES, config_of


def our_detector(name: str, device: str) -> nn.Module:
    """As its config trains it, from images (N, 3, H, W)."""
    cfg = config_of(name)
    cfg.MODEL.DEVICE = device
    return DenseOutputs(build_model(cfg))


def effdets_detector(name: str, size: int) -> nn.Module:
    """effdet's of the same name, with as many classes as ours; its size of images is fixed.

    Raises:
        InputError: effdet is not installed.
    """
    try:
        from effdet.config import get_efficientdet_config
        from effdet.efficientdet import EfficientDet
    except ImportError as error:
        raise InputError("This benchmark compares with effdet: pip install effdet.") from error
    config = get_efficientdet_config("tf_" + name.replace("-", "_"))
    config.image_size, config.num_classes = (size, size), len(COCO_CLASSES)
    return EfficientDet(config, pretrained_backbone=False)
