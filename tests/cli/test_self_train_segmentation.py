"""The loop on masks end to end, through the public command, and a user's mistakes with masks."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, assert_refused, make_coco_set
from PIL import Image

from selftrain_d2 import load_pseudo_labels
from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels.masks import read_mask

CLASSES = ["background", "red", "green"]
COLOURS = np.array([[110, 110, 110], [220, 40, 40], [40, 220, 40]], np.uint8)
MODEL = [
    *SMALL_MODEL,
    "MODEL.NAS_FPN.REPEATS", "1",
    "MODEL.FPN.NORM", "BN",
    "MODEL.FPN.NORM_MOMENTUM", "0.1",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16",
    "MODEL.SEM_SEG_HEAD.NUM_CONVS", "1",
    "MODEL.SEM_SEG_HEAD.NORM", "BN",
    "MODEL.SEM_SEG_HEAD.NORM_MOMENTUM", "0.1",
    "SELFTRAIN.TTA.SCALES", "(0.5, 1.0)",
    "INPUT.AUGMENTATION.IMAGE_SIZE", "64",
]  # fmt: skip
STEPS = ["SOLVER.MAX_ITER", "3", "SELFTRAIN.SCORE_THRESH", "0.34"]
CONFIG = "Base-Segmentor-EfficientNet-NASFPN.yaml"


def make_mask_set(folder, number, seed, size=(48, 64)):
    """Rectangles of two classes on grey; a stripe of each mask is void. ``images/*.png``, ``masks/*.png``."""
    rng = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part / "deep").mkdir(parents=True)
    for i in range(number):
        labels = np.zeros(size, np.uint8)
        for label in (1, 2):
            y, x = rng.integers(0, 24, 2)
            labels[y : y + 20, x + 10 : x + 30] = label
        pixels = COLOURS[labels]
        labels[:, :2] = 255
        name = f"{'deep/' if i % 2 else ''}{i}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        Image.fromarray(labels).save(folder / "masks" / name)
    return folder


@pytest.fixture
def data(tmp_path):
    return {
        "labeled": make_mask_set(tmp_path / "labeled", 5, 1),
        "unlabeled": make_mask_set(tmp_path / "unlabeled", 4, 2),
        "validation": make_mask_set(tmp_path / "validation", 3, 3),
    }


def _command(data, tmp_path, *options, **changes):
    arguments = {
        "--task": "segmentation",
        "--config-file": CONFIG,
        "--labeled-images": data["labeled"] / "images",
        "--labeled-masks": data["labeled"] / "masks",
        "--unlabeled-images": data["unlabeled"] / "images",
        "--unlabeled-truth-masks": data["unlabeled"] / "masks",
        "--val-images": data["validation"] / "images",
        "--val-masks": data["validation"] / "masks",
        "--output": tmp_path / "output",
    }
    arguments.update({f"--{key.replace('_', '-')}": value for key, value in changes.items()})
    words = [str(word) for pair in arguments.items() if pair[1] is not None for word in pair]
    return ["self-train", "--classes", *CLASSES, *words, *options, *MODEL, *STEPS]


def test_the_loop(data, tmp_path, capsys):
    (data["unlabeled"] / "images" / "broken.png").write_bytes(b"not an image")
    command = _command(data, tmp_path, "--control", "--oracle")
    assert main(command) == 0
    output = tmp_path / "output"
    summary = json.loads((output / "summary.json").read_text())
    stages = summary["stages"]
    assert list(stages) == ["teacher", "pseudo_labels", "student", "control", "oracle"]
    for name, pseudo_images in (("teacher", 0), ("student", 2), ("control", 0), ("oracle", 2)):
        metrics = stages[name]["metrics"]["sem_seg"]
        assert set(metrics) >= {"mIoU", "pACC", *(f"IoU-{c}" for c in CLASSES)}
        assert stages[name]["pseudo_images_per_step"] == pseudo_images
    labels = stages["pseudo_labels"]
    assert labels["images"] == 5 and labels["skipped"] == 1 and labels["images_with_pixels"] > 0
    assert sum(labels["share_by_class"].values()) == pytest.approx(1 - labels["ignored_share"])

    # The figures of the pseudo masks, computed once more in the plain way.
    row = next(row for row in summary["pseudo_mask_quality"] if row["threshold"] == 0.34)
    true, found = [], []
    for d in load_pseudo_labels(output / "pseudo_labels", 0.34):
        true.append(
            cv2.imread(str(data["unlabeled"] / "masks" / d["image_id"]), cv2.IMREAD_UNCHANGED).ravel()
        )
        masks = read_mask(d["sem_seg_file_name"], d["sem_seg_sha256"])
        found.append(np.where(masks.percents >= 34, masks.classes, 255).ravel())
    true, found = np.concatenate(true), np.concatenate(found)
    true, found = true[true != 255], found[true != 255]
    assert row["pixels"] == len(true) and row["ignored"] == pytest.approx((found == 255).mean())
    assert row["pixel_accuracy"] == pytest.approx((found == true)[found != 255].mean())

    page = (output / "summary.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert "| stage | mIoU |" in page and "| class | teacher | student | control | oracle |" in page
    assert (output / "contact_sheet.png").stat().st_size > 5000
    logged = (output / "student" / "metrics.json").read_text()
    assert "human_loss_average" in logged and "loss_sem_seg_pseudo" in logged

    # Called again, nothing is redone.
    def times():
        files = (p for p in output.rglob("*") if p.suffix in (".pth", ".parquet") or p.parent.name == "masks")
        return {p: p.stat().st_mtime_ns for p in files}

    before = times()
    assert main(command) == 0 and times() == before
    # How to label is what this call says, though the teacher was trained by another: its labels would be others.
    assert main([*command, "SELFTRAIN.TTA.FLIP", "True"]) == 2
    assert "pseudo_labels was begun with another teacher_config_sha256" in capsys.readouterr().err
    # Other masks are other work.
    mask = data["labeled"] / "masks" / "0.png"
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(mask)
    assert main(command) == 2
    assert "teacher was begun with another labeled_masks_sha256" in capsys.readouterr().err


def test_label_and_train_as_commands_of_their_own(data, tmp_path, capsys):
    command = _command(data, tmp_path)
    assert main(command) == 0
    weights = ["MODEL.WEIGHTS", str(tmp_path / "output" / "teacher" / "model_final.pth")]
    images = ["--images", str(data["unlabeled"] / "images"), "--output", str(tmp_path / "labels")]
    assert (
        main(
            [
                "label",
                "--config-file",
                CONFIG,
                *images,
                *MODEL,
                "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
                "3",
                *weights,
            ]
        )
        == 0
    )
    ours, loops = (
        load_pseudo_labels(f, 0.34) for f in (tmp_path / "labels", tmp_path / "output" / "pseudo_labels")
    )
    assert len(ours) == 4
    for a, b in zip(ours, loops):
        np.testing.assert_array_equal(read_mask(a["sem_seg_file_name"]), read_mask(b["sem_seg_file_name"]))
    # Training without the loop, on masks of people and of the teacher.
    folders = [str(data["labeled"] / part) for part in ("images", "masks")]
    train = [
        "train", "--config-file", CONFIG, "--human-masks", "streets", *folders, "--classes", *CLASSES,
        "--pseudo-labels", "pseudo", str(tmp_path / "labels"), *MODEL, *STEPS, *weights,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "DATASETS.TRAIN", "('streets',)", "DATASETS.TEST", "('streets',)",
        "DATASETS.PSEUDO_TRAIN", "('pseudo',)", "SOLVER.PSEUDO_IMS_PER_BATCH", "2",
        "OUTPUT_DIR", str(tmp_path / "student"),
    ]  # fmt: skip
    assert main(train) == 0
    results = json.loads((tmp_path / "student" / "results.json").read_text())
    assert {f"IoU-{name}" for name in CLASSES} <= results["sem_seg"].keys()
    # Seeds, data and weights are those of the loop: so is the student.
    ours, loops = (
        torch.load(folder / "student" / "model_final.pth", weights_only=True)["model"]
        for folder in (tmp_path, tmp_path / "output")
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in loops.items())
    capsys.readouterr()
    assert main(["export", str(tmp_path / "labels"), str(tmp_path / "out.json")]) == 2
    assert "are masks of pixels" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "labels"), "--truth", str(data["unlabeled"] / "masks")]) == 0
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    found = json.loads((tmp_path / "labels_report" / "report.json").read_text())
    known = {row["threshold"]: row for row in found["quality"]}
    assert all(
        known[row["threshold"]] == row for row in summary["pseudo_mask_quality"] if row["threshold"] != 0.34
    )
    assert main(["inspect", str(tmp_path / "labels"), "--human-labels", "labels.json"]) == 2
    assert "--human-labels compares boxes" in capsys.readouterr().err


def _spoil_size(data):
    Image.fromarray(np.zeros((10, 64), np.uint8)).save(data["labeled"] / "masks" / "0.png")


def _spoil_class(data):
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(data["validation"] / "masks" / "0.png")


def _lose_a_mask(data):
    (data["labeled"] / "masks" / "deep" / "1.png").unlink()


def _lose_a_true_mask(data):
    (data["unlabeled"] / "masks" / "deep" / "1.png").unlink()


def _lose_all_masks(data):
    shutil.rmtree(data["labeled"] / "masks")


def _ignore_everything(data):
    for file in (data["labeled"] / "masks").rglob("*.png"):
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(file)


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (_spoil_size, ["0.png is 64 x 10 pixels, but its image", "64 x 48"]),
        (_spoil_class, ["validation", "class id 7, but only 3 classes"]),
        (_lose_a_mask, ["has no mask", "deep/1.png does not exist"]),
        (_lose_a_true_mask, ["unlabeled", "has no mask"]),
        (_lose_all_masks, ["Mask folder", "does not exist"]),
        (_ignore_everything, ["ignore every pixel (255)"]),
    ],
)
def test_faulty_masks(data, tmp_path, capsys, spoil, fragments):
    spoil(data)
    assert_refused(_command(data, tmp_path), capsys, *fragments, output=tmp_path / "output")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"labeled_masks": None}, ["--task segmentation needs --labeled-masks"]),
        ({"labeled_json": "x.json"}, ["--labeled-json goes with --task detection, not with segmentation"]),
        ({"val_masks": None}, ["--val-masks and --val-images belong together"]),
        ({"task": "detection", "labeled_json": "x.json"}, ["--labeled-masks goes with --task segmentation"]),
        ({"config_file": "Base-RetinaNet-EfficientNet-FPN.yaml"}, ["is no segmentor"]),
    ],
)
def test_arguments_that_do_not_fit(data, tmp_path, capsys, changes, fragments):
    command = _command(data, tmp_path, **changes)
    if "config_file" in changes:  # without the segmentor's keys
        command = command[: command.index("MODEL.NAS_FPN.REPEATS")]
    assert_refused(command, capsys, *fragments, output=tmp_path / "output")


def test_classes(data, tmp_path, capsys):
    command, classes = _command(data, tmp_path), ["--classes", *CLASSES]
    assert command[1:5] == classes
    assert_refused(["self-train", *command[5:]], capsys, "--task segmentation needs --classes")
    assert_refused(
        ["self-train", "--classes", "a", "b", "a", *command[5:]], capsys, "The class 'a' is named twice"
    )
    assert_refused(
        ["self-train", "--classes", "a", "b", *command[5:]], capsys, "class id 2, but only 2 classes"
    )
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("--human-masks a IMAGES MASKS", ["--human-masks and --classes belong together"]),
        ("--classes a b --resume", ["--human-masks and --classes belong together"]),
        ("--classes a b a --human-masks a IMAGES MASKS", ["'a' is named twice"]),
        ("--classes a b --human-masks a IMAGES MASKS", ["class id 2, but only 2 classes"]),
        ("--classes a b c --human-masks a IMAGES none", ["Mask folder", "none does not exist"]),
        ("--classes a b c d --human-masks a IMAGES MASKS", ["NUM_CLASSES is 3", "has 4 classes"]),
        # The names go on into the keys.
        ("--human-masks a IMAGES MASKS --classes a b c", ["--classes took the config key MODEL.DEVICE"]),
    ],
)
def test_train_on_faulty_masks(data, tmp_path, capsys, words, fragments):
    folders = {"IMAGES": str(data["labeled"] / "images"), "MASKS": str(data["labeled"] / "masks")}
    command = ["train", "--config-file", CONFIG, *(folders.get(word, word) for word in words.split())]
    keys = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "()"]
    assert_refused([*command, *MODEL, *keys, "OUTPUT_DIR", str(tmp_path / "output")], capsys, *fragments)
    assert not list(tmp_path.glob("output/*.pth"))


def test_masks_for_a_detector_and_boxes_for_a_segmentor(data, tmp_path, capsys):
    masks = ["--human-masks", "a", *(str(data["labeled"] / part) for part in ("images", "masks"))]
    keys = ["DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / "output")]
    detector = "Base-RetinaNet-EfficientNet-FPN.yaml"
    assert_refused(
        ["train", "--classes", *CLASSES, "--config-file", detector, *masks, *SMALL_MODEL, *keys],
        capsys,
        "SelfTrainingRetinaNet learns boxes, but 'a' has masks of pixels",
    )
    coco = make_coco_set(tmp_path / "coco", 2, 0)
    boxes = ["--human-labels", "a", coco.json_file, coco.images]
    assert_refused(
        ["train", "--config-file", CONFIG, *boxes, *MODEL, *keys],
        capsys,
        "SelfTrainingSegmentor learns masks of pixels, but 'a' has boxes",
    )


def test_a_segmentor_for_boxes(tmp_path, capsys):
    coco = make_coco_set(tmp_path / "coco", 2, 0)
    command = [
        "self-train", "--config-file", CONFIG, "--labeled-json", coco.json_file, "--labeled-images", coco.images,
        "--unlabeled-images", coco.images, "--output", str(tmp_path / "output"), *MODEL,
    ]  # fmt: skip
    assert_refused(command, capsys, "makes no boxes", "--task segmentation", output=tmp_path / "output")
    assert_refused(
        [w for w in command if w not in ("--labeled-json", coco.json_file)], capsys, "needs --labeled-json"
    )


def test_no_pixel_over_the_threshold(data, tmp_path, capsys):
    command = _command(data, tmp_path)
    command[command.index("0.34")] = "1.0"
    assert_refused(command, capsys, "No pseudo label", "lower SELFTRAIN.SCORE_THRESH")
    command[command.index("1.0")] = "0.34"
    assert main([*command, "SELFTRAIN.TOP_K", "5"]) == 2
    assert "SELFTRAIN.TOP_K" in capsys.readouterr().err
    assert main(command) == 0  # the teacher is not trained again, nor refused


@pytest.mark.slow
def test_two_processes_label_as_one(data, tmp_path):
    """Each process writes the masks and rows of its own shards."""
    for i in range(4, 300):  # two shards
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data["unlabeled"] / "images" / f"{i}.png")
    command = _command(data, tmp_path, unlabeled_truth_masks=None)
    command[command.index("64")] = "32"
    assert main(command) == 0
    weights = ["MODEL.WEIGHTS", str(tmp_path / "output" / "teacher" / "model_final.pth")]
    keys = [*MODEL, "INPUT.AUGMENTATION.IMAGE_SIZE", "32", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", *weights]
    images = ["--images", str(data["unlabeled"] / "images"), "--output", str(tmp_path / "labels")]
    assert main(["label", "--config-file", CONFIG, "--num-gpus", "2", *images, *keys]) == 0
    one, two = (
        load_pseudo_labels(f, 0.34) for f in (tmp_path / "output" / "pseudo_labels", tmp_path / "labels")
    )
    assert len(one) == len(two) == 300
    for a, b in zip(one, two):
        assert a["sem_seg_sha256"] == b["sem_seg_sha256"]
