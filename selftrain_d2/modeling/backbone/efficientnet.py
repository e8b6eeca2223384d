"""EfficientNet (arXiv:1905.11946) as a detectron2 backbone: B0-B8, L2 and the Lite models.

The architecture is read from efficientnet-pytorch, block by block; the forward is our own: it has no
classification head, pads only where TensorFlow's "same" padding is asymmetric, and uses fused SiLU.
Modules keep that package's attribute names (``_conv_stem``, ``_blocks.7._expand_conv``), so its weights load
as they are.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone.inverted_bottleneck import (
    InvertedBottleneck,
    SameConv2d,
    branch_scales,
    checkpointed,
    relu6,
    silu,
)
from selftrain_d2.modeling.backbone.norm import batch_norm_builder

EFFICIENTNET_NAMES = (
    *(f"efficientnet-b{size}" for size in range(9)),
    "efficientnet-l2",
    *(f"efficientnet-lite{size}" for size in range(5)),
)

# [TF]: momentum 0.99 in TensorFlow's convention.
BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.01


class EfficientNet(Backbone):
    """EfficientNet without its classification head.

    The feature ``res<k>`` is the output of the last block at stride 2**k, so res3, res4, res5 are the paper's
    C3, C4, C5 (efficientnet-pytorch's ``reduction_3`` ... ``reduction_5``). The names are those of
    detectron2's ResNets: its FPN configs work with the backbone's name changed only. Blocks after the last
    feature asked for are not built. Inputs may have any size; a feature's size is ceil(size / stride).
    """

    CONV_NORM_PAIRS = (("_conv_stem", "_bn0"),)

    @configurable
    def __init__(
        self,
        *,
        name: str,
        out_features: Sequence[str],
        norm: Callable[[int], nn.Module],
        drop_connect_rate: float = 0.2,
        freeze_at: int = 0,
        checkpoint_activations: bool = False,
        channels_last: bool = True,
        in_channels: int = 3,
    ):
        """
        Args:
            name: one of EFFICIENTNET_NAMES.
            out_features: names among res1 ... res5.
            norm: channels to norm layer.
            drop_connect_rate: a block's residual branch is dropped, per image, with probability
                drop_connect_rate * block index / number of blocks ([TF]).
            freeze_at: 0: everything trains; 1: the stem is frozen; k >= 2: also all blocks up to res<k>.
                Frozen parts get no gradients, fixed batch norm, and no drop connect.
            checkpoint_activations: recompute each block in the backward pass instead of keeping its inner
                activations: less memory, more time, equal gradients.
            channels_last: keep weights and activations in this memory format.
            in_channels: channels of the image.

        Raises:
            InputError: unknown name or feature, or a package that is not installed.
        """
        super().__init__()
        blocks = _architecture(name)
        activation = relu6 if "lite" in name else silu
        stem_channels = blocks[0]._block_args.input_filters

        strides = _cumulative_strides(blocks)
        last_block = {f"res{int(math.log2(stride))}": index for index, stride in enumerate(strides)}
        if not out_features or any(feature not in last_block for feature in out_features):
            raise InputError(
                f"{name} has no features {list(out_features)} (MODEL.FPN.IN_FEATURES, or "
                f"MODEL.EFFICIENTNET.OUT_FEATURES without FPN): choose among {', '.join(last_block)}."
            )
        self._out_features = sorted(out_features, key=last_block.get)
        self._out_feature_strides = {f: strides[last_block[f]] for f in self._out_features}
        self._out_feature_channels = {
            f: blocks[last_block[f]]._block_args.output_filters for f in self._out_features
        }
        self._feature_after_block = {last_block[f]: f for f in self._out_features}

        self.activation = activation
        self.checkpoint_activations = checkpoint_activations
        self.channels_last = channels_last
        self._conv_stem = SameConv2d(in_channels, stem_channels, 3, stride=2)
        self._bn0 = norm(stem_channels)
        self._blocks = nn.ModuleList()
        for block in blocks[: last_block[self._out_features[-1]] + 1]:
            args = block._block_args
            self._blocks.append(
                InvertedBottleneck(
                    args.input_filters,
                    args.output_filters,
                    kernel_size=args.kernel_size,
                    stride=_stride(args),
                    expand_ratio=args.expand_ratio,
                    squeeze_channels=block._se_reduce.out_channels if block.has_se else 0,
                    norm=norm,
                    activation=activation,
                )
            )
        # Probability of keeping each block's branch, (blocks,).
        keep = 1 - drop_connect_rate * torch.arange(len(self._blocks)) / len(blocks)
        self.register_buffer("_keep_rates", keep, persistent=False)
        self._drops = drop_connect_rate > 0

        self._initialize()
        self._freeze(freeze_at, strides)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec, out_features: Sequence[str]) -> dict:
        keys = cfg.MODEL.EFFICIENTNET
        freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
        if freeze_at > 0 and not cfg.MODEL.WEIGHTS:
            logging.getLogger(__name__).warning(
                "MODEL.BACKBONE.FREEZE_AT is %d but MODEL.WEIGHTS is empty: the frozen layers stay random. "
                "Set MODEL.BACKBONE.FREEZE_AT to 0 (detectron2's default is 2) or give weights.",
                freeze_at,
            )
        return {
            "name": keys.NAME,
            "out_features": out_features,
            "norm": batch_norm_builder(
                keys.NORM, device=cfg.MODEL.DEVICE, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM
            ),
            "drop_connect_rate": keys.DROP_CONNECT_RATE,
            "freeze_at": freeze_at,
            "checkpoint_activations": keys.CHECKPOINT_ACTIVATIONS,
            "channels_last": keys.CHANNELS_LAST,
            "in_channels": input_shape.channels,
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: normalized images (N, C, H, W).

        Returns:
            feature name to (N, C_k, ceil(H / 2**k), ceil(W / 2**k)).
        """
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        scales = self._draw_branch_scales(len(x))
        outputs = {}
        x = self.activation(self._bn0(self._conv_stem(x)))
        for index, block in enumerate(self._blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpointed(block, x, scales[index])
            else:
                x = block(x, scales[index])
            if index in self._feature_after_block:
                outputs[self._feature_after_block[index]] = x
        return outputs

    def _draw_branch_scales(self, images: int) -> Sequence[torch.Tensor | None]:
        """Drop connect: a factor (N, 1, 1, 1) per block, see :func:`branch_scales`."""
        if not (self.training and self._drops):
            return [None] * len(self._blocks)
        return branch_scales(self._keep_rates, images).unbind()

    def _initialize(self) -> None:
        """[TF]: convolutions normal with variance 2 / fan-out, biases zero; batch norm is at identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _freeze(self, freeze_at: int, strides: Sequence[int]) -> None:
        if freeze_at < 1:
            return
        count = sum(stride <= 2**freeze_at for stride in strides[: len(self._blocks)]) if freeze_at > 1 else 0
        self._keep_rates[:count] = 1
        for parameter in (*self._conv_stem.parameters(), *self._blocks[:count].parameters()):
            parameter.requires_grad = False
        self._bn0 = FrozenBatchNorm2d.convert_frozen_batchnorm(self._bn0)
        FrozenBatchNorm2d.convert_frozen_batchnorm(self._blocks[:count])


@functools.cache
def _architecture(name: str) -> Sequence[nn.Module]:
    """The blocks of the package's own model, on the meta device: shapes, and no memory."""
    if name not in EFFICIENTNET_NAMES:
        raise InputError(
            f"Unknown MODEL.EFFICIENTNET.NAME {name!r}: use one of {', '.join(EFFICIENTNET_NAMES)}."
        )
    package, requirement = ("efficientnet_pytorch", "efficientnet-pytorch")
    if "lite" in name:
        package, requirement = ("efficientnet_lite_pytorch", "selftrain_d2[lite]")
    try:
        model_class = importlib.import_module(package).EfficientNet
    except ImportError as error:
        raise InputError(f"{name} needs the package {package}: pip install '{requirement}'.") from error
    with torch.device("meta"):
        return list(model_class.from_name(name)._blocks)


def _stride(block_args) -> int:
    # The package stores [2] for a stage's first block and 1 for the others.
    stride = block_args.stride
    return stride if isinstance(stride, int) else stride[0]


def _cumulative_strides(blocks: Sequence[nn.Module]) -> list[int]:
    strides, stride = [], 2
    for block in blocks:
        stride *= _stride(block._block_args)
        strides.append(stride)
    return strides


@BACKBONE_REGISTRY.register()
def build_efficientnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> EfficientNet:
    """EfficientNet alone; its outputs are MODEL.EFFICIENTNET.OUT_FEATURES."""
    return EfficientNet(cfg, input_shape, cfg.MODEL.EFFICIENTNET.OUT_FEATURES)
