"""Batch norms folded into the convolutions before them: the same model, faster at inference."""

from __future__ import annotations

import copy

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from selftrain_d2.modeling.backbone.efficientnet import EfficientNet
from selftrain_d2.modeling.backbone.inverted_bottleneck import InvertedBottleneck

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


def fuse_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of a detector or backbone for inference.

    Folds the batch norms of EfficientNet and of detectron2's convolutions (ResNet, FPN). Outputs differ by
    rounding only. The copy is in evaluation mode, cannot be trained, and its tensors no longer fit checkpoints.

    Args:
        model: any model, with its final weights.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if isinstance(module, (EfficientNet, InvertedBottleneck)):
            for conv_name, norm_name in module.CONV_NORM_PAIRS:
                if hasattr(module, conv_name):
                    conv, norm = getattr(module, conv_name), getattr(module, norm_name)
                    setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                    setattr(module, norm_name, nn.Identity())
        elif isinstance(module, Conv2d) and isinstance(module.norm, _BATCH_NORMS):
            fused = fuse_conv_bn_eval(module, module.norm)
            module.weight, module.bias, module.norm = fused.weight, fused.bias, None
    return model.requires_grad_(False)
