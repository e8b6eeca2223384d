"""A tiny COCO set of coloured rectangles, and a detector small enough to train in seconds."""

import json
import os
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

from selftrain_d2 import add_selftrain_config
from selftrain_d2.cli.common import find_config

torch.set_num_threads(2)
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


@pytest.fixture(autouse=True)
def leave_catalogs_as_they_were():
    """Datasets that a test registers are gone after it."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        if name in MetadataCatalog:
            MetadataCatalog.remove(name)
