"""A whole training step: supervised, self-training in one forward, in two, with a teacher in it, and detectron2's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from torch import nn

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.data.pseudo_labels.selection import matching_threshold
from selftrain_d2.data.unlabeled_mapper import UnlabeledImageMapper
from selftrain_d2.engine.hooks.moving_teacher import MovingTeacher
from selftrain_d2.experiments.benchmarks.timing import markdown_table, ratio, spread, time_in_turns
from selftrain_d2.labeling.step_labels import set_score_floor

# Size in pixels and images a step; half of them pseudo-labeled where there are two sources.
GPU_SIZE, GPU_IMAGES = 640, {"efficientnet-b0": 32, "efficientnet-b7": 8}
CPU_SIZE, CPU_IMAGES = 256, {"efficientnet-b0": 4}
BOXES_PER_IMAGE = 7  # COCO's mean
SUPERVISED, ONE_FORWARD, TWO_FORWARDS = "supervised", "self-training", "self-training, two forwards"
MOVING_TEACHER = "self-training, moving-average teacher"
RESNET = "detectron2's RetinaNet-R50-FPN, supervised"


def run(rounds: int) -> dict[str, Any]:
    """Time forward, backward and SGD step on the same number of images.

    On a GPU in bfloat16 autocast and channels_last, on a CPU core in float32. The arithmetic rate counts
    fvcore's multiply-adds of a forward pass as two operations, and a step as three forward passes.

    Args:
        rounds: how often each is measured.

    Returns:
        ``table`` (Markdown); by backbone ``moving_teacher_ratio``, the time of a step in which a moving average of the
        student labels the pseudo images over that of a step with labels from disk; and by backbone and contestant
        ``speed`` (images per second), ``time_ratio`` (its time / that of the supervised step), ``tflops`` and
        ``memory_gib``: the peak on a GPU, on a CPU what the forward pass keeps for the backward pass.
    """
    on_gpu = torch.cuda.is_available()
    size, images_of = (GPU_SIZE, GPU_IMAGES) if on_gpu else (CPU_SIZE, CPU_IMAGES)
    results: dict[str, Any] = {"speed": {}, "time_ratio": {}, "tflops": {}, "memory_gib": {}}
    results["moving_teacher_ratio"] = {}
    rows, sentences = [], []
    for name, images in images_of.items():
        cfg = _config(name, on_gpu)
        ours, resnet = build_model(cfg), build_model(_config(None, on_gpu))
        if on_gpu:
            ours, resnet = (m.to(memory_format=torch.channels_last) for m in (ours, resnet))
        human, mixed = _batch(images, 0, size), _batch(images - images // 2, images // 2, size)
        parts = [mixed[: images - images // 2], mixed[images - images // 2 :]]
        contestants = {
            SUPERVISED: _step(ours, [human], on_gpu),
            ONE_FORWARD: _step(ours, [mixed], on_gpu),
            TWO_FORWARDS: _step(ours, parts, on_gpu),
            MOVING_TEACHER: _step(
                ours, [_unlabeled(mixed)], on_gpu, _moving_teacher(cfg, ours, _unlabeled(mixed))
            ),
            RESNET: _step(resnet, [human], on_gpu),
        }
        measure = _peak_memory if on_gpu else _kept_for_backward
        memory = {key: measure(step) for key, step in contestants.items()}
        speeds = time_in_turns(contestants, images, rounds)
        operations = {key: 6 * _multiply_adds(resnet if key == RESNET else ours, size) for key in contestants}
        operations[MOVING_TEACHER] *= (
            1 + (images // 2) / images / 3
        )  # a further forward pass of the pseudo images
        ratios = {key: ratio(speeds, SUPERVISED, key) for key in contestants}
        tflops = {key: spread(speeds[key])["median"] * operations[key] / 1e12 for key in contestants}
        results["speed"][name] = {key: spread(values) for key, values in speeds.items()}
        results["time_ratio"][name], results["tflops"][name] = ratios, tflops
        results["memory_gib"][name] = memory
        results["moving_teacher_ratio"][name] = to_labels = ratio(speeds, ONE_FORWARD, MOVING_TEACHER)
        sentences.append(
            f"{name}: a step with a moving-average teacher takes "
            "{median:.2f} ({min:.2f} - {max:.2f}) of the time of one with labels from disk.".format(
                **to_labels
            )
        )
        rows += [
            [
                f"{'' if key == RESNET else name + ', '}{key}, {images} x {size} px",
                f"{spread(speeds[key])['median']:.2f}",
                "{median:.2f} ({min:.2f} - {max:.2f})".format(**ratios[key]),
                f"{tflops[key]:.3f}",
                f"{memory[key]:.2f} ({memory[key] / memory[SUPERVISED]:.3f})",
            ]
            for key in contestants
        ]
    header = ["", "images/s", "time / supervised", "TFLOP/s", "memory, GiB (/ supervised)"]
    results["table"] = "\n".join([markdown_table(header, rows), "", *sentences])
    return results


def _config(efficientnet: str | None, on_gpu: bool) -> CfgNode:
    """RetinaNet for 80 classes with an EfficientNet, or detectron2's own with ResNet-50; both from scratch."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.DEVICE = "cuda" if on_gpu else "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet" if efficientnet is None else "SelfTrainingRetinaNet"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)
    ]
    if efficientnet is None:
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.RESNETS.NORM = "BN"
    else:
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_efficientnet_fpn_backbone"
        cfg.MODEL.EFFICIENTNET.NAME = efficientnet
        cfg.MODEL.EFFICIENTNET.NORM = "BN"
    return cfg


def _batch(human: int, pseudo: int, size: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    batch = []
    for source in ["human"] * human + ["pseudo"] * pseudo:
        instances = Instances((size, size))
        corners = torch.rand(BOXES_PER_IMAGE, 2, generator=generator) * size * 0.5
        sides = (torch.rand(BOXES_PER_IMAGE, 2, generator=generator) * 0.4 + 0.1) * size
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
        instances.gt_classes = torch.randint(0, 80, (BOXES_PER_IMAGE,), generator=generator)
        image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "label_source": source})
    return batch


def _unlabeled(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A batch whose pseudo-labeled images are as the loader has them before they are labeled; nothing is augmented."""
    unlabeled = []
    for sample in batch:
        if sample["label_source"] == "pseudo":
            height, width = sample["image"].shape[1:]
            sample = {
                "file_name": "",
                "height": height,
                "width": width,
                "label_source": "pseudo",
                "image": sample["image"],
                "images": [sample["image"]],
                "transforms": T.TransformList([T.NoOpTransform()]),
            }
        unlabeled.append(sample)
    return unlabeled


def _moving_teacher(cfg: CfgNode, model: nn.Module, batch: list[dict[str, Any]]) -> MovingTeacher:
    """One that begins as the model, whose threshold leaves as many boxes an image as the human-labeled images have."""
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = "random"
    cfg.DATASETS.TRAIN = ("benchmark",)
    MetadataCatalog.get("benchmark").thing_classes = [str(i) for i in range(cfg.MODEL.RETINANET.NUM_CLASSES)]
    cfg.SOLVER.PSEUDO_IMS_PER_BATCH = sum("transforms" in sample for sample in batch)
    cfg.SELFTRAIN.TEACHER_CHECK_PERIOD = 0
    mapper = UnlabeledImageMapper(
        True, augmentations=[], scale_augmentations=[], image_format=cfg.INPUT.FORMAT
    )
    teacher = MovingTeacher(cfg, mapper, check=None)
    teacher.trainer = SimpleNamespace(model=model)
    teacher.before_train()
    images = [sample for sample in batch if "transforms" in sample]
    set_score_floor(teacher.model, 0.0)
    scores = np.concatenate([row["scores"] for row in teacher.teacher(images, len(images))])
    threshold = matching_threshold(scores, BOXES_PER_IMAGE * len(images))
    teacher.selection.thresholds[:] = threshold
    set_score_floor(teacher.model, threshold)
    return teacher


def _step(
    model: nn.Module, batches: list[list[dict]], on_gpu: bool, teacher: MovingTeacher | None = None
) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with EventStorage():
            for batch in batches:
                if teacher is not None:
                    batch = teacher.label(batch)
                with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                    loss = sum(model(batch).values())
                loss.backward()
        optimizer.step()
        if teacher is not None:
            teacher.after_step()
        if on_gpu:
            torch.cuda.synchronize()

    return step


def _multiply_adds(model: nn.Module, size: int) -> float:
    """Of the network on one image, in a forward pass; anchors, matching and losses are left out."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head, self.names = model.backbone, model.head, model.head_in_features

        def forward(self, x):
            features = self.backbone(x)
            return self.head([features[name] for name in self.names])

    network = Network().eval()
    images = torch.zeros(1, 3, size, size, device=model.device)
    with torch.no_grad():
        count = (
            FlopCountAnalysis(network, images)
            .unsupported_ops_warnings(False)
            .uncalled_modules_warnings(False)
        )
        total = count.total()
    model.train()
    return total


def _peak_memory(step: Callable[[], None]) -> float:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def _kept_for_backward(step: Callable[[], None]) -> float:
    """The most GiB that autograd holds at once for one backward pass of a step, each storage once."""
    storages: dict[int, int] = {}
    most = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            most = max(most, sum(storages.values()))
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        storages.clear()  # the backward pass has begun: the next pass starts anew
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        step()
    return most / 2**30
