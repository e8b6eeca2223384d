"""The configs of configs/pascal_voc: the paper's figures, and the sizes that docs/model_zoo.md explains."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from test_configs import DOCS, changes, load

from selftrain_d2.cli.common import find_config, shipped_configs
from selftrain_d2.experiments import model_table

PASCAL = [name for name in shipped_configs() if name.startswith("pascal_voc/") and "/Base-" not in name]
STUDENTS = [name for name in PASCAL if "_selftraining_" in name]
B7, L2, ONE_GPU = (f"pascal_voc/{folder}/" for folder in ("efficientnet_b7", "efficientnet_l2", "one_gpu"))

# mIOU of Tables 6, 8, 11 and 14.
PAPER = {
    B7 + "rand_S1": 28.4, B7 + "rand_S4": 41.5, B7 + "imagenet_S1": 80.2, B7 + "imagenet_S4": 81.4,
    B7 + "imagenet_plus_plus_S1": 83.9, B7 + "imagenet_plus_plus_S4": 85.2,
    B7 + "imagenet_plus_plus_S1_trainaug": 84.7, B7 + "imagenet_plus_plus_S4_trainaug": 84.8,
    B7 + "imagenet_plus_plus_S1_selftraining_imagenet": 85.0, B7 + "imagenet_plus_plus_S4_selftraining_imagenet": 86.0,
    B7 + "imagenet_plus_plus_S1_selftraining_coco": 85.3, B7 + "imagenet_plus_plus_S4_selftraining_coco": 86.6,
    B7 + "imagenet_plus_plus_S1_selftraining_pascal_aug": 85.6,
    B7 + "imagenet_plus_plus_S4_selftraining_pascal_aug": 86.7,
    L2 + "imagenet_plus_plus_S4": 88.7, L2 + "imagenet_plus_plus_S4_selftraining_pascal_aug": 90.0,
}  # fmt: skip


def test_no_table_of_the_paper_is_left_out():
    found = {}
    for name in PASCAL:
        if not name.startswith(ONE_GPU):
            text = find_config(name).read_text(encoding="utf-8")
            found[name.removesuffix(".yaml")] = float(re.search(r"([\d.]+) mIOU in the paper", text)[1])
    assert found == PAPER


@pytest.mark.parametrize("name", PASCAL)
def test_figures(name):
    cfg = load(name)
    images = cfg.SOLVER.IMS_PER_BATCH + cfg.SOLVER.PSEUDO_IMS_PER_BATCH
    rate, size, steps, batch = (
        (0.2, 640, 20000, (256, 256)) if name.startswith(L2) else (0.08, 512, 40000, (256, 512))
    )
    if name.startswith(ONE_GPU):
        rate, batch = 0.08 * 16 / 256, (16, 32)
    assert pytest.approx(rate) == cfg.SOLVER.BASE_LR
    assert size == cfg.INPUT.AUGMENTATION.IMAGE_SIZE and steps == cfg.SOLVER.MAX_ITER
    assert images == batch[name in STUDENTS]
    assert (
        pytest.approx(0.0005 if name.startswith(ONE_GPU) else 0.001)
        == cfg.SOLVER.BASE_LR * cfg.SOLVER.WARMUP_FACTOR
    )
    assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.LR_SCHEDULER_NAME) == (1e-5, "WarmupCosineLR")
    assert re.search(r"_(S\d)", name)[1] == cfg.INPUT.AUGMENTATION.POLICY
    head = cfg.MODEL.SEM_SEG_HEAD
    assert (head.NUM_CLASSES, head.IGNORE_VALUE, head.COMMON_STRIDE, head.NUM_CONVS) == (21, 255, 4, 3)
    assert {head.NORM, cfg.MODEL.FPN.NORM, cfg.MODEL.EFFICIENTNET.NORM} == {"SyncBN"}
    assert (cfg.MODEL.NAS_FPN.REPEATS, cfg.MODEL.NAS_FPN.SEPARABLE, cfg.MODEL.FPN.OUT_CHANNELS) == (
        7,
        True,
        256,
    )
    assert name.startswith(L2) == cfg.MODEL.EFFICIENTNET.CHECKPOINT_ACTIVATIONS
    assert f"output/{name.removesuffix('.yaml')}" == cfg.OUTPUT_DIR
    split = "trainaug" if name.endswith("_trainaug.yaml") else "train"
    assert (f"voc_2012_sem_seg_{split}",) == cfg.DATASETS.TRAIN and cfg.DATASETS.TEST == (
        "voc_2012_sem_seg_val",
    )


@pytest.mark.parametrize("name", STUDENTS)
def test_students_follow_their_teacher(name):
    teacher, student = load(re.sub(r"_selftraining_\w+", "", name)), load(name)
    assert f"{teacher.OUTPUT_DIR}/model_final.pth" == student.MODEL.WEIGHTS
    assert (re.search(r"_selftraining_(\w+)\.", name)[1] + "_pseudo",) == student.DATASETS.PSEUDO_TRAIN
    assert student.SOLVER.IMS_PER_BATCH == student.SOLVER.PSEUDO_IMS_PER_BATCH
    assert changes(student, teacher) <= {
        "MODEL.WEIGHTS", "DATASETS.PSEUDO_TRAIN", "SOLVER.IMS_PER_BATCH", "SOLVER.PSEUDO_IMS_PER_BATCH", "OUTPUT_DIR",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith("pascal_voc/")])
def test_arithmetic_in_the_comments(name):
    text = " ".join(find_config(name).read_text(encoding="utf-8").replace("#", " ").split())
    images = r"(?:\d+ = )?(\d+)(?: human \+ \d+ pseudo)? images"
    found = re.search(rf"([\d,]+) steps of {images}: ([\d,.]+) epochs of ([\d,]+)", text)
    if found is None:  # in its base
        assert "/Base-" not in name and name not in STUDENTS
        return
    steps, images, epochs, labeled = (float(number.replace(",", "")) for number in found.groups())
    cfg = load(name)
    assert (steps, images) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH)
    assert epochs == pytest.approx(steps * images / labeled, rel=0.01)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "c3_to_c5", "total", "paper"),
    [
        ("EfficientNet-B7", (80, 224, 640), 67_512_293, 71),
        ("EfficientNet-L2", (176, 480, 1376), 472_867_177, 485),
    ],
)
def test_the_models_have_the_paper_s_size_but_for_the_classifier(name, c3_to_c5, total, paper):
    config, in_table, _ = model_table.SEGMENTORS[name]
    cfg = load(config)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    neck = sum(c * 256 + 512 for c in c3_to_c5) + 7 * 7 * (256 * 9 + 256 * 256 + 512)
    head = 3 * (256 * 256 * 9 + 512) + 256 * 21 + 21
    assert parameters(model.backbone) - parameters(model.backbone.bottom_up) == neck
    assert parameters(model.sem_seg_head) == head
    assert parameters(model) == total
    classifier = model_table.classifier_size(cfg.MODEL.EFFICIENTNET.NAME, 512)[0]
    assert int(total / 1e6 + classifier) == paper == int(in_table)
    assert f"{total:,}" in DOCS.read_text(encoding="utf-8")
