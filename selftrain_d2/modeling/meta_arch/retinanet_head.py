"""Convolutions, activation and batch norm of RetinaNet's heads."""

from __future__ import annotations

import itertools
import math

import torch
from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList, ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from selftrain_d2.modeling.backbone.inverted_bottleneck import silu
from selftrain_d2.modeling.backbone.norm import batch_norm_builder, set_batch_norm_constants


def build_head(cfg: CfgNode, input_shape: list[ShapeSpec]) -> RetinaNetHead:
    """detectron2's head with convolutions of MODEL.RETINANET.CONV_DIM channels."""
    keys = cfg.MODEL.RETINANET
    return RetinaNetHead(cfg, input_shape, conv_dims=[keys.CONV_DIM] * keys.NUM_CONVS)


def make_separable(head: RetinaNetHead) -> None:
    """Put a depthwise 3x3 and a 1x1 convolution in the place of each of the head's, in place.

    As in EfficientDet ([automl] = github.com/google/automl, efficientdet), biases stand beside batch norms, and weights
    are drawn normal with variance 1 / fan-in, cut at two standard deviations. Biases keep their values.
    """
    for subnet in ("cls_subnet", "bbox_subnet"):
        layers = [_separable(m) if isinstance(m, nn.Conv2d) else [m] for m in getattr(head, subnet)]
        setattr(head, subnet, nn.Sequential(*itertools.chain(*layers)))
    for last in ("cls_score", "bbox_pred"):
        setattr(head, last, nn.Sequential(*_separable(getattr(head, last))))


def _separable(conv: nn.Conv2d) -> list[nn.Module]:
    channels = conv.in_channels
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, conv.out_channels, 1)
    for layer in (depthwise, pointwise):
        # What the cut leaves of the standard deviation: 0.8796.
        std = 1 / math.sqrt(layer.weight[0].numel()) / 0.87962566103423978
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    pointwise.bias = conv.bias
    return [depthwise, pointwise]


def set_head_activation(head: RetinaNetHead, activation: str) -> None:
    """Put MODEL.RETINANET.ACTIVATION, relu or swish, in place of the head's ReLUs."""
    if activation == "swish":
        for subnet in (head.cls_subnet, head.bbox_subnet):
            for index, layer in enumerate(subnet):
                if isinstance(layer, nn.ReLU):
                    subnet[index] = Swish()


class Swish(nn.Module):
    """x * sigmoid(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu(x)


def set_head_norms(head: RetinaNetHead, cfg: CfgNode) -> None:
    """Make the batch norms of detectron2's head as MODEL.RETINANET.NORM_* say, in place.

    detectron2's head shares its convolutions between levels and, with norm BN or SyncBN, keeps statistics for
    each level, but one weight and bias for all (``CycleBatchNormList``). With NORM_AFFINE_PER_LEVEL each level
    has a whole batch norm of its own, as in [TF]; then weight decay also knows its parameters as a norm's.
    """
    keys = cfg.MODEL.RETINANET
    if keys.NORM_AFFINE_PER_LEVEL:
        for subnet in (head.cls_subnet, head.bbox_subnet):
            for index, layer in enumerate(subnet):
                if isinstance(layer, CycleBatchNormList):
                    subnet[index] = _own_affine(layer, keys.NORM, cfg.MODEL.DEVICE)
    set_batch_norm_constants(head, eps=keys.NORM_EPS, momentum=keys.NORM_MOMENTUM)


def _own_affine(norms: CycleBatchNormList, kind: str, device: str) -> CycleBatchNormList:
    builder = batch_norm_builder(kind, device=device)
    return CycleBatchNormList(
        len(norms),
        # `affine=False` is what the list asks of its layers, to add one for all: not here.
        bn_class=lambda num_features, affine: builder(num_features),
        num_features=norms[0].num_features,
        affine=False,
    )
