"""The parts of SpineNet: residual blocks, resampling between levels, and a block with its parents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.nn import functional as F

from selftrain_d2.errors import InputError

Norm = Callable[[int], nn.Module]
Activation = Callable[[torch.Tensor], torch.Tensor]

#: MODEL.SPINENET.RESAMPLING -> kernel and stride of the max-pools that follow the strided convolution on the way down
#: another n levels; None: as many further strided convolutions.
RESAMPLINGS: dict[str, Callable[[int], list[tuple[int, int]]] | None] = {
    "pool": lambda levels: [(3 if levels == 1 else 5, 2**levels)] if levels else [],  # [TF]
    "repeated_pool": lambda levels: [(3, 2)] * levels,  # [MG]
    "conv": None,
}


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    norm: Norm,
    activation: Activation | None = None,
    *,
    stride: int = 1,
) -> Conv2d:
    """Convolution without bias, norm, activation."""
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=False,
        norm=norm(out_channels),
        activation=activation,
    )


def max_pool(x: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    """TensorFlow's "same" max-pool of (N, C, H, W) to (N, C, H / stride, W / stride).

    For kernels of stride + 1 and sizes that the stride divides: one more row and column at the bottom and right.
    """
    return F.max_pool2d(x, kernel_size, stride, ceil_mode=True)


class ResidualBlock(nn.Module):
    """Bottleneck (1x1, 3x3, 1x1 to four times the filters) or plain (two 3x3), with a skip connection."""

    def __init__(
        self, in_channels: int, filters: int, *, bottleneck: bool, norm: Norm, activation: Activation
    ):
        """
        Args:
            in_channels: where they are not the output's, the skip connection has a 1x1 convolution.
            filters: of the 3x3 convolutions.
            norm: channels to norm layer.
            activation: element-wise; may work in place.
        """
        super().__init__()
        self.out_channels = 4 * filters if bottleneck else filters
        self.activation = activation
        if bottleneck:
            self.branch = nn.Sequential(
                conv(in_channels, filters, 1, norm, activation),
                conv(filters, filters, 3, norm, activation),
                conv(filters, self.out_channels, 1, norm),
            )
        else:
            self.branch = nn.Sequential(
                conv(in_channels, filters, 3, norm, activation), conv(filters, filters, 3, norm)
            )
        self.shortcut = (
            nn.Identity()
            if in_channels == self.out_channels
            else conv(in_channels, self.out_channels, 1, norm)
        )

    def forward(self, x: torch.Tensor, branch_scale: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: (N, C, H, W).
            branch_scale: (N, 1, 1, 1), factor of the branch (drop connect); None is 1.

        Returns:
            (N, C', H, W).
        """
        shortcut, branch = self.shortcut(x), self.branch(x)
        if branch_scale is None:
            return self.activation(shortcut + branch)
        return self.activation(torch.addcmul(shortcut, branch, branch_scale.to(branch.dtype)))


class BlockGroup(nn.Sequential):
    """Residual blocks one after another, the first of which may change the number of channels."""

    def __init__(
        self,
        in_channels: int,
        filters: int,
        repeats: int,
        *,
        bottleneck: bool,
        norm: Norm,
        activation: Activation,
    ):
        channels = [in_channels] + [4 * filters if bottleneck else filters] * repeats
        super().__init__(
            *(
                ResidualBlock(c, filters, bottleneck=bottleneck, norm=norm, activation=activation)
                for c in channels[:-1]
            )
        )
        self.out_channels = channels[-1]

    def forward(self, x: torch.Tensor, branch_scales: torch.Tensor | None = None) -> torch.Tensor:
        """(N, C, H, W) to (N, C', H, W); ``branch_scales`` are (repeats, N, 1, 1, 1), or None."""
        scales = [None] * len(self) if branch_scales is None else branch_scales.unbind()
        for block, scale in zip(self, scales):
            x = block(x, scale)
        return x


class Resampling(nn.Sequential):
    """Brings a block's output to another level and width.

    A 1x1 convolution to ``inner_channels``; on the way down a strided 3x3 convolution and what ``rule`` has for further
    levels, on the way up copies of each cell; a 1x1 convolution, without activation, to the target's width.
    """

    def __init__(
        self,
        in_channels: int,
        inner_channels: int,
        out_channels: int,
        levels: int,
        *,
        rule: str,
        norm: Norm,
        activation: Activation,
    ):
        """
        Args:
            levels: to go; positive to coarser ones.
            rule: a key of RESAMPLINGS.

        Raises:
            InputError: unknown rule.
        """
        if rule not in RESAMPLINGS:
            raise InputError(
                f"Unknown MODEL.SPINENET.RESAMPLING {rule!r}: use one of {', '.join(RESAMPLINGS)}."
            )
        pools = RESAMPLINGS[rule]
        layers: list[nn.Module] = [conv(in_channels, inner_channels, 1, norm, activation)]
        if levels > 0:
            layers += [
                conv(inner_channels, inner_channels, 3, norm, activation, stride=2)
                for _ in range(1 if pools else levels)
            ]
            layers += [MaxPool(*pool) for pool in (pools(levels - 1) if pools else [])]
        elif levels < 0:
            layers.append(nn.Upsample(scale_factor=2.0**-levels, mode="nearest"))
        layers.append(conv(inner_channels, out_channels, 1, norm))
        super().__init__(*layers)


class MaxPool(nn.Module):
    """:func:`max_pool` as a layer."""

    def __init__(self, kernel_size: int, stride: int):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return max_pool(x, self.kernel_size, self.stride)


class ScalePermutedBlock(nn.Module):
    """A block with the resampling of its two parents: they are summed, activated, and go through residual blocks."""

    def __init__(self, resamplings: Sequence[Resampling], blocks: BlockGroup, activation: Activation):
        super().__init__()
        self.resamplings = nn.ModuleList(resamplings)
        self.blocks = blocks
        self.activation = activation

    def forward(self, branch_scales: torch.Tensor | None, *inputs: torch.Tensor) -> torch.Tensor:
        """
        Args:
            branch_scales: see :class:`BlockGroup`.
            inputs: outputs of the two parents, each (N, C, H, W) of its own; then those of this block's shape, which
                are added as they are.

        Returns:
            (N, C', H', W').
        """
        parents = [resample(x) for resample, x in zip(self.resamplings, inputs)]
        return self.blocks(self.activation(sum(inputs[2:], parents[0] + parents[1])), branch_scales)
