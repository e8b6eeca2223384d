"""SpineNet (arXiv:1912.05027) as a detectron2 backbone: 49S, 49, 96, 143 and 190, with outputs P3 to P7.

[TF] is the paper's authors' code (github.com/tensorflow/tpu, models/official/detection, modeling/architecture/
spinenet.py), [MG] their later one (github.com/tensorflow/models, official/vision/modeling/backbones/spinenet.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn
from torch.nn import functional as F

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone.fpn import coarsest_level
from selftrain_d2.modeling.backbone.inverted_bottleneck import branch_scales, checkpointed, silu
from selftrain_d2.modeling.backbone.norm import batch_norm_builder
from selftrain_d2.modeling.backbone.spinenet_blocks import (
    BlockGroup,
    Norm,
    Resampling,
    ScalePermutedBlock,
    conv,
    max_pool,
)


class Block(NamedTuple):
    """A block of the scale-permuted network.

    Attributes:
        level: of its output, whose stride is 2**level.
        bottleneck: its output has four times the filters of its level; else it is a residual block of two 3x3
            convolutions.
        inputs: numbers of its two parents.
        is_output: of its level.
        added: numbers of further blocks of its shape that are added.
    """

    level: int
    bottleneck: bool
    inputs: tuple[int, int]
    is_output: bool = False
    added: tuple[int, ...] = ()


# Blocks 2 to 16; 0 and 1 are the stem's ([TF], found by search in the SpineNet paper). To an output are added the
# blocks of its level that nothing before it uses: that is block 11 alone.
BLOCKS = (
    Block(2, True, (0, 1)),
    Block(4, False, (0, 1)),
    Block(3, True, (2, 3)),
    Block(4, True, (2, 4)),
    Block(6, False, (3, 5)),
    Block(4, True, (3, 5)),
    Block(5, False, (6, 7)),
    Block(7, False, (6, 8)),
    Block(5, True, (8, 9)),
    Block(5, True, (8, 10)),
    Block(4, True, (5, 10), is_output=True),
    Block(3, True, (4, 10), is_output=True),
    Block(5, True, (7, 12), is_output=True, added=(11,)),
    Block(7, True, (5, 14), is_output=True),
    Block(6, True, (12, 14), is_output=True),
)
STEM_BLOCKS, STEM_LEVEL, STEM_FILTERS = 2, 2, 64
#: Filters of a block by its level, times the size's filter scale.
FILTERS = {2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}
COARSEST_STRIDE = 2 ** max(FILTERS)


class Size(NamedTuple):
    """One of the family.

    Attributes:
        out_channels: of P3 to P7.
        filter_scale: factor of FILTERS.
        alpha: of the channels between which levels are resampled to those of the parent's 3x3 convolutions.
        repeats: residual blocks in each block.
    """

    out_channels: int = 256
    filter_scale: float = 1.0
    alpha: float = 0.5
    repeats: int = 1


# [TF]. Its spinenet-49s has 128 output channels, but only 256 give the published 11.9 million parameters and 33.8
# billion operations (with heads of 128).
SIZES = {
    "spinenet-49s": Size(filter_scale=0.65),
    "spinenet-49": Size(),
    "spinenet-96": Size(repeats=2),
    "spinenet-143": Size(alpha=1.0, repeats=3),
    "spinenet-190": Size(out_channels=512, filter_scale=1.3, alpha=1.0, repeats=4),
}
ACTIVATIONS = {"relu": functools.partial(F.relu, inplace=True), "swish": silu}


class SpineNet(Backbone):
    """SpineNet: a stem and 15 blocks whose levels go up and down; outputs p3 to p7 of equal channels.

    Images of other sizes than multiples of 128 are padded with zeros at the bottom and right, which detectron2's models
    do before (``size_divisibility``). Blocks that no output needs are not built: their parameters would get no
    gradient.
    """

    @configurable
    def __init__(
        self,
        *,
        size: Size,
        norm: Norm,
        out_features: Sequence[str] = ("p3", "p4", "p5", "p6", "p7"),
        activation: str = "relu",
        resampling: str = "pool",
        drop_connect_rate: float = 0.0,
        checkpoint_activations: bool = False,
        channels_last: bool = True,
        in_channels: int = 3,
    ):
        """
        Args:
            size: see SIZES.
            norm: channels to norm layer.
            out_features: names among p3 ... p7.
            activation: a key of ACTIVATIONS.
            resampling: a key of :data:`~selftrain_d2.modeling.backbone.spinenet_blocks.RESAMPLINGS`.
            drop_connect_rate: the branches of the n-th of the 15 blocks are dropped, per image, with probability
                drop_connect_rate * n / 15 ([TF]).
            checkpoint_activations: recompute each block in the backward pass instead of keeping its inner
                activations: less memory, more time, equal gradients.
            channels_last: keep weights and activations in this memory format.
            in_channels: channels of the image.

        Raises:
            InputError: unknown activation or resampling.
        """
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InputError(
                f"Unknown MODEL.SPINENET.ACTIVATION {activation!r}: use one of {', '.join(ACTIVATIONS)}."
            )
        self.checkpoint_activations = checkpoint_activations
        self.channels_last = channels_last
        self.repeats = size.repeats
        activate = ACTIVATIONS[activation]

        filters = {level: int(number * size.filter_scale) for level, number in FILTERS.items()}
        group = functools.partial(BlockGroup, repeats=size.repeats, norm=norm, activation=activate)
        self.stem_conv = conv(in_channels, STEM_FILTERS, 7, norm, activate, stride=2)
        self.stem_blocks = nn.ModuleList()
        channels = STEM_FILTERS
        for _ in range(STEM_BLOCKS):
            self.stem_blocks.append(group(channels, filters[STEM_LEVEL], bottleneck=True))
            channels = self.stem_blocks[-1].out_channels

        levels = [STEM_LEVEL] * STEM_BLOCKS + [block.level for block in BLOCKS]
        widths = [channels] * STEM_BLOCKS
        widths += [filters[block.level] * (4 if block.bottleneck else 1) for block in BLOCKS]
        outputs = {f"p{block.level}": i for i, block in _numbered_blocks() if block.is_output}
        self._block_of_feature = {name: outputs[name] for name in sorted(out_features)}
        needed = set(self._block_of_feature.values())
        for i, block in reversed(_numbered_blocks()):
            if i in needed:
                needed.update(block.inputs + block.added)
        self.blocks = nn.ModuleDict()  # by number
        for i, block in _numbered_blocks():
            if i not in needed:
                continue
            resamplings = [
                Resampling(
                    widths[parent],
                    int(filters[levels[parent]] * size.alpha),
                    widths[i],
                    block.level - levels[parent],
                    rule=resampling,
                    norm=norm,
                    activation=activate,
                )
                for parent in block.inputs
            ]
            blocks = group(widths[i], filters[block.level], bottleneck=block.bottleneck)
            self.blocks[str(i)] = ScalePermutedBlock(resamplings, blocks, activate)
        self.endpoints = nn.ModuleDict(
            {
                name: conv(widths[i], size.out_channels, 1, norm, activate)
                for name, i in self._block_of_feature.items()
            }
        )
        self._out_features = list(self._block_of_feature)
        self._out_feature_strides = {name: 2 ** levels[i] for name, i in self._block_of_feature.items()}
        self._out_feature_channels = dict.fromkeys(self._out_features, size.out_channels)

        # Probability of keeping each branch, (blocks * repeats,).
        drop = drop_connect_rate * torch.arange(1, len(BLOCKS) + 1) / len(BLOCKS)
        self.register_buffer("_keep_rates", (1 - drop).repeat_interleave(size.repeats), persistent=False)
        self._drops = drop_connect_rate > 0

        self._initialize()
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        keys = cfg.MODEL.SPINENET
        if keys.NAME not in SIZES:
            raise InputError(f"Unknown MODEL.SPINENET.NAME {keys.NAME!r}: use one of {', '.join(SIZES)}.")
        size = SIZES[keys.NAME]
        return {
            "size": size._replace(out_channels=keys.OUT_CHANNELS or size.out_channels),
            "out_features": [f"p{level}" for level in range(3, coarsest_level(cfg) + 1)],
            "norm": batch_norm_builder(
                keys.NORM, device=cfg.MODEL.DEVICE, eps=keys.NORM_EPS, momentum=keys.NORM_MOMENTUM
            ),
            "activation": keys.ACTIVATION,
            "resampling": keys.RESAMPLING,
            "drop_connect_rate": keys.DROP_CONNECT_RATE,
            "checkpoint_activations": keys.CHECKPOINT_ACTIVATIONS,
            "channels_last": keys.CHANNELS_LAST,
            "in_channels": input_shape.channels,
        }

    @property
    def size_divisibility(self) -> int:
        return COARSEST_STRIDE

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: normalized images (N, C, H, W).

        Returns:
            p3 ... p7, each (N, out_channels, H' / stride, W' / stride), where H' and W' are H and W rounded up to
            multiples of 128.
        """
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % COARSEST_STRIDE, 0, -height % COARSEST_STRIDE))
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = max_pool(self.stem_conv(x), 3, 2)
        outputs = {}
        for i, block in enumerate(self.stem_blocks):
            outputs[i] = x = self._run(block, x)
        scales = self._draw_branch_scales(x.shape[0])
        for (i, spec), scale in zip(_numbered_blocks(), scales):
            if str(i) in self.blocks:
                inputs = (outputs[parent] for parent in spec.inputs + spec.added)
                outputs[i] = self._run(self.blocks[str(i)], scale, *inputs)
        return {name: self.endpoints[name](outputs[i]) for name, i in self._block_of_feature.items()}

    def _run(self, block: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpointed(block, *inputs)
        return block(*inputs)

    def _draw_branch_scales(self, images: int) -> list[torch.Tensor | None]:
        """Drop connect: factors (repeats, N, 1, 1, 1) of each block, see :func:`branch_scales`."""
        if not (self.training and self._drops):
            return [None] * len(BLOCKS)
        return list(branch_scales(self._keep_rates, images).split(self.repeats))

    def _initialize(self) -> None:
        """[TF]: normal with variance 1 / fan-in, cut at two standard deviations; batch norm is at identity."""
        for module in self.modules():
            if isinstance(module, Conv2d):
                # What the cut leaves of the standard deviation: 0.8796.
                std = 1 / math.sqrt(module.weight[0].numel()) / 0.87962566103423978
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


def _numbered_blocks() -> list[tuple[int, Block]]:
    return list(enumerate(BLOCKS, STEM_BLOCKS))


@BACKBONE_REGISTRY.register()
def build_spinenet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SpineNet:
    """SpineNet with its outputs P3 to P7; it needs no FPN."""
    return SpineNet(cfg, input_shape)
