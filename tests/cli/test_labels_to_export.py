"""From labels of each format to an exported student, with the commands of docs/your_data.md alone.

What the exported file finds is compared with what evaluation and ``predict`` wrote of the same student.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from conftest import SMALL_MODEL, assert_refused, make_coco_set
from deployment.test_export import varied
from docs.test_your_data import commands, forms
from PIL import Image

from selftrain_d2.cli import main

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "run_onnx.py"
DATA = Path(os.environ.get("SELFTRAIN_D2_DATA", "no such folder"))
#: A detector that has hardly learned finds something all the same.
FINDS = ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.005", "SELFTRAIN.SCORE_THRESH", "0.005"]
_CLASSES = SMALL_MODEL.index("MODEL.RETINANET.NUM_CLASSES")
ANY_CLASSES = SMALL_MODEL[:_CLASSES] + SMALL_MODEL[_CLASSES + 2 :]


@pytest.fixture
def start(small_config, tmp_path):
    """``start(number)``: keys to start from a detector of so many classes whose scores differ.

    Those of a new one are equal but for rounding, which then decides what suppression keeps.
    """

    def keys(number=2):
        small_config.MODEL.RETINANET.NUM_CLASSES = number
        torch.save({"model": varied(small_config).state_dict()}, tmp_path / "start.pth")
        return ["MODEL.WEIGHTS", str(tmp_path / "start.pth"), "SOLVER.BASE_LR", "0.0001"]

    return keys


def converted(coco, folder, to, images):
    """Labels written by the command; the images are copies, so that others can lie among them."""
    words = ["labels", "convert", str(coco), str(folder), "--to", to, "--images", str(images)]
    assert main([*words, "--copy-images"]) == 0


def write_lists(voc, validation):
    """The lists of a VOC folder: which of its images are for training, which to measure on.

    Args:
        validation: stems of the latter.
    """
    stems = {xml.stem for xml in (voc / "Annotations").glob("*.xml")}
    (voc / "ImageSets/Main").mkdir(parents=True)
    for name, of_list in (("train", stems - validation), ("val", stems & validation)):
        (voc / f"ImageSets/Main/{name}.txt").write_text("".join(f"{stem}\n" for stem in sorted(of_list)))


def yolo_set():
    return ["--labels", "my_data/data.yaml", "--val-labels", "my_val/data.yaml"], "my_val/images"


def yolo_folder():
    """Texts and images alone."""
    for name in ("my_data", "my_val"):
        Path(name, "data.yaml").unlink()
    return ["--labels", "my_data", "--classes", "red", "green", "--val-labels", "my_val"], "my_val/images"


def voc_folder():
    """Images of validation lie in the same folder."""
    shutil.rmtree("my_data")
    labeled = make_coco_set(Path("voc"), 7, seed=1)
    converted(labeled.json_file, "my_data", "voc", labeled.images)
    write_lists(Path("my_data"), {"005", "006", "007"})
    return [
        "--labels",
        "my_data",
        "--val-labels",
        "my_data/ImageSets/Main/val.txt",
    ], "my_data/JPEGImages"


def make_yolo_sets(tmp_path):
    """``my_data`` of four labeled images, ``my_val`` of three, and a folder of three without labels."""
    for name, number, seed in (("my_data", 4, 1), ("my_val", 3, 2)):
        made = make_coco_set(tmp_path / f"coco_{seed}", number, seed)
        converted(made.json_file, tmp_path / name, "yolo", made.images)
    return make_coco_set(tmp_path / "unlabeled", 3, seed=3).images


@pytest.mark.parametrize("form", [yolo_set, yolo_folder, voc_folder])
def test_a_small_set(form, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unlabeled = make_yolo_sets(tmp_path)
    words, val_images = form()
    photos = Path("my_data/JPEGImages" if form is voc_folder else "my_data/images")
    for image in Path(unlabeled).iterdir():
        shutil.copy(image, photos / f"more_{image.name}")
    words = ["self-train", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml", *words, "--control"]
    words += ["--unlabeled-images", str(photos), "--score-floor", "0.001", "--output", "output"]
    assert main([*words, *SMALL_MODEL, "SOLVER.MAX_ITER", "2", *FINDS, *start()]) == 0
    summary = json.loads(Path("output/summary.json").read_text())
    assert list(summary["stages"]) == ["teacher", "pseudo_labels", "student", "control"]
    assert summary["stages"]["pseudo_labels"]["images"] == 3
    left_out = {"labeled": 4, "of validation": 3} if form is voc_folder else {"labeled": 4}
    assert summary["stages"]["pseudo_labels"]["left_out"] == left_out
    assert main(["export-model", "output/student", "--format", "onnx", "--output", "student.onnx"]) == 0
    classes = ["green", "red"] if form is voc_folder else ["red", "green"]
    assert_finds_the_same(val_images, classes)


def assert_finds_the_same(val_images, class_names):
    """student.onnx finds in the images of validation what output/student's evaluation and ``predict`` found."""
    validation = json.loads(Path("output/labels/val.json").read_text())
    evaluated = json.loads(Path("output/student/inference/coco_instances_results.json").read_text())
    words = ["predict", "output/student", "--images", "output/labels/val.json", "--image-root", val_images]
    assert main([*words, "--no-pictures", "--output", "predictions"]) == 0
    predicted = json.loads(Path("predictions/predictions.json").read_text())
    names = {category["id"]: category["name"] for category in validation["categories"]}
    assert list(names.values()) == class_names

    spec = importlib.util.spec_from_file_location("run_onnx", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    session = onnxruntime.InferenceSession("student.onnx", providers=["CPUExecutionProvider"])
    number = 0
    for image in validation["images"]:
        with Image.open(Path(val_images, image["file_name"])) as photo:
            boxes, scores, found, _ = example.detect(session, photo)
        number += len(boxes)
        for entries in (evaluated, predicted):
            entries = [entry for entry in entries if entry["image_id"] == image["id"]]
            expected = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
            expected[:, 2:] += expected[:, :2]
            expected_scores = np.array([entry["score"] for entry in entries])
            expected_names = [names[entry["category_id"]] for entry in entries]
            assert_same_boxes(boxes, scores, found, expected, expected_scores, expected_names)
    assert number > 20


def assert_same_boxes(boxes, scores, names, others, other_scores, other_names):
    """Boxes (N, 4), XYXY in pixels, in whatever order: each has a counterpart of its class and score.

    One in a hundred may have none: which of two boxes stays is a matter of rounding where their scores, or overlaps and
    the threshold, are equal.
    """
    same = np.abs(boxes[:, None] - others[None]).max(axis=2) < 0.05
    same &= np.abs(scores[:, None] - other_scores[None]) < 1e-4
    same &= np.array(names, str)[:, None] == np.array(other_names, str)[None]
    allowed = max(len(boxes), len(others)) // 100
    assert (~same.any(axis=1)).sum() <= allowed and (~same.any(axis=0)).sum() <= allowed


def test_names_of_validation_are_its_own(tmp_path, monkeypatch, capsys):
    """Another order there is no order to read its ids by."""
    monkeypatch.chdir(tmp_path)
    unlabeled = make_yolo_sets(tmp_path)
    words = [
        "self-train",
        "--config-file",
        "Base-RetinaNet-EfficientNet-FPN.yaml",
        "--labels",
        "my_data/data.yaml",
    ]
    words += ["--unlabeled-images", unlabeled, "--output", "output", "--val-labels"]
    data = yaml.safe_load(Path("my_val/data.yaml").read_text())
    Path("my_val/data.yaml").write_text(yaml.safe_dump({**data, "names": ["green", "red"]}))
    assert_refused([*words, "my_val/data.yaml", *SMALL_MODEL], capsys, "green", "red", "val.json")
    Path("my_val/data.yaml").unlink()
    Path("my_val/classes.txt").write_text("green\nred\n")
    assert_refused([*words, "my_val", *SMALL_MODEL], capsys, "green", "red", "val.json")


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    unlabeled = make_yolo_sets(tmp_path)
    Path("my_data/data.yaml").unlink()
    words = [
        "self-train",
        "--config-file",
        "Base-RetinaNet-EfficientNet-FPN.yaml",
        "--unlabeled-images",
        unlabeled,
    ]
    words += ["--output", "output"]
    end = ["--labels", "my_data", *SMALL_MODEL]
    assert_refused([*words, *end], capsys, "my_data", "give --classes NAME ...", "classes.txt")
    end = ["--labeled-json", "my_data", "--labeled-images", "my_data/images", *SMALL_MODEL]
    assert_refused([*words, *end], capsys, "my_data is a folder", "--labels my_data")
    end = ["--labels", "my_data/images", *SMALL_MODEL]
    assert_refused([*words, *end], capsys, "my_data/images has no labels", "name my_data.")


@pytest.mark.slow
def test_several_seeds_at_a_time(start, tmp_path, monkeypatch, capsys):
    """Each process reads the labels itself, and writes the same bytes to the one output/labels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    unlabeled = make_yolo_sets(tmp_path)
    words = ["self-train", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml", *yolo_set()[0]]
    words += ["--unlabeled-images", unlabeled, "--control", "--seeds", "0", "1", "--jobs", "2"]
    words += ["--score-floor", "0.001", "--output", "output"]
    words += [*SMALL_MODEL[:-2], "SOLVER.MAX_ITER", "1", *FINDS, *start()]  # but SEED
    assert main(words) == 0
    summary = json.loads(Path("output/summary.json").read_text())
    assert summary["seeds"] == [0, 1] and len(summary["differences"]["student - control"]["by_seed"]) == 2
    assert {file.name for file in Path("output/labels").iterdir()} == {"train.json", "val.json"}
    before = {file: file.stat().st_mtime_ns for file in Path("output").rglob("*.pth")}
    assert len(before) >= 6
    assert main(words) == 0  # nothing is redone
    assert before == {file: file.stat().st_mtime_ns for file in Path("output").rglob("*.pth")}
    words = ["--format", "onnx", "--output", "student.onnx"]
    assert_refused(["export-model", "output", *words], capsys, "output/seed_0", output=Path("student.onnx"))
    assert main(["export-model", "output/seed_0", *words]) == 0


def subset(coco_file, file, number, first=0):
    """A COCO file of some of the images of another, with their labels."""
    content = json.loads(coco_file.read_text())
    content["images"] = sorted(content["images"], key=lambda image: image["file_name"])[
        first : first + number
    ]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    file.write_text(json.dumps(content))
    return [image["file_name"] for image in content["images"]], content


def real_yolo(images, train, val):
    """``my_data`` with a data.yaml that names its validation."""
    converted(train, "my_data", "yolo", images)
    converted(val, "my_val", "yolo", images)
    data = yaml.safe_load(Path("my_data/data.yaml").read_text())
    Path("my_data/data.yaml").write_text(yaml.safe_dump({**data, "val": "../my_val/images"}))
    return "my_data/images", "my_val/images", []


def real_voc(images, train, val):
    """``my_data`` with lists."""
    both, other = json.loads(train.read_text()), json.loads(val.read_text())
    last = [max(entry["id"] for entry in both[key]) for key in ("images", "annotations")]
    both["images"] += [{**image, "id": image["id"] + last[0]} for image in other["images"]]
    both["annotations"] += [
        {**a, "id": a["id"] + last[1], "image_id": a["image_id"] + last[0]} for a in other["annotations"]
    ]
    Path("both.json").write_text(json.dumps(both))
    converted("both.json", "my_data", "voc", images)
    write_lists(Path("my_data"), {Path(image["file_name"]).stem for image in other["images"]})
    return "my_data/JPEGImages", "my_data/JPEGImages", []


def real_coco(images, train, val):
    """``my_data/labels.json`` beside its photographs."""
    Path("my_data/photos").mkdir(parents=True)
    for image in json.loads(train.read_text())["images"]:
        shutil.copy(images / image["file_name"], "my_data/photos")
    shutil.copy(train, "my_data/labels.json")
    return "my_data/photos", str(images), ["--val-labels", str(val), "--val-images", str(images)]


@pytest.mark.slow
@pytest.mark.skipif(
    not DATA.is_dir(), reason="SELFTRAIN_D2_DATA names no folder with bccd/ and playing_cards/"
)
@pytest.mark.parametrize(
    ("row", "data", "train_file", "make"),
    [
        ("YOLO", "bccd", "trainval.json", real_yolo),
        ("PASCAL VOC", "playing_cards", "train.json", real_voc),
        ("COCO JSON", "bccd", "trainval.json", real_coco),
    ],
)
def test_the_commands_of_the_page(row, data, train_file, make, start, tmp_path, monkeypatch):
    """Real photographs; the page's words, with keys behind them that make it short, and other weights to start from."""
    monkeypatch.chdir(tmp_path)
    images, train, val = DATA / data / "images", tmp_path / "train.json", tmp_path / "val.json"
    subset(DATA / data / train_file, train, 6)
    _, content = subset(DATA / data / "test.json", val, 4)
    photos, val_images, more = make(images, train, val)
    others, _ = subset(DATA / data / train_file, tmp_path / "others.json", 5, first=6)
    for name in others:
        shutil.copy(images / name, Path(photos, name))

    classes = [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    if row == "PASCAL VOC":  # has the names of its objects, in alphabetical order
        used = {a["category_id"] for a in json.loads(Path("both.json").read_text())["annotations"]}
        classes = sorted(c["name"] for c in content["categories"] if c["id"] in used)

    labels, unlabeled = forms()[row]
    page = {"my_data/data.yaml": shlex.split(labels), "my_data/images": shlex.split(unlabeled)}
    for words in commands():
        words = [other for word in words for other in page.get(word, [word])]
        if words[0] == "self-train":
            words[1:1] = ["--score-floor", "0.001", *more]
            words += [*ANY_CLASSES, "SOLVER.AMP.ENABLED", "False", "SOLVER.MAX_ITER", "4", *FINDS]
            words += start(len(classes))
        if words[0] == "inspect" and row == "COCO JSON":
            assert "--labeled-images" in words
        assert main(words) == 0, words
    summary = json.loads(Path("output/summary.json").read_text())
    assert summary["stages"]["pseudo_labels"]["images"] == len(others)
    assert summary["stages"]["pseudo_labels"]["left_out"]["labeled"] == 6
    if row == "COCO JSON":  # taken as it is
        Path("output/labels").mkdir()
        shutil.copy(val, "output/labels/val.json")
    assert_finds_the_same(val_images, classes)

    (line,) = commands("python examples/run_onnx.py")
    photo = Path(val_images, content["images"][0]["file_name"])
    words = [str(photo) if word == "photo.jpg" else word for word in line]
    words[words.index("0.3")] = "0"
    (tmp_path / "examples").symlink_to(EXAMPLE.parent)
    printed = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True).stdout
    assert printed.split()[0] in classes
