"""``--dry-run``: real checks, no work."""

import json

import pytest
from conftest import SMALL_MODEL, make_coco_set
from detectron2.data import DatasetCatalog

from selftrain_d2.cli import main
from selftrain_d2.cli.dry_run import Plan

CONFIG = "Base-RetinaNet-EfficientNet-FPN.yaml"
STUDENT = ["DATASETS.PSEUDO_TRAIN", "('pseudo',)", "SOLVER.PSEUDO_IMS_PER_BATCH", "2"]


@pytest.fixture
def train(coco_set, tmp_path, monkeypatch):
    """``words(*options, keys=[])`` of a dry run that has its human labels, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def words(*options, keys=()):
        labels = ["--human-labels", "human", coco_set.json_file, coco_set.images]
        keys = [*SMALL_MODEL, "DATASETS.TRAIN", "('human',)", "SOLVER.MAX_ITER", "7", *keys]
        return ["train", "--dry-run", "--config-file", CONFIG, *labels, *options, *keys]

    yield words
    assert not list((tmp_path / "here").iterdir())
    assert "human" not in DatasetCatalog and "pseudo" not in DatasetCatalog


def refused(words, capsys, *fragments):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert not printed.out
    for fragment in fragments:
        assert fragment in printed.err


def test_teacher(train, capsys):
    assert main(train()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "human labels: human, 2 images a step" in lines
    assert "schedule: 7 steps, learning rate 0.01" in lines
    assert "weights: random" in lines
    assert not any(line.startswith("missing") for line in lines)


def test_student_whose_files_are_not_there_yet(train, capsys):
    weights = ["MODEL.WEIGHTS", "teacher.pth", "SELFTRAIN.ALPHA", "0.5"]
    assert main(train("--pseudo-labels", "pseudo", "no/folder", keys=[*STUDENT, *weights])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "pseudo labels: pseudo, 2 images a step, alpha 0.5" in lines
    missing = [line for line in lines if line.startswith("missing")]
    assert missing == ["missing: no/folder", "missing: teacher.pth"]


def test_weights_of_a_url_are_not_missing(train, capsys):
    assert main(train(keys=["MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl"])) == 0
    assert "missing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "keys", "fragments"),
    [
        ((), STUDENT, ["'pseudo'", "not registered"]),
        ((), STUDENT[:2], ["belong together"]),
        ((), ["DATASETS.TEST", "('coco_2018_val',)"], ["DATASETS.TEST", "coco_2018_val"]),
        ((), ["SOLVER.NO_SUCH_KEY", "1"], ["SOLVER.NO_SUCH_KEY"]),
        ((), ["MODEL.RETINANET.NUM_CLASSES", "3"], ["NUM_CLASSES is 3", "2 classes"]),
        ((), ["SOLVER.WARMUP_ITERS", "7"], ["SOLVER.WARMUP_ITERS"]),
        ((), ["SOLVER.IMS_PER_BATCH", "0"], ["SOLVER.IMS_PER_BATCH is 0"]),
        ((), ["DATALOADER.SAMPLER_TRAIN", "Foo"], ["Foo", "RepeatFactorTrainingSampler"]),
        ((), ["MODEL.META_ARCHITECTURE", "RetinaNet"], ["RetinaNet does not keep", "SelfTraining"]),
        (
            ("--human-labels", "other", "ONE_CLASS", "IMAGES"),
            ["DATASETS.TEST", "('other',)"],
            ["evaluation dataset 'other'"],
        ),
        (
            ("--human-labels", "other", "ONE_CLASS", "IMAGES"),
            ["DATASETS.TRAIN", "('human', 'other')"],
            ["human-labeled dataset 'other'", "[red] (1) against [red, green] (2)"],
        ),
        (
            (),
            ["DATASETS.CLASSIFICATION_TRAIN", "('human',)", "SOLVER.CLASSIFICATION_IMS_PER_BATCH", "2"],
            ["'human', which is no classification dataset"],
        ),
        ((), ["SELFTRAIN.ALPHA", "-1"], ["ALPHA"]),
        ((), ["SELFTRAIN.WEIGHT_EMA_DECAY", "2.0"], ["WEIGHT_EMA_DECAY"]),
        (("--num-gpus", "3"), [], ["SOLVER.IMS_PER_BATCH = 2", "3 processes"]),
        ((), ["SOLVER.REFERENCE_WORLD_SIZE", "8"], ["REFERENCE_WORLD_SIZE is 8, but the processes are 1"]),
        (("--eval-only",), [], ["DATASETS.TEST"]),
    ],
)
def test_mistakes_are_those_of_a_real_run(train, coco_set, tmp_path, capsys, options, keys, fragments):
    content = {**coco_set.content, "categories": coco_set.content["categories"][:1]}
    category = content["categories"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == category]
    (tmp_path / "one_class.json").write_text(json.dumps(content))
    files = {"ONE_CLASS": str(tmp_path / "one_class.json"), "IMAGES": coco_set.images}
    words = train(
        *(files.get(word, word) for word in options), keys=[*keys, "OUTPUT_DIR", str(tmp_path / "output")]
    )
    refused(words, capsys, *fragments)
    assert main([word for word in words if word != "--dry-run"]) == 2
    error = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in error


def test_as_many_processes_as_the_schedule_was_made_for(train):
    for number in (0, 2):
        keys = ["SOLVER.REFERENCE_WORLD_SIZE", str(number)]
        assert main(train("--num-gpus", "2", keys=keys)) == 0


def test_evaluation_needs_no_training_data(train, capsys):
    keys = [*STUDENT, "DATASETS.TEST", "('human',)", "MODEL.WEIGHTS", "student.pth"]
    assert main(train("--eval-only", keys=keys)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "evaluate on: human" in lines and not any(line.startswith("schedule") for line in lines)


def test_files_that_are_there_are_checked(train, coco_set, capsys):
    coco_set.content["annotations"][0]["bbox"] = [0, 0, 500, 5]
    with open(coco_set.json_file, "w") as file:
        json.dump(coco_set.content, file)
    refused(train(), capsys, "pixels outside its image")


def test_label(tmp_path, monkeypatch, capsys):
    images = make_coco_set(tmp_path / "set", 3, seed=1).images
    monkeypatch.chdir(tmp_path)

    def words(*options, weights="teacher.pth"):
        head = ["label", "--dry-run", "--config-file", CONFIG, "--output", "labels", *options]
        return [*head, *SMALL_MODEL, "MODEL.WEIGHTS", weights]

    assert main(words("--images", images)) == 0
    printed = capsys.readouterr().out
    assert "3 images" in printed and "missing: teacher.pth" in printed
    assert main(words("--images", "no/images")) == 0
    assert "missing: no/images" in capsys.readouterr().out
    refused(words("--images", images, weights=""), capsys, "MODEL.WEIGHTS is empty")
    refused(words("--images", images, "--score-floor", "1"), capsys, "score floor")
    refused(words("--dataset", "coco_2018"), capsys, "coco_2018", "not registered")
    refused(words("--coco-json", "no.json"), capsys, "--image-root")
    assert not (tmp_path / "labels").exists()


def test_splits_and_convert(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    splits = ["splits", "no.json", "--dry-run", "--output", "parts", "--fractions"]
    assert main([*splits, "20", "0.5"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "output: parts/labeled_0.5.json, parts/labeled_20.json",
        "missing: no.json",
    ]
    refused([*splits, "120"], capsys, "120")
    convert = ["convert", "no.safetensors", "--dry-run", "--format", "timm", "--output", "out.pth", "--name"]
    assert main([*convert, "efficientnet-b0"]) == 0
    assert "missing: no.safetensors" in capsys.readouterr().out
    refused([*convert, "efficientnet-b99"], capsys, "efficientnet-b99")
    assert not list(tmp_path.iterdir())


def test_a_plan_names_a_missing_path_once(tmp_path):
    plan = Plan()
    assert plan.has(tmp_path) and not plan.has(tmp_path, "a") and not plan.has("a", "b")
    assert str(plan) == "missing: a\nmissing: b"
