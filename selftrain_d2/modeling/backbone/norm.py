"""Batch norm of the kinds BN, SyncBN and FrozenBN, on any device and number of processes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.layers import BatchNorm2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from selftrain_d2.errors import InputError

NORM_KINDS = ("BN", "SyncBN", "FrozenBN")


def batch_norm_builder(
    kind: str, *, device: str, eps: float = 1e-5, momentum: float = 0.1
) -> Callable[[int], nn.Module]:
    """A function from a number of channels to a norm layer; fits ``detectron2.layers.get_norm``.

    Args:
        kind: "BN"; "SyncBN", statistics over the images of all processes, which in one process is BN;
            "FrozenBN", statistics and affine parameters fixed.
        device: where the model trains (MODEL.DEVICE). ``nn.SyncBatchNorm`` refuses CPU tensors in training,
            so SyncBN of several CPU processes is detectron2's ``NaiveSyncBatchNorm``.
        eps: added to the variance.
        momentum: weight of the new statistics in the running ones (PyTorch's convention, 1 - TensorFlow's).

    Raises:
        InputError: unknown kind.
    """
    if kind not in NORM_KINDS:
        raise InputError(f"Unknown batch norm {kind!r}: use one of {', '.join(NORM_KINDS)}.")
    if kind == "FrozenBN":
        return lambda channels: FrozenBatchNorm2d(channels, eps=eps)
    layer = BatchNorm2d
    if kind == "SyncBN" and comm.get_world_size() > 1:
        layer = nn.SyncBatchNorm if device.startswith("cuda") else NaiveSyncBatchNorm
    return lambda channels: layer(channels, eps=eps, momentum=momentum)


def configured_norm(kind: str, keys: CfgNode, device: str) -> str | Callable[[int], nn.Module]:
    """A norm for ``detectron2.layers.get_norm``: a kind of NORM_KINDS with the constants of a config node.

    Args:
        kind: also others that detectron2 knows (none, GN), which need no care for devices and processes.
        keys: has NORM_EPS and NORM_MOMENTUM.
        device: MODEL.DEVICE.
    """
    if kind not in NORM_KINDS:
        return kind
    return batch_norm_builder(kind, device=device, eps=keys.NORM_EPS, momentum=keys.NORM_MOMENTUM)


def set_batch_norm_constants(module: nn.Module, *, eps: float, momentum: float) -> None:
    """Give every batch norm in a module these constants; for parts that detectron2 builds with its own.

    Args:
        module: changed in place.
        eps, momentum: see :func:`batch_norm_builder`.
    """
    for layer in module.modules():
        if isinstance(layer, (_BatchNorm, FrozenBatchNorm2d)):
            layer.eps = eps
        if isinstance(layer, _BatchNorm):
            layer.momentum = momentum


@contextlib.contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode use the statistics of their input as ever, but keep none for evaluation."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    states = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = torch.empty_like(norm.num_batches_tracked)
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, states):
            norm.momentum, norm.num_batches_tracked = momentum, batches


@contextlib.contextmanager
def single_values_explained() -> Iterator[None]:
    """Inside, a batch norm that has one value a channel to train on, whose variance is none, raises InputError."""
    try:
        yield
    except ValueError as error:
        found = re.search(r"more than 1 value per channel when training, .*\[([\d, ]+)\]", str(error))
        if found is None:
            raise
        raise InputError(
            f"A batch norm has a single value a channel to train on (images, channels, height, width: {found[1]}): "
            "give each process more images a step (SOLVER.*IMS_PER_BATCH, fewer SOLVER.ACCUMULATION_STEPS) or larger "
            "ones (INPUT.AUGMENTATION.IMAGE_SIZE), or the levels no batch norm (MODEL.FPN.NORM, MODEL.FPN.OUTPUT_NORM "
            'and MODEL.RETINANET.NORM "" or GN, MODEL.RETINANET.NORM_AFFINE_PER_LEVEL False).'
        ) from error
