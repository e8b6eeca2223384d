"""The parts of EfficientNet: TensorFlow's "same" convolution, activations, and the block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from selftrain_d2.modeling.backbone.norm import running_statistics_kept


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding for any input size: output size is ceil(input / stride).

    At stride 1 this is the usual symmetric padding. At stride 2 and even input size one pixel less is padded
    on the left and top than on the right and bottom.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve (N, C, H, W) to (N, C', ceil(H / stride), ceil(W / stride))."""
        if self.stride[0] == 1:
            return F.conv2d(x, self.weight, self.bias, padding=self.padding, groups=self.groups)
        top, bottom = self._padding(x.shape[2])
        left, right = self._padding(x.shape[3])
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, stride=self.stride, groups=self.groups)

    def _padding(self, size: int) -> tuple[int, int]:
        # (ceil(size / stride) - 1) * stride + kernel - size, in integer operations that a trace can follow: there a
        # size is a tensor, and `math` or `max` would make a constant of it. Not negative, as kernel >= stride.
        total = self.kernel_size[0] - 1 - (size - 1) % self.stride[0]
        return total // 2, total - total // 2


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x). In place only without gradients: autograd would clone the input first."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def relu6(x: torch.Tensor) -> torch.Tensor:
    """min(max(x, 0), 6) in place: its gradient needs the output alone."""
    return F.relu6(x, inplace=True)


class InvertedBottleneck(nn.Module):
    """Expand (1x1), depthwise convolution, squeeze-and-excitation, project (1x1), skip connection."""

    CONV_NORM_PAIRS = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int,
        expand_ratio: int,
        squeeze_channels: int,
        norm: Callable[[int], nn.Module],
        activation: Callable[[torch.Tensor], torch.Tensor],
    ):
        """
        Args:
            in_channels, out_channels: of the block.
            kernel_size, stride: of the depthwise convolution.
            expand_ratio: inner channels per input channel. 1: no expanding convolution.
            squeeze_channels: channels inside squeeze-and-excitation. 0: none.
            norm: channels to norm layer.
            activation: element-wise function; may work in place.
        """
        super().__init__()
        channels = in_channels * expand_ratio
        self.expands = expand_ratio != 1
        self.squeezes = squeeze_channels > 0
        self.has_skip = stride == 1 and in_channels == out_channels
        self.stride = stride
        self.activation = activation
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self._bn0 = norm(channels)
        self._depthwise_conv = SameConv2d(channels, channels, kernel_size, stride, groups=channels)
        self._bn1 = norm(channels)
        if self.squeezes:
            self._se_reduce = nn.Conv2d(channels, squeeze_channels, 1)
            self._se_expand = nn.Conv2d(squeeze_channels, channels, 1)
        self._project_conv = nn.Conv2d(channels, out_channels, 1, bias=False)
        self._bn2 = norm(out_channels)

    def forward(self, inputs: torch.Tensor, branch_scale: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            inputs: (N, C, H, W).
            branch_scale: (N, 1, 1, 1), factor of the residual branch (drop connect); None is 1.

        Returns:
            (N, C', ceil(H / stride), ceil(W / stride)).
        """
        x = inputs
        if self.expands:
            x = self.activation(self._bn0(self._expand_conv(x)))
        x = self.activation(self._bn1(self._depthwise_conv(x)))
        if self.squeezes:
            gate = self.activation(self._se_reduce(x.mean((2, 3), keepdim=True)))
            x = x * self._se_expand(gate).sigmoid()
        x = self._bn2(self._project_conv(x))
        if not self.has_skip:
            return x
        if branch_scale is None:
            return inputs + x
        return torch.addcmul(inputs, x, branch_scale.to(x.dtype))


def branch_scales(keep_rates: torch.Tensor, images: int) -> torch.Tensor:
    """Drop connect: factors (blocks, N, 1, 1, 1) of residual branches, each 0 or 1 / keep rate; one draw for all.

    Args:
        keep_rates: probability of keeping each block's branch, (blocks,).
        images: N.
    """
    rates = keep_rates[:, None]
    draws = torch.rand((len(rates), images), device=rates.device)
    return ((draws < rates) / rates)[:, :, None, None, None]


def checkpointed(block: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    """Run a block without keeping its activations; the backward pass computes them again."""
    # Drop connect is drawn outside the block, so there is no random state to keep. Batch norms must not count the same
    # images a second time.
    return checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), running_statistics_kept(block)),
    )
