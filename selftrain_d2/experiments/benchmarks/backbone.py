"""Our networks beside others of the same work, without losses and without what comes after.

Features of EfficientNet beside timm's ``features_only``, of SpineNet beside detectron2's ResNet-50 with FPN; outputs of
EfficientDet beside effdet's.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn

from selftrain_d2.errors import InputError
from selftrain_d2.experiments.benchmarks.efficientdet import effdets_detector, our_detector
from selftrain_d2.experiments.benchmarks.timing import markdown_table, ratio, spread, time_in_turns
from selftrain_d2.modeling.backbone import EfficientNet, SpineNet, batch_norm_builder, fuse_batch_norms
from selftrain_d2.modeling.backbone.spinenet import SIZES
from selftrain_d2.modeling.efficientdet_weights import EFFICIENTDET_NAMES

# Name -> images per step on a GPU (bfloat16) and on a CPU core (float32).
BATCHES = {
    "efficientnet-b0": (64, 1),
    "efficientnet-b3": (32, 1),
    "efficientnet-b7": (8, 1),
    "spinenet-49": (32, 1),
    "efficientdet-d0": (32, 1),
    "efficientdet-d2": (16, 1),
}
GPU_SIZE, CPU_SIZE = 640, 384
DROP_CONNECT_RATE = 0.2
FORWARD, TRAIN = "forward", "forward + backward"
R50_FPN = "R50-FPN"


def run(rounds: int, models: Sequence[str] = ()) -> dict[str, Any]:
    """Time C2-C5 (P3-P7 of SpineNet, class and box outputs of EfficientDet): forward without gradients in evaluation
    mode, and forward and backward in training mode.

    On a GPU with bfloat16 autocast and channels_last for all, by the clock; on a CPU in float32, ours in its default
    format and the other in both, in processor time, which other programs change less. "fused" is ours with batch norms
    folded, as for inference.

    Args:
        rounds: how often each is measured.
        models: of BATCHES; all of them if none is given.

    Returns:
        ``table`` (Markdown) and the figures behind it: ``speed`` (images per second), ``time_ratio`` (our time
        / that of timm, R50-FPN or effdet) and on a GPU ``peak_memory_gib``, by model, pass and contestant; each but the
        memory with the median, smallest and largest of the rounds.

    Raises:
        InputError: an unknown model; timm or effdet is not installed.
    """
    unknown = sorted(set(models) - set(BATCHES))
    if unknown:
        raise InputError(f"--models {' '.join(unknown)}: this benchmark has {', '.join(BATCHES)}.")
    on_gpu = torch.cuda.is_available()
    results: dict[str, Any] = {"speed": {}, "time_ratio": {}, "peak_memory_gib": {}}
    rows = []
    for name in models or BATCHES:
        batch, size = (BATCHES[name][0], GPU_SIZE) if on_gpu else (BATCHES[name][1], CPU_SIZE)
        images = torch.randn(batch, 3, size, size, device="cuda" if on_gpu else "cpu")
        for phase in (FORWARD, TRAIN):
            contestants = _contestants(name, images, phase)
            if on_gpu:
                memory = {key: _peak_memory(step) for key, step in contestants.items()}
                results["peak_memory_gib"].setdefault(name, {})[phase] = memory
            clock = time.perf_counter if on_gpu else time.process_time
            speeds = time_in_turns(contestants, batch, rounds, clock)
            baseline = _baseline(name)
            ratios = {key: ratio(speeds, baseline, key) for key in contestants if key != baseline}
            results["speed"].setdefault(name, {})[phase] = {k: spread(v) for k, v in speeds.items()}
            results["time_ratio"].setdefault(name, {})[phase] = ratios
            rows += [
                [
                    f"{name}, {batch} x {size} px, {phase}, {key}",
                    f"{spread(speeds[key])['median']:.2f}",
                    "{median:.2f} ({min:.2f} - {max:.2f})".format(**ratios[key]) if key in ratios else "",
                    f"{memory[key]:.1f}" if on_gpu else "",
                ]
                for key in contestants
            ]
    results["table"] = markdown_table(
        ["", "images/s", f"time / that of timm, {R50_FPN} or effdet", "peak memory, GiB"], rows
    )
    return results


def _baseline(name: str) -> str:
    if name in EFFICIENTDET_NAMES:
        return "effdet"
    return R50_FPN if name in SIZES else "timm"


def _contestants(name: str, images: torch.Tensor, phase: str) -> dict[str, Callable[[], None]]:
    device = images.device.type
    other, build = _baseline(name), _builder_of_the_other(name, images.shape[-1])
    ours = _our_model(name, device)
    channels_last = build().to(memory_format=torch.channels_last)
    models = {"ours": ours, other: channels_last}
    if device == "cpu":
        models = {"ours": ours, other: build(), f"{other}, channels_last": channels_last}
    if phase == FORWARD:
        models["ours, fused"] = fuse_batch_norms(ours)
    train = phase == TRAIN
    return {key: _step(model.to(device).train(train), images, train) for key, model in models.items()}


def _our_model(name: str, device: str) -> nn.Module:
    if name in EFFICIENTDET_NAMES:
        return our_detector(name, device)
    norm = batch_norm_builder("BN", device=device, eps=1e-3, momentum=0.01)
    if name in SIZES:
        return SpineNet(size=SIZES[name], norm=norm)
    return EfficientNet(
        name=name,
        out_features=["res2", "res3", "res4", "res5"],
        norm=norm,
        drop_connect_rate=DROP_CONNECT_RATE,
    )


def _builder_of_the_other(name: str, size: int) -> Callable[[], nn.Module]:
    if name in EFFICIENTDET_NAMES:
        return functools.partial(effdets_detector, name, size)
    return _resnet50_fpn if name in SIZES else functools.partial(_timm_model, name)


def _resnet50_fpn() -> nn.Module:
    """detectron2's RetinaNet backbone with outputs P3-P7, as it is trained from random weights."""
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_retinanet_resnet_fpn_backbone", 0
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = "BN"
    return build_backbone(cfg)


def _timm_model(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise InputError("This benchmark compares with timm: pip install timm.") from error
    return timm.create_model(
        "tf_" + name.replace("-", "_"),
        features_only=True,
        out_indices=(1, 2, 3, 4),
        drop_path_rate=DROP_CONNECT_RATE,
    )


def _step(model: nn.Module, images: torch.Tensor, train: bool) -> Callable[[], None]:
    on_gpu = images.is_cuda

    def step() -> None:
        with torch.set_grad_enabled(train):
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                x = images.contiguous(memory_format=torch.channels_last) if on_gpu else images
                features = model(x)
            if train:
                sum(output.float().mean() for output in _tensors(features)).backward()
                model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()

    return step


def _tensors(outputs: torch.Tensor | Mapping | Sequence) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
        return
    for part in outputs.values() if isinstance(outputs, Mapping) else outputs:
        yield from _tensors(part)


def _peak_memory(step: Callable[[], None]) -> float:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30
