"""Batch norms folded into the convolutions before them: the same model, faster at inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from selftrain_d2.modeling.backbone.efficientnet import EfficientNet
from selftrain_d2.modeling.backbone.inverted_bottleneck import InvertedBottleneck

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


def fuse_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of a detector or backbone for inference.

    Folds the batch norms of EfficientNet, of detectron2's convolutions (ResNet, FPN), and those that follow a
    convolution in an ``nn.Sequential`` (RetinaNet's head). Where levels share the convolution but not the norm, each
    gets a convolution of its own. Outputs differ by rounding only. The copy is in evaluation mode, cannot be trained,
    and its tensors no longer fit checkpoints.

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
        elif isinstance(module, nn.Sequential):
            _fuse_neighbours(module)
    return model.requires_grad_(False)


def _fuse_neighbours(layers: nn.Sequential) -> None:
    for index, (conv, norm) in enumerate(zip(layers, list(layers)[1:])):
        if (
            type(conv) not in (nn.Conv2d, Conv2d)
            or getattr(conv, "norm", None)
            or getattr(conv, "activation", None)
        ):
            continue
        if isinstance(norm, _BATCH_NORMS):
            layers[index] = fuse_conv_bn_eval(conv, norm)
        elif isinstance(norm, CycleBatchNormList):
            layers[index] = _InTurn(fuse_conv_bn_eval(conv, of_level) for of_level in _of_levels(norm))
        else:
            continue
        layers[index + 1] = nn.Identity()


def _of_levels(norms: CycleBatchNormList) -> Iterator[nn.Module]:
    """Each level's whole norm, also where all share one weight and bias."""
    for norm in norms:
        if norms._affine:
            norm.weight, norm.bias = norms.weight, norms.bias
        yield norm


class _InTurn(nn.ModuleList):
    """A layer for each level of a pyramid: each call takes the next, as in ``CycleBatchNormList``."""

    _next = 0

    def forward(self, x: Tensor) -> Tensor:
        layer = self[self._next]
        self._next = (self._next + 1) % len(self)
        return layer(x)
