"""Labeling: the tool beside bare loops of its own model and detectron2's inference_on_dataset; its memory."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from tqdm import tqdm

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.data.image_sources import list_images
from selftrain_d2.experiments.benchmarks.augmentation import make_records
from selftrain_d2.experiments.benchmarks.timing import markdown_table, ratio, spread
from selftrain_d2.labeling.generate import generate_pseudo_labels
from selftrain_d2.labeling.inference import LOOK_AHEAD, Teacher, label_in_order, read_ahead

SIZE = 256
BATCH = 8
IMAGES, FILES = 96, 24  # whole batches; the files, of 1000 x 750 pixels, are linked under several names
WORKERS = 2
LISTED = (1_000, 100_000)

TOOL, TOOL_ALONE = f"label, {WORKERS} loader workers", "label, no loader worker"
BARE, BARE_READING = "bare loop over decoded images", "bare loop, decodes in between"
DETECTRON2 = "inference_on_dataset, {} image{} a batch, {} workers"
PEERS = [DETECTRON2.format(1, "", WORKERS), DETECTRON2.format(BATCH, "s", WORKERS)]
# (one, other): how many times faster one is.
COMPARED = [(TOOL, BARE), (TOOL_ALONE, BARE_READING), *((TOOL, peer) for peer in PEERS)]
SHAPES = {2: "two shapes by turns", 8: "eight shapes by turns"}


def run(rounds: int) -> dict[str, Any]:
    """Time labeling of JPEG files with a RetinaNet-B0 of 64 channels, and measure its memory.

    The tool's time is that of reading, resizing, detecting and writing, from the start of the loader
    workers to the last shard; building the teacher comes before, as it does for the others.

    Memory is that of a process that labels ``LISTED`` images for real, with a teacher of one convolution, so
    that a hundred thousand take a minute or two.

    Args:
        rounds: how often each is measured. Memory is measured once.

    Returns:
        ``table`` (Markdown), ``speed`` by contestant (images per second), ``ratio`` by pair, ``memory_mib``
        (most resident memory) by number of listed images, where /proc tells it.
    """
    with tempfile.TemporaryDirectory() as folder:
        photos = _photos(Path(folder))
        cfg = _config(Path(folder))
        speeds = _in_turns(_contestants(cfg, photos, Path(folder)), rounds)
        memory = _memory(Path(folder)) if os.path.exists("/proc/self/status") else {}
    pairs = [*COMPARED, *((f"{name}, looking ahead", f"{name}, as they come") for name in SHAPES.values())]
    results: dict[str, Any] = {
        "speed": {name: spread(values) for name, values in speeds.items()},
        "ratio": {f"{one} / {other}": ratio(speeds, one, other) for one, other in pairs},
        "memory_mib": memory,
    }
    rows = [
        [name, "{median:.2f} ({min:.2f} - {max:.2f})".format(**s)] for name, s in results["speed"].items()
    ]
    ratios = [
        [name, "{median:.3f} ({min:.3f} - {max:.3f})".format(**r)] for name, r in results["ratio"].items()
    ]
    tables = [markdown_table(["", "images/s"], rows), markdown_table(["", "times"], ratios)]
    if memory:
        lines = [[f"{number:,} images listed and labeled", f"{mib:.1f}"] for number, mib in memory.items()]
        tables.append(markdown_table(["", "most resident memory, MiB"], lines))
    results["table"] = "\n\n".join(tables)
    return results


def _in_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """As ``time_in_turns``, of contestants that return their own speed, in images per second, and need no
    rehearsal: images and detector were used before.
    """
    order = np.random.RandomState(0)
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for _ in tqdm(range(rounds), disable=None, leave=False):
        for index in order.permutation(len(names)):
            speeds[names[index]].append(contestants[names[index]]())
    return speeds


def _photos(folder: Path) -> Path:
    records = make_records(folder, FILES)
    photos = folder / "photos"
    photos.mkdir()
    for i in range(IMAGES):
        os.symlink(records[i % FILES]["file_name"], photos / f"{i:04d}.jpg")
    return photos


def _config(folder: Path) -> CfgNode:
    """A teacher with random weights, which finds nothing in some images and a hundred boxes in others."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SelfTrainingRetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_efficientnet_fpn_backbone"
    cfg.MODEL.EFFICIENTNET.NAME = "efficientnet-b0"
    cfg.MODEL.EFFICIENTNET.NORM = "BN"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.RETINANET.NUM_CONVS = 2
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.05
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)
    ]
    cfg.INPUT.AUGMENTATION.IMAGE_SIZE = SIZE
    # detectron2's own resizing, to the same size.
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = SIZE
    cfg.DATALOADER.NUM_WORKERS = WORKERS
    torch.manual_seed(0)
    detector = build_model(cfg)
    nn.init.normal_(detector.head.cls_score.weight, std=0.01)
    cfg.MODEL.WEIGHTS = str(folder / "teacher.pth")
    torch.save({"model": detector.state_dict()}, cfg.MODEL.WEIGHTS)
    return cfg


def _contestants(cfg: CfgNode, photos: Path, folder: Path) -> dict[str, Callable[[], float]]:
    names = list_images(photos)
    teacher = Teacher(cfg, _detector(cfg))
    in_process = cfg.clone()
    in_process.DATALOADER.NUM_WORKERS = 0
    decoded = list(read_ahead(in_process, str(photos), names, BATCH))

    def bare(samples: Iterator[dict]) -> None:
        batch = []
        for sample in samples:
            batch.append({"image": sample["images"][0], "height": sample["height"], "width": sample["width"]})
            if len(batch) == BATCH:
                with torch.no_grad():
                    [output["instances"].to("cpu") for output in teacher.model(batch)]
                batch = []

    bare(iter(decoded[:BATCH]))
    contestants = {
        TOOL: lambda: _tool(cfg, photos, names, folder),
        TOOL_ALONE: lambda: _tool(in_process, photos, names, folder),
        BARE: _timed(IMAGES, lambda: bare(iter(decoded))),
        BARE_READING: _timed(IMAGES, lambda: bare(read_ahead(in_process, str(photos), names, BATCH))),
        PEERS[0]: _detectron2(cfg, teacher.model, photos, names, 1),
        PEERS[1]: _detectron2(cfg, teacher.model, photos, names, BATCH),
    }
    for number, name in SHAPES.items():
        samples = [_cropped(sample, i % number) for i, sample in enumerate(decoded[: IMAGES // 2])]
        for way, look_ahead in (("looking ahead", LOOK_AHEAD), ("as they come", 1)):
            contestants[f"{name}, {way}"] = _timed(len(samples), _labeled(samples, teacher, look_ahead))
    return contestants


def _detector(cfg: CfgNode) -> nn.Module:
    detector = build_model(cfg).eval()
    detector.load_state_dict(torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"])
    return detector


def _tool(cfg: CfgNode, photos: Path, names: list[str], folder: Path) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as output:
        manifest = generate_pseudo_labels(
            cfg, photos, names, output, batch_size=BATCH, thing_classes=[str(i) for i in range(80)]
        )
    return manifest["images_per_second_of_last_run"]


def _timed(images: int, work: Callable[[], object]) -> Callable[[], float]:
    def contestant() -> float:
        start = time.perf_counter()
        work()
        return images / (time.perf_counter() - start)

    return contestant


def _labeled(samples: list[dict], teacher: Teacher, look_ahead: int) -> Callable[[], object]:
    # The samples are copied because labeling takes them apart.
    return lambda: list(label_in_order((dict(s) for s in samples), teacher, BATCH, look_ahead))


def _cropped(sample: dict, number: int) -> dict:
    """Another shape for each number, of nearly the same area."""
    return {**sample, "images": [image[:, :, : image.shape[2] - 4 * number] for image in sample["images"]]}


class _Keep(DatasetEvaluator):
    """What COCOEvaluator does with each image, without the evaluation at the end."""

    def reset(self) -> None:
        self.found = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for sample, output in zip(inputs, outputs):
            self.found += instances_to_coco_json(output["instances"].to("cpu"), sample["image_id"])


def _detectron2(cfg, detector, photos: Path, names: list[str], batch_size: int) -> Callable[[], float]:
    dicts = [{"file_name": str(photos / name), "image_id": name} for name in names]

    def work() -> None:
        loader = build_detection_test_loader(
            dicts, mapper=DatasetMapper(cfg, is_train=False), batch_size=batch_size, num_workers=WORKERS
        )
        inference_on_dataset(detector, loader, _Keep())

    return _timed(len(names), work)


@META_ARCH_REGISTRY.register()
class OneConvolution(nn.Module):
    """A teacher that costs next to nothing: one box an image."""

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 8, stride=8)

    def forward(self, inputs: list[dict]) -> list[dict]:
        pixels = torch.stack([sample["image"] for sample in inputs]).float() / 255
        boxes = self.convolution(pixels).sigmoid().mean(dim=(2, 3))
        outputs = []
        for sample, box in zip(inputs, boxes):
            instances = Instances((sample["height"], sample["width"]))
            instances.pred_boxes = Boxes(box[None] * sample["height"])
            instances.scores = box[:1]
            instances.pred_classes = torch.zeros(1, dtype=torch.long)
            outputs.append({"instances": instances})
        return outputs


def _memory(folder: Path) -> dict[int, float]:
    """By number of images: the most resident memory of a new process that lists and labels them, in MiB."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "OneConvolution"
    cfg.MODEL.WEIGHTS = str(folder / "one_convolution.pth")
    cfg.INPUT.AUGMENTATION.IMAGE_SIZE = 32
    cfg.DATALOADER.NUM_WORKERS = 0
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    cv2.imwrite(str(folder / "tiny.jpg"), np.random.RandomState(0).randint(0, 255, (32, 32, 3), np.uint8))
    memory = {}
    for number in LISTED:
        many = folder / f"many{number}"
        for i in range(number):
            if i % 1000 == 0:
                (many / f"{i // 1000:04d}").mkdir(parents=True)
            os.symlink(folder / "tiny.jpg", many / f"{i // 1000:04d}" / f"photograph_{i:08d}.jpg")
        context = torch.multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            memory[number] = pool.apply(_most_memory, (cfg, str(many), str(folder / f"labels{number}")))
    return memory


def _most_memory(cfg: CfgNode, photos: str, output: str) -> float:
    torch.set_num_threads(1)
    names = list_images(photos)
    manifest = generate_pseudo_labels(
        cfg, photos, names, output, score_floor=0.0, batch_size=32, thing_classes=["thing"]
    )
    assert manifest["labeled"] == len(names)
    # Not getrusage: its figure begins with that of the process before exec.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024
