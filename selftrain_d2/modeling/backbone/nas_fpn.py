"""NAS-FPN (arXiv:1904.07392): a searched feature pyramid of five levels, repeated, on any backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn
from torch.nn import functional as F

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone.norm import configured_norm
from selftrain_d2.modeling.backbone.pyramid import Pyramid, build_bottom_up_of, pyramid_input_strides


def add(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Both (N, C, H, W)."""
    return first + second


def attention(coarser: torch.Tensor, finer: torch.Tensor) -> torch.Tensor:
    """The finer map (N, C, H, W) joins, channel by channel, as far as the coarser one responds anywhere."""
    return coarser + finer * coarser.amax((2, 3), keepdim=True).sigmoid()


class Node(NamedTuple):
    """A node of the cell.

    Attributes:
        level: of its map, 0 (finest) to 4.
        combine: joins its two inputs.
        inputs: numbers of two nodes: for ``attention`` the one of coarser level first.
        added: numbers of further nodes, of the same level, that are added.
    """

    level: int
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    inputs: tuple[int, int]
    added: tuple[int, ...] = ()


LEVELS = 5
# Nodes 5 to 11; nodes 0 to 4 are the cell's inputs, levels 0 to 4 (P3 to P7) ([TF], found by search in the NAS-FPN
# paper). The last five are its outputs, to which inputs that nothing else uses (P5, P7) are added.
CELL = (
    Node(1, attention, (3, 1)),
    Node(1, add, (1, 5)),
    Node(0, add, (0, 6)),
    Node(1, add, (6, 7)),
    Node(2, attention, (8, 7), added=(2,)),
    Node(4, attention, (9, 6), added=(4,)),
    Node(3, attention, (10, 9)),
)
NODE_LEVELS = (*range(LEVELS), *(node.level for node in CELL))
# The last five nodes, from the finest level to the coarsest: 7, 8, 9, 11, 10.
OUTPUTS = sorted(range(len(NODE_LEVELS) - LEVELS, len(NODE_LEVELS)), key=NODE_LEVELS.__getitem__)

ACTIVATIONS = {"relu": F.relu, "swish": F.silu}


def resample(x: torch.Tensor, steps: int, size: Sequence[int]) -> torch.Tensor:
    """Bring a map to another level: maxima of blocks downwards, copies upwards.

    Cell (i, j) of a level covers the cells (2i, 2j) ... (2i + 1, 2j + 1) of the level below that exist, so any size
    works: ceil(size / 2) goes down, and what is too much is cut off on the way up.

    Args:
        x: (N, C, H, W).
        steps: levels to go; positive to coarser ones.
        size: (height, width) of the target.
    """
    if steps > 0:
        x = F.max_pool2d(x, 2**steps, ceil_mode=True)
    elif steps < 0:
        x = F.interpolate(x, scale_factor=2**-steps, mode="nearest")
    return x[:, :, : size[0], : size[1]]


class NASFPNCell(nn.Module):
    """Five levels in, five levels of the same shapes out."""

    def __init__(
        self,
        channels: int,
        *,
        norm: str | Callable[[int], nn.Module],
        separable: bool,
        activation: Callable[[torch.Tensor], torch.Tensor],
    ):
        """
        Args:
            channels: of every level.
            norm, separable, activation: see :class:`NASFPN`.
        """
        super().__init__()
        self.activation = activation
        self.convs = nn.ModuleList(_conv3x3(channels, norm, separable) for _ in CELL)

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            levels: (N, C, H_k, W_k), from fine to coarse; each H, W is half the one before, rounded up.
        """
        nodes = list(levels)
        for node, conv in zip(CELL, self.convs):
            size = levels[node.level].shape[2:]
            first, second = (resample(nodes[i], node.level - NODE_LEVELS[i], size) for i in node.inputs)
            combined = sum((nodes[i] for i in node.added), node.combine(first, second))
            nodes.append(conv(self.activation(combined)))
        return [nodes[i] for i in OUTPUTS]


class NASFPN(Pyramid):
    """NAS-FPN on the last features of a backbone: five levels, p3 to p7 where the first has stride 8.

    A 1x1 convolution with norm brings each feature to the pyramid's channels, where it has others; missing coarser
    levels are the maxima of 2x2 blocks of the one before ([TF]). Then cells follow one another.

    Images need no padding: a level's size is ceil(size / stride), which for sizes that the coarsest stride divides is
    exactly [TF], and for others pools and upsamples along the same grid (:func:`resample`). The bottom-up backbone
    must round up too, as detectron2's and EfficientNet do. (Heads may ask for more: detectron2's SemSegFPNHead needs
    sizes that the coarsest stride divides.)
    """

    @configurable
    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int = 256,
        repeats: int = 7,
        separable: bool = True,
        norm: str | Callable[[int], nn.Module] = "BN",
        activation: str = "relu",
    ):
        """
        Args:
            bottom_up: any backbone.
            in_features: one to five of its features, of consecutive strides (powers of 2), from fine to coarse.
            out_channels: of every level.
            repeats: number of cells.
            separable: 3x3 convolutions are a depthwise 3x3 and a 1x1 one.
            norm: after each convolution; see ``detectron2.layers.get_norm``.
            activation: before each 3x3 convolution, a key of ACTIVATIONS.

        Raises:
            InputError: features that the backbone does not have or of other strides, an unknown activation, or no
                cell.
        """
        shapes = bottom_up.output_shape()
        finest = pyramid_input_strides(shapes, in_features, "NAS-FPN", LEVELS)[0]
        strides = [finest * 2**level for level in range(LEVELS)]
        if activation not in ACTIVATIONS:
            raise InputError(
                f"Unknown MODEL.NAS_FPN.ACTIVATION {activation!r}: use one of {', '.join(ACTIVATIONS)}."
            )
        if repeats < 1:
            raise InputError(f"MODEL.NAS_FPN.REPEATS is {repeats}: there must be at least one cell.")

        super().__init__(bottom_up, in_features, strides, out_channels)
        self.lateral_convs = nn.ModuleList(
            nn.Identity()
            if shapes[name].channels == out_channels
            else _conv(shapes[name].channels, out_channels, 1, norm=norm)
            for name in in_features
        )
        self.cells = nn.ModuleList(
            NASFPNCell(out_channels, norm=norm, separable=separable, activation=ACTIVATIONS[activation])
            for _ in range(repeats)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        keys = cfg.MODEL.NAS_FPN
        return {
            "bottom_up": build_bottom_up_of("NAS_FPN", cfg, input_shape),
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "repeats": keys.REPEATS,
            "separable": keys.SEPARABLE,
            "norm": configured_norm(cfg.MODEL.FPN.NORM, cfg.MODEL.FPN, cfg.MODEL.DEVICE),
            "activation": keys.ACTIVATION,
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: normalized images (N, C, H, W).

        Returns:
            level name to (N, out_channels, ceil(H / stride), ceil(W / stride)), five levels.
        """
        features = self.bottom_up(x)
        levels = [conv(features[name]) for conv, name in zip(self.lateral_convs, self.in_features)]
        while len(levels) < LEVELS:
            levels.append(F.max_pool2d(levels[-1], 2, ceil_mode=True))
        for cell in self.cells:
            levels = cell(levels)
        return dict(zip(self._out_features, levels))

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility


def _conv3x3(channels: int, norm: str | Callable[[int], nn.Module], separable: bool) -> nn.Module:
    if not separable:
        return _conv(channels, channels, 3, norm=norm)
    depthwise = _conv(channels, channels, 3, groups=channels, bias=False)
    return nn.Sequential(depthwise, _conv(channels, channels, 1, norm=norm))


def _conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    norm: str | Callable[[int], nn.Module] = "",
    groups: int = 1,
    bias: bool = True,
) -> Conv2d:
    """A convolution with norm, or, if there is none, with bias."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        groups=groups,
        bias=bias and not norm,
        norm=get_norm(norm, out_channels),
    )
    weight_init.c2_xavier_fill(conv)
    return conv


@BACKBONE_REGISTRY.register()
def build_nas_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> NASFPN:
    """NAS-FPN on the registered backbone that MODEL.NAS_FPN.BOTTOM_UP names."""
    return NASFPN(cfg, input_shape)
