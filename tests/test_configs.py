"""The shipped configs: each loads and builds, and has the paper's figures."""

import json
import re

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from selftrain_d2 import add_selftrain_config, build_augmentations
from selftrain_d2.cli.common import find_config, shipped_configs
from selftrain_d2.experiments import model_table

STARTING_POINTS = [name for name in shipped_configs() if name.startswith("starting_points/")]
COCO = [name for name in shipped_configs() if name.startswith("coco/") and "/Base-" not in name]
STUDENTS = [name for name in COCO if "_selftraining_" in name]
DOCS = find_config("Base-RetinaNet-EfficientNet-FPN.yaml").parents[1] / "docs" / "model_zoo.md"

B7, R50, R101 = "coco/efficientnet_b7/", "coco/resnet50/", "coco/resnet101/"
SPINE = "coco/spinenet/spinenet_"
# The paper's steps of each supervised model, and its steps and alpha of each student.
SUPERVISED = {
    B7 + "rand_S1": 45000, B7 + "rand_S2": 90000, B7 + "rand_S3": 90000, B7 + "rand_S4": 120000,
    B7 + "imagenet_S1": 22500, B7 + "imagenet_S2": 45000, B7 + "imagenet_S3": 90000, B7 + "imagenet_S4": 90000,
    B7 + "rand_S4_20percent": 45000, B7 + "rand_S4_50percent": 90000,
    B7 + "imagenet_S4_20percent": 5625, B7 + "imagenet_S4_50percent": 22500,
    B7 + "imagenet_plus_plus_S4_20percent": 5625, B7 + "imagenet_plus_plus_S4_50percent": 11250,
    B7 + "imagenet_plus_plus_S4": 45000,
    R50 + "rand_S4": 200000, R50 + "imagenet_S4": 160000, R50 + "simclr_S4": 160000,
    R101 + "rand_S1": 45000, R101 + "rand_S2": 90000, R101 + "rand_S3": 90000, R101 + "rand_S4": 180000,
    SPINE + "49s_S1": 231500, SPINE + "49_S1": 231500, SPINE + "96_S1": 231500,
    SPINE + "143_S3": 231500, SPINE + "190_S3": 185200,
}  # fmt: skip
SELF_TRAINED = {
    B7 + "rand_S1_selftraining_imagenet": (45000, 1.0), B7 + "rand_S2_selftraining_imagenet": (90000, 1.0),
    B7 + "rand_S3_selftraining_imagenet": (90000, 0.5), B7 + "rand_S4_selftraining_imagenet": (90000, 0.5),
    B7 + "rand_S1_selftraining_openimages": (90000, 3.0), B7 + "rand_S2_selftraining_openimages": (90000, 2.0),
    B7 + "rand_S3_selftraining_openimages": (90000, 0.5), B7 + "rand_S4_selftraining_openimages": (120000, 0.5),
    B7 + "rand_S4_20percent_selftraining_imagenet": (90000, 3.0),
    B7 + "rand_S4_50percent_selftraining_imagenet": (90000, 1.0),
    B7 + "imagenet_S4_20percent_selftraining_imagenet": (90000, 3.0),
    B7 + "imagenet_S4_50percent_selftraining_imagenet": (45000, 1.0),
    B7 + "imagenet_S4_selftraining_imagenet": (90000, 1.0),
    B7 + "imagenet_plus_plus_S4_20percent_selftraining_imagenet": (90000, 3.0),
    B7 + "imagenet_plus_plus_S4_50percent_selftraining_imagenet": (45000, 1.0),
    B7 + "imagenet_plus_plus_S4_selftraining_imagenet": (45000, 0.25),
    R50 + "rand_S4_selftraining_imagenet": (120000, 0.25),
    R101 + "rand_S1_selftraining_imagenet": (90000, 1.0), R101 + "rand_S2_selftraining_imagenet": (90000, 1.0),
    R101 + "rand_S3_selftraining_imagenet": (90000, 0.5), R101 + "rand_S4_selftraining_imagenet": (180000, 0.25),
    SPINE + "143_S3_selftraining_openimages": (472000, 0.25),
    SPINE + "190_S3_selftraining_openimages": (370000, 0.5),
}  # fmt: skip
# EfficientDet (google/automl, efficientdet): backbone, image size, pyramid's channels and cells, convolutions of the
# heads, anchor scale, levels, epochs.
EFFICIENTDET = {
    "d0": ("b0", 512, 64, 3, 3, 4, 5, 300), "d1": ("b1", 640, 88, 4, 3, 4, 5, 300),
    "d2": ("b2", 768, 112, 5, 3, 4, 5, 300), "d3": ("b3", 896, 160, 6, 4, 4, 5, 300),
    "d4": ("b4", 1024, 224, 7, 4, 4, 5, 300), "d5": ("b5", 1280, 288, 7, 4, 4, 5, 300),
    "d6": ("b6", 1280, 384, 8, 5, 4, 5, 300), "d7": ("b6", 1536, 384, 8, 5, 5, 5, 600),
    "d7x": ("b7", 1536, 384, 8, 5, 4, 6, 600),
}  # fmt: skip


def load(*names):
    """The config of these files, each merged over those before."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    for name in names:
        cfg.merge_from_file(str(find_config(name)), allow_unsafe=False)
    return cfg


def flat(cfg, prefix=""):
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changes(cfg, other):
    other = dict(flat(other))
    return {key for key, value in flat(cfg) if value != other[key]}


def test_every_config_builds():
    """On the meta device: shapes without memory. Configs that describe one model build it once."""
    built = {}
    for name in shipped_configs():
        cfg = load(name)
        build_augmentations(cfg, is_train=True)
        if name in STARTING_POINTS:
            continue
        cfg.MODEL.DEVICE = "meta"
        cfg.MODEL.WEIGHTS = ""
        key = json.dumps(cfg.MODEL)
        if key not in built:
            with torch.device("meta"):
                built[key] = build_model(cfg)
    # the demo's, B0-B3, B7, ResNet-50 with two kinds of input, ResNet-101, five SpineNets
    assert len(built) >= 14


def test_the_largest_backbone_builds():
    cfg = load("Base-RetinaNet-EfficientNet-FPN.yaml")
    cfg.MODEL.EFFICIENTNET.NAME = "efficientnet-l2"
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) > 470e6


def test_no_table_of_the_paper_is_left_out():
    ours = {name[: -len(".yaml")] for name in COCO if "one_gpu" not in name}
    assert ours == SUPERVISED.keys() | SELF_TRAINED.keys()


@pytest.mark.parametrize("name", COCO)
def test_schedule(name):
    stem = name[: -len(".yaml")]
    values = dict(flat(load(name)))
    spinenet = "spinenet" in name
    expected = {
        "SOLVER.MOMENTUM": 0.9,
        "SOLVER.WEIGHT_DECAY": 4e-5 if spinenet else 1e-4,
        "SOLVER.WARMUP_ITERS": 2000 if spinenet else 1000,
        "SOLVER.WARMUP_FACTOR": pytest.approx(0.0067 / 0.28, rel=1e-3) if spinenet else 0.01,
        "SOLVER.RESCALE_INTERVAL": values["SOLVER.LR_SCHEDULER_NAME"] == "WarmupCosineLR",
        "INPUT.AUGMENTATION.POLICY": re.search(r"_(S\d)", stem)[1],
        "OUTPUT_DIR": f"output/{stem}",
    }
    percent = re.search(r"_\d+percent", stem)
    expected["DATASETS.TRAIN"] = ("coco_2017_train" + (percent[0] if percent else ""),)
    learning_rate = 0.28 if spinenet else 0.32
    if "one_gpu" in name:
        assert values["SOLVER.BASE_LR"] == pytest.approx(learning_rate * values["SOLVER.IMS_PER_BATCH"] / 256)
    else:
        steps, alpha = SELF_TRAINED.get(stem) or (SUPERVISED[stem], 1.0)
        expected |= {"SOLVER.MAX_ITER": steps, "SELFTRAIN.ALPHA": alpha}
        expected |= {"SOLVER.IMS_PER_BATCH": 256, "SOLVER.BASE_LR": learning_rate}
    if spinenet and "_selftraining_openimages" in name:  # half the images, half of 0.28 or 0.3
        expected |= {"SOLVER.IMS_PER_BATCH": 128, "SOLVER.BASE_LR": 0.14 if "143" in name else 0.15}
    r101 = name.startswith(R101)
    expected |= {
        "INPUT.AUGMENTATION.RANDAUGMENT_MAGNITUDE": 15.0 if r101 else 10.0,
        "SOLVER.AMP.ENABLED": not r101,
        "SOLVER.WEIGHT_DECAY_NORM": 1e-4 if r101 else 0.0,
        "SOLVER.WEIGHT_DECAY_BIAS": None if r101 else 0.0,
    }
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("name", [name for name in COCO if name.startswith(SPINE)])
def test_spinenet_is_that_of_the_published_table(name):
    cfg = load(name)
    number = re.match(SPINE + r"(\d+s?)_", name)[1]
    assert f"spinenet-{number}" == cfg.MODEL.SPINENET.NAME
    size, anchor, convs, width = {
        "49s": (640, 3, 4, 128), "49": (640, 3, 4, 0), "96": (1024, 3, 4, 0),
        "143": (1280, 4, 4, 0), "190": (1280, 4, 7, 0),
    }[number]  # fmt: skip
    assert size == cfg.INPUT.AUGMENTATION.IMAGE_SIZE
    assert (convs, width) == (cfg.MODEL.RETINANET.NUM_CONVS, cfg.MODEL.RETINANET.CONV_DIM)
    for stride, sizes in zip((8, 16, 32, 64, 128), cfg.MODEL.ANCHOR_GENERATOR.SIZES):
        assert sizes == pytest.approx([anchor * stride * 2 ** (i / 3) for i in range(3)], rel=1e-4)
    assert (0.3 if "_S3" in name else 0.0) == cfg.MODEL.RETINANET.SOFT_NMS_SIGMA
    # A tenth of the learning rate for the last 30 epochs, a hundredth for the last 10; 463 steps of 256 images are one.
    epoch = 463 * 256 // cfg.SOLVER.IMS_PER_BATCH
    assert list(cfg.SOLVER.STEPS) == [cfg.SOLVER.MAX_ITER - 30 * epoch, cfg.SOLVER.MAX_ITER - 10 * epoch]


@pytest.mark.parametrize("name", COCO)
def test_arithmetic_in_the_comments(name):
    cfg = load(name)
    text = " ".join(find_config(name).read_text(encoding="utf-8").replace("#", " ").split())
    found = re.search(
        r"([\d,]+) steps of (?:\d+ = (\d+) human \+ )?(\d+) (?:pseudo )?images: ([\d.]+) epochs of ([\d,]+)",
        text,
    )
    if found is None:  # one_gpu: in its base
        assert "one_gpu" in name and name not in STUDENTS
        return
    steps, human, images, epochs, labeled = found.groups()
    assert int(steps.replace(",", "")) == cfg.SOLVER.MAX_ITER
    assert int(human or images) == cfg.SOLVER.IMS_PER_BATCH
    assert int(images) == (cfg.SOLVER.PSEUDO_IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH)
    exact = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / int(labeled.replace(",", ""))
    assert float(epochs) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("name", STUDENTS)
def test_students_follow_their_teacher(name):
    teacher = load(re.sub(r"_selftraining_\w+", "", name))
    student = load(name)
    values = dict(flat(student))
    assert values["MODEL.WEIGHTS"] == f"{teacher.OUTPUT_DIR}/model_final.pth"
    assert values["SOLVER.PSEUDO_IMS_PER_BATCH"] == values["SOLVER.IMS_PER_BATCH"]
    assert values["DATASETS.PSEUDO_TRAIN"] == (re.search(r"_selftraining_([a-z]+)", name)[1] + "_pseudo",)
    allowed = {
        "MODEL.WEIGHTS", "DATASETS.PSEUDO_TRAIN", "SOLVER.PSEUDO_IMS_PER_BATCH", "SOLVER.MAX_ITER",
        "SELFTRAIN.ALPHA", "SELFTRAIN.NORMALIZE_LOSS", "OUTPUT_DIR",
    }  # fmt: skip
    assert values["SELFTRAIN.NORMALIZE_LOSS"]  # the paper's loss, whatever the recipe for few labels has
    if name.startswith(SPINE):  # other configs than their teachers' were released
        allowed |= {
            "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.STEPS", "INPUT.AUGMENTATION.SCALE_RANGE",
            "MODEL.SPINENET.DROP_CONNECT_RATE",
        }  # fmt: skip
    assert changes(student, teacher) <= allowed


def test_the_recipe_for_few_labels_is_that_of_one_gpu_alone():
    recipe = "recipes/few_labels.yaml"
    settings = changes(load(recipe), load())
    assert settings == {
        "SELFTRAIN.NORMALIZE_LOSS",
        *(f"SELFTRAIN.TTA.{key}" for key in ("FLIP", "SCALES", "BOX_VOTING")),
    }
    for name in COCO:
        cfg, with_it = load(name), load(name, recipe)
        if "one_gpu" not in name:
            assert not {*settings} - changes(with_it, cfg)
        elif name in STUDENTS:  # of all of COCO's labels
            assert changes(with_it, cfg) == {"SELFTRAIN.ALPHA", "SELFTRAIN.NORMALIZE_LOSS"}
        else:
            assert not changes(with_it, cfg)


def test_starting_points_change_nothing_but_the_start():
    assert len(STARTING_POINTS) == 6
    plain = load(B7 + "rand_S1.yaml")
    for name in STARTING_POINTS:
        changed = changes(load(B7 + "rand_S1.yaml", name), plain)
        assert changed <= {"MODEL.WEIGHTS", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"}
        assert ("MODEL.WEIGHTS" in changed) == ("rand" not in name)


@pytest.mark.parametrize("name", [n for n in COCO if n not in STUDENTS and "one_gpu" not in n])
def test_models_start_where_their_name_says(name):
    start = re.match(r"(.*)_S\d", name.rsplit("/", 1)[1])[1]
    cfg = load(name)
    if start == "rand" or name.startswith(SPINE):
        assert cfg.MODEL.WEIGHTS == ""
    else:
        model = "resnet50" if name.startswith(R50) else "efficientnet_b7"
        assert not changes(load(name, f"starting_points/{model}_{start}.yaml"), cfg)


@pytest.mark.parametrize("name", EFFICIENTDET)
def test_efficientdet(name):
    backbone, size, channels, cells, convs, scale, levels, epochs = EFFICIENTDET[name]
    cfg = load(f"efficientdet/{name}.yaml")
    values = dict(flat(cfg))
    expected = {
        "MODEL.EFFICIENTNET.NAME": f"efficientnet-{backbone}",
        "INPUT.AUGMENTATION.IMAGE_SIZE": size,
        "INPUT.AUGMENTATION.SCALE_RANGE": (0.1, 2.0),
        "MODEL.FPN.OUT_CHANNELS": channels,
        "MODEL.BIFPN.REPEATS": cells,
        "MODEL.BIFPN.ATTENTION": "sum" if name in ("d6", "d7", "d7x") else "fast",
        "MODEL.RETINANET.NUM_CONVS": convs,
        "MODEL.RETINANET.IN_FEATURES": [f"p{level}" for level in range(3, 3 + levels)],
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA": 1.5,
        "MODEL.RETINANET.LOSS_NORMALIZER": "batch",
        "MODEL.RETINANET.FORCE_BEST_ANCHOR": True,
        "SOLVER.WEIGHT_DECAY": 4e-5,
        "SOLVER.BASE_LR": 0.08 * cfg.SOLVER.IMS_PER_BATCH / 64,
        "SELFTRAIN.WEIGHT_EMA_DECAY": 0.9998,
        "OUTPUT_DIR": f"output/efficientdet/{name}",
    }
    assert {key: values[key] for key in expected} == expected
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == levels
    for level, sizes in enumerate(cfg.MODEL.ANCHOR_GENERATOR.SIZES, 3):
        assert sizes == pytest.approx([scale * 2 ** (level + octave / 3) for octave in range(3)])
    images = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
    assert images / 118287 == pytest.approx(epochs, rel=1e-4)


def test_efficientdet_student():
    teacher, student = load("efficientdet/d0.yaml"), load("efficientdet/d0_selftraining_imagenet.yaml")
    assert f"{teacher.OUTPUT_DIR}/model_final.pth" == student.MODEL.WEIGHTS
    assert student.SOLVER.PSEUDO_IMS_PER_BATCH == student.SOLVER.IMS_PER_BATCH
    assert changes(student, teacher) == {
        "MODEL.WEIGHTS", "DATASETS.PSEUDO_TRAIN", "SOLVER.PSEUDO_IMS_PER_BATCH", "OUTPUT_DIR",
    }  # fmt: skip


def test_the_demo_has_detectron2s_losses_and_heads():
    """The paper's batch norm and normalizer are for large batches; the demo's has four images."""
    cfg, default = load("neon_trees/lite0_256.yaml"), load()
    for key in (
        "MODEL.FPN.OUTPUT_NORM", "MODEL.FPN.NORM", "MODEL.FPN.NORM_EPS", "MODEL.FPN.NORM_MOMENTUM",
        "MODEL.RETINANET.NORM", "MODEL.RETINANET.NORM_AFFINE_PER_LEVEL", "MODEL.RETINANET.NORM_EPS",
        "MODEL.RETINANET.NORM_MOMENTUM", "MODEL.RETINANET.FORCE_BEST_ANCHOR", "MODEL.RETINANET.LOSS_NORMALIZER",
        "MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT", "MODEL.RETINANET.SOFT_NMS_SIGMA",
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "MODEL.ANCHOR_GENERATOR.OFFSET", "SOLVER.RESCALE_INTERVAL",
        "SOLVER.AMP.ENABLED",
    ):  # fmt: skip
        assert dict(flat(cfg))[key] == dict(flat(default))[key], key


def test_the_small_detector_has_the_recipe_for_few_labels():
    detector = "neon_trees/lite0_256.yaml"
    assert not changes(load(detector, "recipes/few_labels.yaml"), load(detector))
    assert changes(load("neon_trees/demo.yaml"), load(detector)) == {"SOLVER.MAX_ITER", "SELFTRAIN.STUDENT"}


def test_the_model_zoo_page_is_up_to_date():
    page = DOCS.read_text(encoding="utf-8")
    rows = {line.replace(" ", "") for line in page.splitlines()}
    for family in model_table.FAMILIES:
        for line in model_table.results_table(family).splitlines():
            # our AP, when there is one, stands in the last column
            assert any(row.startswith(line.replace(" ", "").removesuffix("|")) for row in rows), line
    with torch.device("meta"):
        models = {name: model_table.build_efficientnet(name) for name in model_table.BACKBONES}
        spinenets = {name: config for name, (config, *_) in model_table.SPINENETS.items()}
        efficientdets = {name: config for name, (config, *_) in model_table.EFFICIENTDETS.items()}
        for name, config in {**model_table.DETECTORS, **spinenets, **efficientdets}.items():
            cfg = load(config)
            cfg.MODEL.DEVICE = "meta"
            models[name] = build_model(cfg)
    for name, model in models.items():
        parameters = model_table.millions_of_parameters(model)
        assert any(row.startswith(f"|{name}|{parameters}|") for row in rows), (name, parameters)
    for link in re.findall(r"\]\((\.\./configs/[^)]+)\)", page):
        assert (DOCS.parent / link).exists(), link


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith(("aerial", "neon"))])
def test_every_parameter_of_a_small_config_gets_a_gradient(name):
    """Training in several processes needs that."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.merge_from_file(str(find_config(name)), allow_unsafe=False)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    instances = Instances((64, 64))
    instances.gt_boxes, instances.gt_classes = (
        Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0]])),
        torch.tensor([0]),
    )
    sample = {
        "image": torch.zeros(3, 64, 64, dtype=torch.uint8),
        "instances": instances,
        "sem_seg": torch.zeros(64, 64, dtype=torch.int64),
    }
    with EventStorage():
        sum(model([sample, sample]).values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
