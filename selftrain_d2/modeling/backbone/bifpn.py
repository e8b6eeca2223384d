"""BiFPN (EfficientDet, arXiv:1911.09070): a feature pyramid that goes down and up again, repeated, on any backbone.

[automl] is the paper's authors' code, github.com/google/automl, efficientdet. Its "same" padding at stride 2 depends on
whether a size is even: pyramid and backbone agree at any size if the backbone rounds up as EfficientNet does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Union

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn
from torch.nn import functional as F

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone.fpn import coarsest_level
from selftrain_d2.modeling.backbone.inverted_bottleneck import silu
from selftrain_d2.modeling.backbone.nas_fpn import resample
from selftrain_d2.modeling.backbone.norm import configured_norm
from selftrain_d2.modeling.backbone.pyramid import Pyramid, build_bottom_up_of, pyramid_input_strides

#: MODEL.BIFPN.ATTENTION: each input of a node has a learned weight of at least 0, divided by their sum; or none has.
ATTENTIONS = ("fast", "sum")
#: Keeps the sum of weights from 0 ([automl]).
ATTENTION_EPS = 1e-4

Norm = Union[str, Callable[[int], nn.Module]]


class Node(NamedTuple):
    """A node of the cell.

    Attributes:
        level: of its map, 0 (finest) and up.
        inputs: numbers of the nodes that it sums; the last one is of a neighbouring level, the others of its own.
    """

    level: int
    inputs: tuple[int, ...]


def cell_nodes(levels: int) -> list[Node]:
    """The nodes after the cell's inputs 0 to levels - 1, in order ([automl], fpn_configs.py).

    First down from the coarsest level but one to the finest, then up to the coarsest, where a level's input takes part
    again. The last ``levels`` nodes are the outputs, from the finest: the finest level has no node on the way up.
    """
    known = [[level] for level in range(levels)]
    nodes = []
    for level in range(levels - 2, -1, -1):
        nodes.append(Node(level, (level, known[level + 1][-1])))
        known[level].append(levels + len(nodes) - 1)
    for level in range(1, levels):
        nodes.append(Node(level, (*known[level], known[level - 1][-1])))
        known[level].append(levels + len(nodes) - 1)
    return nodes


def downsample(x: torch.Tensor) -> torch.Tensor:
    """Max-pool of 3x3 cells and stride 2 with TensorFlow's "same" padding: (N, C, H, W) to half of H and W, rounded up.

    An even side has its additional cells at the end alone, an odd one on both sides.
    """
    # In a trace these are constants: right for images that `size_divisibility` has padded, whose levels are all even.
    padding = (int(x.shape[2]) % 2, int(x.shape[3]) % 2)
    return F.max_pool2d(x, 3, 2, padding=padding, ceil_mode=True)


class BiFPNNode(nn.Module):
    """Weighted sum of maps, swish, and a separable 3x3 convolution with norm."""

    def __init__(self, spec: Node, level_channels: Sequence[int], channels: int, norm: Norm, attention: str):
        """
        Args:
            spec: of the node.
            level_channels: of the cell's inputs; others than ``channels`` first go through a 1x1 convolution with norm.
            channels: of the node.
            norm: see ``detectron2.layers.get_norm``. Convolutions keep their biases beside it ([automl]).
            attention: one of ATTENTIONS.
        """
        super().__init__()
        self.spec = spec
        self.laterals = nn.ModuleDict(
            {
                str(i): conv(level_channels[i], channels, 1, norm=norm)
                for i in spec.inputs
                if i < len(level_channels) and level_channels[i] != channels
            }
        )
        self.depthwise = conv(channels, channels, 3, groups=channels, bias=False)
        self.pointwise = conv(channels, channels, 1, norm=norm)
        # [automl] has no weight decay on these; with it they shrink alike, which their quotients do not show.
        self.weights = nn.Parameter(torch.ones(len(spec.inputs))) if attention == "fast" else None

    def forward(self, nodes: Sequence[torch.Tensor], levels: Sequence[int]) -> torch.Tensor:
        """
        Args:
            nodes: maps (N, C_i, H_i, W_i) of all nodes before this one.
            levels: of these nodes.
        """
        maps = [self._lateral(nodes[i], i) for i in self.spec.inputs]
        neighbour = maps.pop()
        is_finer = levels[self.spec.inputs[-1]] < self.spec.level
        if is_finer:
            neighbour = downsample(neighbour)
        if self.weights is None:
            weights = [None] * len(self.spec.inputs)
        else:
            weights = self.weights.relu()
            weights = (weights / (weights.sum() + ATTENTION_EPS)).to(neighbour.dtype).unbind()
            neighbour = neighbour * weights[-1]  # before it grows
        total = neighbour if is_finer else resample(neighbour, -1, maps[0].shape[2:])
        for x, weight in zip(maps, weights):
            total = total + x if weight is None else torch.addcmul(total, x, weight)
        return self.pointwise(self.depthwise(silu(total)))

    def _lateral(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return self.laterals[str(number)](x) if str(number) in self.laterals else x


class BiFPNCell(nn.Module):
    """Levels in, from fine to coarse, and as many of the same sizes out."""

    def __init__(self, level_channels: Sequence[int], channels: int, norm: Norm, attention: str):
        """The arguments are those of :class:`BiFPNNode`."""
        super().__init__()
        self.nodes = nn.ModuleList(
            BiFPNNode(node, level_channels, channels, norm, attention)
            for node in cell_nodes(len(level_channels))
        )
        self.levels = [*range(len(level_channels)), *(node.spec.level for node in self.nodes)]

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            levels: (N, C_k, H_k, W_k); each H, W is half the one before, rounded up.
        """
        nodes = list(levels)
        for node in self.nodes:
            nodes.append(node(nodes, self.levels))
        return nodes[-len(levels) :]


class BiFPN(Pyramid):
    """BiFPN on the last features of a backbone: p3 to p7 where these are res3 to res5, p3 to p8 in EfficientDet-D7x.

    The first coarser level is a 1x1 convolution with norm and a max-pool of the last feature, the others are max-pools.
    Images are padded so that the coarsest stride divides their sizes, as EfficientDet's square ones do: "same" padding
    then falls to the same sides in all of them. Called directly, it takes any size.
    """

    @configurable
    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str],
        coarsest: int,
        out_channels: int,
        repeats: int = 3,
        attention: str = "fast",
        norm: Norm = "BN",
    ):
        """
        Args:
            bottom_up: any backbone.
            in_features: some of its features, of consecutive strides (powers of 2), from fine to coarse.
            coarsest: k of the last level p_k.
            out_channels: of every level.
            repeats: number of cells.
            attention: one of ATTENTIONS.
            norm: after each 1x1 convolution; see ``detectron2.layers.get_norm``.

        Raises:
            InputError: features that the backbone does not have or of other strides, fewer than two levels, an unknown
                attention, or no cell.
        """
        shapes = bottom_up.output_shape()
        strides = pyramid_input_strides(shapes, in_features, "BiFPN")
        while strides[-1] < 2**coarsest:
            strides.append(2 * strides[-1])
        if len(strides) < 2:
            raise InputError(
                f"MODEL.FPN.IN_FEATURES is {list(in_features)} and no head uses a coarser level: BiFPN needs two."
            )
        if attention not in ATTENTIONS:
            raise InputError(
                f"Unknown MODEL.BIFPN.ATTENTION {attention!r}: use one of {', '.join(ATTENTIONS)}."
            )
        if repeats < 1:
            raise InputError(f"MODEL.BIFPN.REPEATS is {repeats}: there must be at least one cell.")

        super().__init__(bottom_up, in_features, strides, out_channels)
        channels = [shapes[name].channels for name in in_features]
        added = len(strides) - len(channels)
        self.coarser_lateral = (
            conv(channels[-1], out_channels, 1, norm=norm)
            if added and channels[-1] != out_channels
            else nn.Identity()
        )
        channels += [out_channels] * added
        self.cells = nn.ModuleList(
            BiFPNCell(given, out_channels, norm, attention)
            for given in (channels, *[[out_channels] * len(strides)] * (repeats - 1))
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        keys = cfg.MODEL.BIFPN
        return {
            "bottom_up": build_bottom_up_of("BIFPN", cfg, input_shape),
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "coarsest": coarsest_level(cfg),
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "repeats": keys.REPEATS,
            "attention": keys.ATTENTION,
            "norm": configured_norm(cfg.MODEL.FPN.NORM, cfg.MODEL.FPN, cfg.MODEL.DEVICE),
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: normalized images (N, C, H, W).

        Returns:
            level name to (N, out_channels, ceil(H / stride), ceil(W / stride)).
        """
        features = self.bottom_up(x)
        levels = [features[name] for name in self.in_features]
        while len(levels) < len(self._out_features):
            is_first = len(levels) == len(self.in_features)
            levels.append(downsample(self.coarser_lateral(levels[-1]) if is_first else levels[-1]))
        for cell in self.cells:
            levels = cell(levels)
        return dict(zip(self._out_features, levels))

    @property
    def size_divisibility(self) -> int:
        return self._out_feature_strides[self._out_features[-1]]


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    groups: int = 1,
    norm: Norm = "",
    bias: bool = True,
) -> Conv2d:
    """Convolution and norm; weights uniform in +-sqrt(6 / (fan-in + fan-out)) ([automl]), biases zero."""
    layer = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        groups=groups,
        bias=bias,
        norm=get_norm(norm, out_channels),
    )
    fan_in, fan_out = layer.weight[0].numel(), layer.weight[:, 0].numel() // groups
    bound = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(layer.weight, -bound, bound)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


@BACKBONE_REGISTRY.register()
def build_bifpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> BiFPN:
    """BiFPN on the registered backbone that MODEL.BIFPN.BOTTOM_UP names, up to the coarsest level the heads use."""
    return BiFPN(cfg, input_shape)
