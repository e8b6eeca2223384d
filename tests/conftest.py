"""A tiny COCO set of coloured rectangles, and a detector small enough to train in seconds."""

import contextlib
import json
import logging
import os
import random
import signal
from pathlib import Path
from typing import NamedTuple

# Threads that wait give up their core; on a shared machine, spinning ones make tests ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from selftrain_d2 import AUGMENTATION_REGISTRY, add_selftrain_config
from selftrain_d2.cli import main
from selftrain_d2.cli.common import find_config
from selftrain_d2.data.datasets import register_human_labels, register_pseudo_labels
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter

# Two, or of processes that run tests side by side (pytest-xdist) one each.
torch.set_num_threads(2 if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1" else 1)
# A shell starts what runs in the background with Ctrl-C ignored, and that would be inherited by what tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
COLOURS = {"red": (40, 40, 220), "green": (40, 220, 40)}  # BGR, as OpenCV writes


class CocoSet(NamedTuple):
    """Paths and content of a COCO data set."""

    json_file: str
    images: str
    content: dict


def make_coco_set(folder: Path, number: int, seed: int, size: int = 96) -> CocoSet:
    """Images of one or two filled rectangles on grey noise; each rectangle's colour is its class."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, number + 1):
        pixels = rng.integers(90, 130, (size, size, 3), dtype=np.uint8)
        for _ in range(rng.integers(1, 3)):
            width, height = (int(v) for v in rng.integers(24, 48, 2))
            x, y = int(rng.integers(0, size - width)), int(rng.integers(0, size - height))
            category = int(rng.integers(0, 2))
            pixels[y : y + height, x : x + width] = list(COLOURS.values())[category]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 10 * (category + 1),  # not contiguous, as in COCO
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        name = f"{image_id:03d}.png"
        cv2.imwrite(str(folder / "images" / name), pixels)
        images.append({"id": image_id, "file_name": name, "height": size, "width": size})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(COLOURS)],
    }
    json_file = folder / "labels.json"
    json_file.write_text(json.dumps(content))
    return CocoSet(str(json_file), str(folder / "images"), content)


def make_class_folders(folder: Path, classes: tuple = ("bright", "dark", "noise"), number: int = 4) -> Path:
    """A folder ``CLASS/0.png ...`` of images of different sizes."""
    rng = np.random.default_rng(0)
    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            pixels = rng.integers(80 * level, 80 * level + 60, (40 + 5 * i, 60, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / name / f"{i}.png"), pixels)
    return folder


@pytest.fixture
def coco_set(tmp_path):
    """Eight labeled images."""
    return make_coco_set(tmp_path / "coco", 8, seed=0)


@pytest.fixture
def small_config():
    """``make(**KEY=value)``: a B0 detector of 16 channels at 96 pixels, on the CPU."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.merge_from_file(str(find_config("Base-RetinaNet-EfficientNet-FPN.yaml")), allow_unsafe=False)
    cfg.merge_from_list(SMALL_MODEL)
    return cfg


@pytest.fixture
def student_config(small_config, coco_set, tmp_path):
    """A student whose pseudo labels are two of the images, one with a box."""
    register_human_labels("human", coco_set.json_file, coco_set.images)
    identity = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": coco_set.images}
    writer = PseudoLabelWriter(tmp_path / "pseudo", identity, ["001.png", "002.png"])
    row = make_row("001.png", 96, 96, [[10, 10, 60, 60]], [0.9], [0])
    writer.write_shard(0, [row, make_row("002.png", 96, 96)])
    writer.finish()
    register_pseudo_labels("pseudo", tmp_path / "pseudo")
    cfg = small_config
    cfg.DATASETS.TRAIN, cfg.DATASETS.PSEUDO_TRAIN, cfg.DATASETS.TEST = ("human",), ("pseudo",), ()
    cfg.SOLVER.PSEUDO_IMS_PER_BATCH = 1
    cfg.SOLVER.MAX_ITER = 4
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


#: KEY VALUE pairs of the small detector, for configs and for command lines.
SMALL_MODEL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.EFFICIENTNET.NAME", "efficientnet-b0",
    "MODEL.EFFICIENTNET.NORM", "BN",
    "MODEL.FPN.OUT_CHANNELS", "16",
    "MODEL.RETINANET.NUM_CONVS", "1",
    "MODEL.RETINANET.NUM_CLASSES", "2",
    "INPUT.AUGMENTATION.IMAGE_SIZE", "96",
    "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.BASE_LR", "0.01",
    "SOLVER.WARMUP_ITERS", "0",
    "SEED", "0",
]  # fmt: skip


def small_rcnn_config(architecture, **options):
    """An R-CNN (or its relative) of two classes on a small EfficientNet, on the CPU; ``MODEL__KEY=value``."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.NAME = "build_efficientnet_fpn_backbone"
    cfg.MODEL.EFFICIENTNET.NAME = "efficientnet-b0"
    cfg.MODEL.EFFICIENTNET.NORM = "FrozenBN"
    cfg.MODEL.EFFICIENTNET.DROP_CONNECT_RATE = 0.0
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemSegFPNHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 8
    cfg.MODEL.SEM_SEG_HEAD.NORM = ""
    # Every proposal and anchor counts: no random sampling, so that passes can be compared.
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 100000
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 100000
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    for key, value in options.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def small_pyramid_config(pyramid, bottom_up="build_efficientnet_backbone"):
    """A pyramid of two cells and 16 channels, MODEL.``pyramid``, on a small backbone, on the CPU."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = f"build_{pyramid.lower()}_backbone", 0
    cfg.MODEL[pyramid].BOTTOM_UP, cfg.MODEL[pyramid].REPEATS = bottom_up, 2
    cfg.MODEL.EFFICIENTNET.NAME, cfg.MODEL.EFFICIENTNET.DROP_CONNECT_RATE = "efficientnet-b0", 0.0
    cfg.MODEL.EFFICIENTNET.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES, cfg.MODEL.RESNETS.NORM = ["res3", "res4", "res5"], "BN"
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["res3", "res4", "res5"], 16
    cfg.MODEL.FPN.NORM = "BN"
    return cfg


def randomize_norms(model, spread=0.5):
    """The model with batch norms of random values: at identity they would hide a wrong place, eps or order."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 1 - spread, 1 + spread)
            torch.nn.init.normal_(module.bias, std=spread / 5)
            torch.nn.init.normal_(module.running_mean, std=spread / 5)
            torch.nn.init.uniform_(module.running_var, 1 - spread, 1 + spread)
    return model


@contextlib.contextmanager
def process_as_it_was():
    """Datasets, policies, loggers, threads, environment are after it as they were before; random states start anew.

    Commands take the log away from pytest's handlers (``propagate``), benchmarks keep to one thread, trainings seed,
    and detectron2 writes PYTHONHASHSEED when it seeds: no test after them is to notice. The root logger's handlers and
    PYTEST_CURRENT_TEST are pytest's own business.
    """
    datasets, policies = set(DatasetCatalog.list()), dict(AUGMENTATION_REGISTRY)
    loggers = {logger: (logger.propagate, logger.level, [*logger.handlers]) for logger in _loggers()}
    threads = torch.get_num_threads(), cv2.getNumThreads()
    folder, environment = os.getcwd(), dict(os.environ)
    _seed()
    try:
        yield
    finally:
        for name in set(DatasetCatalog.list()) - datasets:
            DatasetCatalog.remove(name)
            if name in MetadataCatalog:
                MetadataCatalog.remove(name)
        AUGMENTATION_REGISTRY._obj_map.clear()
        AUGMENTATION_REGISTRY._obj_map.update(policies)
        for logger in _loggers():
            logger.propagate, level, logger.handlers = loggers.get(logger, (True, logging.NOTSET, []))
            if logger.level != level:
                logger.setLevel(level)  # goes through all loggers
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
        os.chdir(folder)
        for name in {*os.environ, *environment} - {"PYTEST_CURRENT_TEST"}:
            if name not in environment:
                del os.environ[name]
            elif os.environ.get(name) != environment[name]:
                os.environ[name] = environment[name]
        _seed()


def _loggers():
    return [
        logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)
    ]


def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed spends milliseconds on GPUs that are not there


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was():
    """No test depends on those before it."""
    with process_as_it_was():
        yield


def assert_refused(command, capsys, *fragments, output=None):
    """A user's mistake: one sentence with these fragments, exit status 2, and no output."""
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    # Progress, and what torch 2.2 says when detectron2 lists the machine's compilers.
    other = ("pseudo labels:", "No CUDA runtime is found")
    error = [line for line in printed.splitlines() if line and not line.startswith(other)]
    assert len(error) == 1, error
    for fragment in fragments:
        assert fragment in error[0], error[0]
    if output is not None:
        assert not output.exists()
