import json
import logging
import pickle
from pathlib import Path

import pytest
from conftest import SMALL_MODEL, make_coco_set
from detectron2.data import DatasetCatalog

from selftrain_d2 import InputError
from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.engine.launch import human_labels, pseudo_labels, registered, select

SCORES = [0.3, 0.5, 0.8, 0.9]


@pytest.fixture
def labels(tmp_path):
    identity = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": "/photos"}
    with PseudoLabelWriter(tmp_path, identity, ["a.png", "b.png"]) as writer:
        boxes = [[0, 0, 5, 5]] * 4
        writer.write_shard(0, [make_row(n, 9, 9, boxes, SCORES, [0, 1, 0, 1]) for n in ("a.png", "b.png")])
        writer.finish()
    return tmp_path


@pytest.mark.parametrize(
    "keys, kept",
    [
        ({}, [0.5, 0.8, 0.9]),
        ({"SCORE_THRESH": 0.85}, [0.9]),
        ({"SCORE_THRESH_BY_CLASS": ("red", 0.1)}, [0.3, 0.5, 0.8, 0.9]),
        ({"SCORE_THRESH_BY_CLASS": ("red", 0.1), "TOP_K": 2}, [0.8, 0.9]),
        ({"BOXES_PER_IMAGE": 2.0}, [0.8, 0.9]),
    ],
)
def test_the_config_selects_the_boxes_of_a_run(small_config, labels, keys, kept):
    for key, value in keys.items():
        small_config.SELFTRAIN[key] = value
    # As it travels to the processes of a run.
    spec = pickle.loads(pickle.dumps(pseudo_labels("pseudo", labels, small_config)))
    with registered([spec]):
        dicts = DatasetCatalog.get("pseudo")
        assert [[round(a["score"], 4) for a in d["annotations"]] for d in dicts] == [kept, kept]


def _coco(folder, number):
    """So many images, the first with three boxes: a crowd, one without area, and one that counts."""
    coco = make_coco_set(folder, number, seed=0)
    content = {**coco.content, "annotations": []}
    for i, changed in enumerate(({"iscrowd": 1}, {"bbox": [5, 5, 0, 9]}, {})):
        annotation = {"id": i + 1, "image_id": 1, "category_id": 10, "bbox": [5, 5, 20, 20], "area": 400}
        content["annotations"].append({**annotation, "iscrowd": 0, **changed})
    Path(coco.json_file).write_text(json.dumps(content))
    return coco


def test_thresholds_by_what_people_drew(small_config, labels, tmp_path, caplog):
    """One box on two images: one on the two pseudo-labeled ones, or the two of equal scores."""
    coco = _coco(tmp_path / "coco", 2)
    small_config.DATASETS.TRAIN = ("human",)
    small_config.SELFTRAIN.THRESHOLDS = "counts"
    human = human_labels("human", coco.json_file, coco.images)
    selection, counts = select(labels, small_config, [human])
    assert selection["score_thresh"] == {"red": 0.9, "green": 0.9}
    assert [row["human_boxes"] for row in counts["classes"]] == [1, 0] and counts["human_images"] == 2
    spec = pickle.loads(pickle.dumps(pseudo_labels("pseudo", labels, small_config, [human])))
    with caplog.at_level(logging.INFO), registered([spec]):
        assert [len(d["annotations"]) for d in DatasetCatalog.get("pseudo")] == [1, 1]
    assert "pseudo: score thresholds by people's counts, their boxes on 2 images" in caplog.text
    assert "red 0.9 (people 1, left 0; under 30 human boxes: that of all classes)" in caplog.text
    with pytest.raises(InputError, match=r"DATASETS\.TRAIN names 'human', which is not registered"):
        pseudo_labels("pseudo", labels, small_config)


def test_the_train_command_counts_its_human_labels(labels, tmp_path, capsys):
    coco = _coco(tmp_path / "coco", 2)
    command = [
        "train", "--dry-run", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml",
        "--human-labels", "human", coco.json_file, coco.images, "--pseudo-labels", "pseudo", str(labels), *SMALL_MODEL,
        "DATASETS.TRAIN", "('human',)", "DATASETS.PSEUDO_TRAIN", "('pseudo',)", "DATASETS.TEST", "()",
        "SOLVER.PSEUDO_IMS_PER_BATCH", "1", "OUTPUT_DIR", str(tmp_path / "out"), "SELFTRAIN.THRESHOLDS", "counts",
    ]  # fmt: skip
    assert main(command) == 0
    assert main([*command, "SELFTRAIN.TOP_K", "3"]) == 2
    assert "so does SELFTRAIN.TOP_K 3" in capsys.readouterr().err


def test_mistakes_name_what_is_wrong(small_config, labels, tmp_path):
    small_config.SELFTRAIN.SCORE_THRESH_BY_CLASS = ("blue", 0.1)
    with (
        pytest.raises(InputError, match="no class 'blue'"),
        registered([pseudo_labels("p", labels, small_config)]),
    ):
        pass
    with pytest.raises(InputError, match="holds no pseudo labels"):
        pseudo_labels("p", tmp_path / "nothing", small_config)
