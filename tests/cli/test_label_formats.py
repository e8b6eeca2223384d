"""--labels of the commands, and someone else's predictions imported."""

import json
import os
from pathlib import Path

import pytest
from conftest import SMALL_MODEL, assert_refused, make_coco_set

from selftrain_d2 import load_pseudo_labels
from selftrain_d2.cli import main
from selftrain_d2.data.coco_file import read_coco
from selftrain_d2.data.label_formats.convert import write_labels
from selftrain_d2.data.label_formats.detect import read_labels

CONFIG = "Base-RetinaNet-EfficientNet-FPN.yaml"
DATA = Path(os.environ.get("SELFTRAIN_D2_DATA", "no such folder"))


@pytest.fixture
def yolo(tmp_path):
    """A data.yaml whose validation is a second set."""
    for name, seed in (("train", 1), ("val", 2)):
        made = make_coco_set(tmp_path / name, 4, seed=seed)
        write_labels(read_labels(made.json_file, images=made.images), tmp_path / f"yolo_{name}", "yolo")
    data = tmp_path / "data.yaml"
    data.write_text("train: yolo_train/images\nval: yolo_val/images\nnames: [red, green]\n")
    return data


def test_the_loop_takes_a_yolo_set_with_its_validation_and_resumes(yolo, tmp_path):
    unlabeled = make_coco_set(tmp_path / "more", 3, seed=3)
    words = [
        "self-train",
        "--config-file",
        CONFIG,
        "--labels",
        str(yolo),
        "--unlabeled-images",
        unlabeled.images,
    ]
    words += [
        "--score-floor",
        "0.001",
        "--output",
        str(tmp_path / "out"),
        *SMALL_MODEL,
        "SOLVER.MAX_ITER",
        "2",
    ]
    words += ["SELFTRAIN.SCORE_THRESH", "0.005"]
    assert main(words) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert list(summary["stages"]) == ["teacher", "pseudo_labels", "student"]
    labels = tmp_path / "out/labels"
    assert [len(read_coco(labels / f"{name}.json").content["images"]) for name in ("train", "val")] == [4, 4]
    before = (labels / "train.json").read_bytes()
    stamp = (tmp_path / "out/teacher/model_final.pth").stat().st_mtime_ns
    assert main(words) == 0  # finished: nothing is redone
    assert (tmp_path / "out/teacher/model_final.pth").stat().st_mtime_ns == stamp
    assert (labels / "train.json").read_bytes() == before


def test_the_loop_says_what_is_missing(coco_set, tmp_path, capsys):
    words = ["self-train", "--config-file", CONFIG, "--unlabeled-images", coco_set.images, "--output"]
    words += [str(tmp_path / "out"), "--labels", coco_set.json_file]
    assert_refused([*words, *SMALL_MODEL], capsys, "give --labeled-images", output=tmp_path / "out")
    more = ["--labeled-images", coco_set.images, "--labeled-json", coco_set.json_file]
    assert_refused([*words, *more, *SMALL_MODEL], capsys, "leave the other argument out")


def test_training_is_planned_with_a_yolo_set(yolo, tmp_path, capsys):
    words = ["train", "--config-file", CONFIG, "--labels", str(yolo), "--dry-run", *SMALL_MODEL]
    words += ["OUTPUT_DIR", str(tmp_path / "out"), "MODEL.RETINANET.NUM_CLASSES", "2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "human labels: labels" in said and "evaluate on: labels_val" in said and "missing" not in said
    assert not (tmp_path / "out").exists()


def test_splits_of_a_yolo_set(yolo, tmp_path):
    assert (
        main(["splits", "--labels", str(yolo), "--fractions", "50", "--output", str(tmp_path / "splits")])
        == 0
    )
    assert len(read_coco(tmp_path / "splits/labeled_50.json").content["images"]) == 2


def test_yolo_predictions_become_pseudo_labels_that_can_be_inspected(yolo, tmp_path, capsys):
    folder = tmp_path / "predict"
    folder.mkdir()
    (folder / "001.txt").write_text("0 0.5 0.5 0.25 0.5 0.9\n1 0.5 0.5 0.5 0.5 0.25\n")
    images = str(tmp_path / "train/images")
    words = ["import", str(folder), "--images", images, "--classes", "red", "green", "--output"]
    assert main([*words, str(tmp_path / "labels")]) == 0
    assert "1 images with 2 boxes, 3 without" in capsys.readouterr().out
    (image,) = [d for d in load_pseudo_labels(tmp_path / "labels", 0.5) if d["annotations"]]
    assert [a["bbox"] for a in image["annotations"]] == [[36, 24, 60, 72]]
    assert main(["inspect", str(tmp_path / "labels"), "--labels", str(yolo), "--truth", str(yolo)]) == 0
    assert "At 0.5: 1 boxes on 1 images" in capsys.readouterr().out


def test_coco_results_become_pseudo_labels(coco_set, tmp_path, capsys):
    results = tmp_path / "results.json"
    box = {"image_id": 1, "category_id": 20, "bbox": [-2, 10, 12, 20], "score": 0.75}
    results.write_text(json.dumps([box, {**box, "bbox": [96, 0, 5, 5]}]))
    words = ["import", str(results), "--images", coco_set.images, "--output", str(tmp_path / "labels")]
    assert_refused(words, capsys, "give --image-json", output=tmp_path / "labels")
    assert main([*words, "--image-json", coco_set.json_file]) == 0
    assert "1 images with 1 boxes, 7 without" in capsys.readouterr().out
    (image,) = [d for d in load_pseudo_labels(tmp_path / "labels", 0.5) if d["annotations"]]
    (found,) = image["annotations"]
    assert (found["bbox"], found["category_id"], found["score"]) == ([0, 10, 10, 30], 1, 0.75)


@pytest.mark.parametrize("name", ["bccd/test.json", "playing_cards/test.json"])
@pytest.mark.skipif(
    not DATA.is_dir(), reason="SELFTRAIN_D2_DATA names no folder with bccd/ and playing_cards/"
)
def test_real_labels_there_and_back(name, tmp_path):
    labels = read_labels(DATA / name, images=str(DATA / name.split("/")[0] / "images"))
    for to, tolerance in (("yolo", 1e-3), ("voc", 0)):
        write_labels(labels, tmp_path / to, to)
        back = read_labels(tmp_path / to)
        assert back.file.objects == labels.file.objects
        found, true = _by_image(back), _by_image(labels)
        assert found.keys() == true.keys()
        for key, boxes in true.items():
            for (one, a), (other, b) in zip(boxes, found[key]):
                assert one == other and max(abs(u - v) for u, v in zip(a, b)) <= tolerance


def _by_image(labels):
    content = labels.file.content
    names = {c["id"]: c["name"] for c in content["categories"]}
    return {
        image["file_name"]: [
            (names[a["category_id"]], a["bbox"])
            for a in content["annotations"]
            if a["image_id"] == image["id"]
        ]
        for image in content["images"]
    }
