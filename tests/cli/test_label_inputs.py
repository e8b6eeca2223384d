"""The label command takes images from a folder, a list, COCO JSON, a tar archive, or a registered dataset."""

import json
import shutil
import tarfile

import cv2
import fsspec
import pytest
import torch
from conftest import SMALL_MODEL, make_coco_set
from detectron2.modeling import build_model

from selftrain_d2 import load_pseudo_labels, register_image_folder
from selftrain_d2.cli import main
from selftrain_d2.data.mapper import read_image
from selftrain_d2.data.pseudo_labels.manifest import read_manifest


@pytest.fixture
def inputs(small_config, tmp_path):
    """The same four images in every form, as arguments by their names."""
    photos = tmp_path / "photos"
    images = make_coco_set(photos, 4, seed=5).images
    (tmp_path / "images.txt").write_text("".join(f"photos/images/{i:03d}.png\n" for i in range(1, 5)))
    coco = {"images": [{"id": i, "file_name": f"{i:03d}.png"} for i in range(1, 5)]}
    (tmp_path / "images.json").write_text(json.dumps(coco))
    for shard, numbers in enumerate([(1, 2, 3), (4,)]):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as archive:
            for i in numbers:
                archive.add(f"{images}/{i:03d}.png", f"{i:03d}.png")
    register_image_folder("four_photos", images)
    torch.manual_seed(0)
    detector = build_model(small_config)
    torch.nn.init.normal_(detector.head.cls_score.weight, std=0.5)
    torch.save({"model": detector.state_dict()}, tmp_path / "teacher.pth")
    return {
        "folder": ["--images", images],
        "list": ["--image-list", str(tmp_path / "images.txt")],
        "coco": ["--coco-json", str(tmp_path / "images.json"), "--image-root", images],
        "archive": ["--archive", str(tmp_path / "shard-{0..1}.tar")],
        "dataset": ["--dataset", "four_photos"],
    }


def _label(tmp_path, arguments, weights=None):
    return main(
        ["label", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml", *arguments, "--score-floor", "0.001",
         "--classes", "red", "green", "--output", str(tmp_path / "labels"), *SMALL_MODEL,
         "MODEL.WEIGHTS", weights or str(tmp_path / "teacher.pth")]
    )  # fmt: skip


def _annotations(tmp_path):
    return [d["annotations"] for d in load_pseudo_labels(tmp_path / "labels", 0.001)]


@pytest.mark.parametrize("form", ["list", "coco", "archive", "dataset"])
def test_every_form_gives_the_labels_of_the_folder(inputs, tmp_path, form):
    assert _label(tmp_path, inputs["folder"]) == 0
    expected = _annotations(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "labels of the folder")
    assert _label(tmp_path, inputs[form]) == 0
    assert _annotations(tmp_path) == expected and sum(map(len, expected)) > 10
    manifest = read_manifest(tmp_path / "labels")
    assert manifest["listed"] == 4 and not manifest["skipped"]
    assert manifest["images_per_second_of_last_run"] > 0


def test_labels_of_an_archive_train(inputs, tmp_path):
    assert _label(tmp_path, inputs["archive"]) == 0
    labeled = make_coco_set(tmp_path / "labeled", 2, seed=1)
    command = [
        "train", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml",
        "--human-labels", "human", labeled.json_file, labeled.images,
        "--pseudo-labels", "pseudo", str(tmp_path / "labels"), *SMALL_MODEL,
        "DATASETS.TRAIN", "('human',)", "DATASETS.PSEUDO_TRAIN", "('pseudo',)", "DATASETS.TEST", "()",
        "SOLVER.PSEUDO_IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SELFTRAIN.SCORE_THRESH", "0.01",
        "OUTPUT_DIR", str(tmp_path / "student"),
    ]  # fmt: skip
    assert main(command) == 0
    assert (tmp_path / "student" / "model_final.pth").exists()


def test_an_archive_that_was_moved(inputs, tmp_path):
    assert _label(tmp_path, inputs["archive"]) == 0
    (tmp_path / "elsewhere").mkdir()
    for i in range(2):
        (tmp_path / f"shard-{i}.tar").rename(tmp_path / "elsewhere" / f"shard-{i}.tar")
    dicts = load_pseudo_labels(tmp_path / "labels", 0.001, image_root=f"tar://{tmp_path}/elsewhere")
    for i, d in enumerate(dicts, 1):
        original = cv2.imread(str(tmp_path / "photos" / "images" / f"{i:03d}.png"))
        assert (read_image(d["file_name"], "BGR") == original).all()
    assert len(dicts) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coco-json", "images.json"], "--coco-json needs --image-root"),
        (["--images", ".", "--image-root", "."], "--image-root goes with"),
        (["--image-list", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--archive", "nowhere.tar"], "nowhere.tar cannot be opened"),
    ],
)
def test_mistakes(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert _label(tmp_path, arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_one_kind_of_input_at_a_time(tmp_path, capsys):
    for arguments in ([], ["--images", ".", "--dataset", "x"]):
        with pytest.raises(SystemExit) as stop:
            _label(tmp_path, arguments)
        assert stop.value.code == 2
        assert "--archive" in capsys.readouterr().err


def test_the_commands_take_object_storage(inputs, tmp_path, monkeypatch):
    """Images, teacher, labels of people and pseudo labels at addresses; the outputs are local."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    make_coco_set(tmp_path / "labeled", 2, seed=1)
    assert _label(tmp_path, inputs["archive"]) == 0
    expected = _annotations(tmp_path)
    for name in ("photos", "labeled", "labels", "teacher.pth", "shard-0.tar", "shard-1.tar"):
        memory.put(str(tmp_path / name), f"memory://store/{name}", recursive=True)
    shutil.rmtree(tmp_path / "labels")
    weights, archives = "memory://store/teacher.pth", "memory://store/shard-{0..1}.tar"
    assert _label(tmp_path, ["--archive", archives], weights) == 0
    assert _annotations(tmp_path) == expected
    manifest = read_manifest(tmp_path / "labels")
    assert manifest["image_root"] == "tar://memory://store" and not manifest["skipped"]
    assert manifest["teacher_weights"] == weights
    command = [
        "train", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml",
        "--human-labels", "human", "memory://store/labeled/labels.json", "memory://store/labeled/images",
        "--pseudo-labels", "pseudo", "memory://store/labels", *SMALL_MODEL,
        "DATASETS.TRAIN", "('human',)", "DATASETS.PSEUDO_TRAIN", "('pseudo',)", "DATASETS.TEST", "()",
        "SOLVER.PSEUDO_IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "1", "SELFTRAIN.SCORE_THRESH", "0.01",
        "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path / "student"),
    ]  # fmt: skip
    assert main(command) == 0
    assert (tmp_path / "student" / "model_final.pth").exists()
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
