"""A user's mistakes: one sentence on standard error, exit status 2, nothing half-written."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL, assert_refused, make_coco_set

from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.engine import launch

CONFIG = "Base-RetinaNet-EfficientNet-FPN.yaml"


@pytest.fixture
def data(tmp_path):
    return make_coco_set(tmp_path / "labeled", 3, seed=1), make_coco_set(tmp_path / "unlabeled", 3, seed=2)


def _self_train(data, tmp_path, *options, **paths):
    labeled, unlabeled = data
    arguments = {
        "--config-file": CONFIG,
        "--labeled-json": labeled.json_file,
        "--labeled-images": labeled.images,
        "--unlabeled-images": unlabeled.images,
        "--output": str(tmp_path / "output"),
    }
    arguments.update({f"--{key.replace('_', '-')}": str(value) for key, value in paths.items()})
    words = [word for pair in arguments.items() for word in pair]
    return ["self-train", *words, *SMALL_MODEL, "SOLVER.MAX_ITER", "1", *options]


def test_missing_and_empty_paths(data, tmp_path, capsys):
    output = tmp_path / "output"
    assert_refused(
        _self_train(data, tmp_path, config_file="no.yaml"),
        capsys,
        "no.yaml does not exist",
        CONFIG,
        output=output,
    )
    assert_refused(
        _self_train(data, tmp_path, labeled_json="no.json"), capsys, "no.json does not exist", output=output
    )
    assert_refused(
        _self_train(data, tmp_path, labeled_images="/no"), capsys, "/no", "does not exist", output=output
    )
    (tmp_path / "empty").mkdir()
    assert_refused(
        _self_train(data, tmp_path, unlabeled_images=tmp_path / "empty"),
        capsys,
        "holds no image",
        output=output,
    )
    assert_refused(
        _self_train(data, tmp_path, val_json=data[0].json_file), capsys, "belong together", output=output
    )


def test_output_among_the_images(data, tmp_path, capsys):
    """A second round would label the masks and figures of the first."""
    inside = Path(data[1].images, "output")
    reason = "lies in the image folder"
    assert_refused(_self_train(data, tmp_path, output=inside), capsys, reason, data[1].images, output=inside)
    command = ["--config-file", CONFIG, *SMALL_MODEL]
    folder = ["--images", data[1].images, "--output", str(inside)]
    for name in ("label", "pretrain-simclr"):
        assert_refused([name, *folder, *command], capsys, reason, output=inside)
    assert_refused(["label", *folder, "--dry-run", *command, "MODEL.WEIGHTS", "x.pth"], capsys, reason)
    for dataset in (
        ["--human-masks", "human", data[1].images, str(tmp_path), "--classes", "a", "b"],
        ["--classification-images", "classes", data[1].images],
    ):
        assert_refused(
            ["train", *dataset, *command, "OUTPUT_DIR", str(inside)], capsys, reason, output=inside
        )
    # A list names its images: what else is there does not matter.
    (tmp_path / "list.txt").write_text("001.png\n")
    arguments = [
        "--image-list",
        str(tmp_path / "list.txt"),
        "--image-root",
        data[1].images,
        "--output",
        str(inside),
    ]
    assert_refused(["label", *arguments, *command], capsys, "MODEL.WEIGHTS is empty", output=inside)


def test_coco_faults_reach_the_user(data, tmp_path, capsys):
    content = data[0].content
    content["annotations"][0]["bbox"] = [0, 0, 500, 5]
    with open(data[0].json_file, "w") as file:
        json.dump(content, file)
    assert_refused(
        _self_train(data, tmp_path),
        capsys,
        "pixels outside its image",
        data[0].json_file,
        output=tmp_path / "output",
    )


def test_other_classes_in_validation(data, tmp_path, capsys):
    content = data[1].content
    content["categories"][0]["name"] = "blue"
    with open(data[1].json_file, "w") as file:
        json.dump(content, file)
    command = _self_train(data, tmp_path, val_json=data[1].json_file, val_images=data[1].images)
    assert_refused(command, capsys, "other classes", "blue", "red", output=tmp_path / "output")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["INPUT.AUGMENTATION.POLICY", "S9"], ["S9", "S1", "S4"]),
        (["SOLVER.NO_SUCH_KEY", "1"], ["SOLVER.NO_SUCH_KEY"]),
        (["SOLVER.MAX_ITER"], ["pairs", "SOLVER.MAX_ITER"]),
        (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER"]),
        (["--rounds", "2"], ["--rounds", "before"]),
    ],
)
def test_config_keys(data, tmp_path, capsys, options, fragments):
    assert_refused(_self_train(data, tmp_path, *options), capsys, *fragments, output=tmp_path / "output")


def test_config_file_that_would_run_code(data, tmp_path, capsys):
    witness = tmp_path / "witness"
    config = tmp_path / "evil.yaml"
    config.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{witness}']\n")
    assert_refused(_self_train(data, tmp_path, config_file=config), capsys, "Python tag", "--allow-unsafe")
    assert not witness.exists()


def test_config_file_that_is_not_yaml_or_has_unknown_keys(data, tmp_path, capsys):
    config = tmp_path / "bad.yaml"
    config.write_text("MODEL: [1, 2\n")
    assert_refused(_self_train(data, tmp_path, config_file=config), capsys, "bad.yaml", "not valid YAML")
    config.write_text("VERSION: 2\nMODEL:\n  NO_SUCH_KEY: 1\n")
    assert_refused(_self_train(data, tmp_path, config_file=config), capsys, "bad.yaml", "NO_SUCH_KEY")


def test_weights(data, tmp_path, capsys):
    output = tmp_path / "output"
    assert_refused(_self_train(data, tmp_path, "MODEL.WEIGHTS", "no.pth"), capsys, "no.pth", output=output)
    stranger = tmp_path / "stranger.pth"
    torch.save({"model": {"layer.weight": torch.zeros(3)}}, stranger)
    assert_refused(_self_train(data, tmp_path, "MODEL.WEIGHTS", str(stranger)), capsys, "stranger.pth")
    # No step was trained with them: the same command may name others.
    torch.save({"model": {"other.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    command = _self_train(data, tmp_path, "MODEL.WEIGHTS", str(tmp_path / "other.pth"))
    assert_refused(command, capsys, "other.pth fit nothing in the model")


def test_no_pseudo_label_over_the_threshold(data, tmp_path, capsys):
    command = _self_train(data, tmp_path, "SELFTRAIN.SCORE_THRESH", "1.0")
    assert_refused(command, capsys, "No pseudo label", "lower SELFTRAIN.SCORE_THRESH")
    # The advice can be followed: the teacher is not trained again, nor refused.
    trained = (tmp_path / "output" / "teacher" / "model_final.pth").stat().st_mtime_ns
    assert main([*command[:1], "--score-floor", "0.001", *command[1:], "SELFTRAIN.SCORE_THRESH", "0.9"]) == 2
    assert "score_floor" in capsys.readouterr().err
    assert main([*command, "SELFTRAIN.SCORE_THRESH", "0.9"]) == 2
    assert "No pseudo label" in capsys.readouterr().err
    assert (tmp_path / "output" / "teacher" / "model_final.pth").stat().st_mtime_ns == trained


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth"])
def test_weights_that_would_run_code(data, tmp_path, capsys, name):
    witness = tmp_path / "witness"
    file = tmp_path / name
    file.write_bytes(pickle.dumps({"model": _Evil(str(witness))}))
    assert_refused(_self_train(data, tmp_path, "MODEL.WEIGHTS", str(file)), capsys, name, "--allow-unsafe")
    assert not witness.exists()


def test_pseudo_labels_of_other_classes(data, tmp_path, capsys):
    labeled, unlabeled = data
    identity = {"thing_classes": ["cat", "dog"], "score_floor": 0.05, "image_root": unlabeled.images}
    writer = PseudoLabelWriter(tmp_path / "pseudo", identity, ["001.png"])
    writer.write_shard(0, [make_row("001.png", 96, 96)])
    writer.finish()
    command = [
        "train", "--config-file", CONFIG, "--human-labels", "human", labeled.json_file, labeled.images,
        "--pseudo-labels", "pseudo", str(tmp_path / "pseudo"), *SMALL_MODEL,
        "DATASETS.TRAIN", "('human',)", "DATASETS.PSEUDO_TRAIN", "('pseudo',)", "DATASETS.TEST", "()",
        "SOLVER.PSEUDO_IMS_PER_BATCH", "1", "OUTPUT_DIR", str(tmp_path / "output"),
    ]  # fmt: skip
    assert_refused(command, capsys, "'pseudo' has other classes", "cat", "red")


def test_number_of_classes(data, tmp_path, capsys):
    labeled, _ = data
    command = [
        "train", "--config-file", CONFIG, "--human-labels", "human", labeled.json_file, labeled.images, *SMALL_MODEL,
        "DATASETS.TRAIN", "('human',)", "DATASETS.TEST", "()", "MODEL.RETINANET.NUM_CLASSES", "5",
        "OUTPUT_DIR", str(tmp_path / "output"),
    ]  # fmt: skip
    assert_refused(command, capsys, "MODEL.RETINANET.NUM_CLASSES is 5", "2 classes")


def test_labeling_without_weights_or_images(data, tmp_path, capsys):
    command = ["label", "--config-file", CONFIG, "--output", str(tmp_path / "out")]
    images = ["--images", data[1].images]
    assert_refused(
        [*command, *images, *SMALL_MODEL], capsys, "MODEL.WEIGHTS is empty", output=tmp_path / "out"
    )
    assert_refused(
        [*command, "--images", "/no", *SMALL_MODEL], capsys, "/no does not exist", output=tmp_path / "out"
    )
    assert_refused(
        [*command, "--dataset", "nobody", *SMALL_MODEL], capsys, "'nobody'", output=tmp_path / "out"
    )


@pytest.mark.parametrize("command", ["train", "label", "self-train"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("MODEL.DEVICE", "gpu"), "MODEL.DEVICE is 'gpu': it must be cpu, cuda"),
        (("SOLVER.LR_SCHEDULER_NAME", "Cosine"), "SOLVER.LR_SCHEDULER_NAME is 'Cosine'"),
        (("SOLVER.CHECKPOINT_PERIOD", "0"), "SOLVER.CHECKPOINT_PERIOD is 0: it must be at least 1"),
    ],
)
def test_values_that_cannot_be(data, tmp_path, capsys, command, words, message):
    """The whole table: tests/engine/test_config_values.py."""
    output = tmp_path / "output"
    commands = {
        "train": ["train", "--config-file", CONFIG, *SMALL_MODEL, "OUTPUT_DIR", str(output)],
        "label": [
            "label", "--config-file", CONFIG, "--images", data[1].images, "--output", str(output), *SMALL_MODEL,
        ],
        "self-train": _self_train(data, tmp_path),
    }  # fmt: skip
    assert_refused([*commands[command], *words], capsys, message, output=output)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("('SOLVER.MAX_ITER',)", "SELFTRAIN.STUDENT: KEY VALUE words come in pairs"),
        ("('SOLVER.MAX_ITERS', 5)", "SELFTRAIN.STUDENT: There is no config key 'SOLVER.MAX_ITERS'"),
        ("('SOLVER.MAX_ITER', 0)", "SELFTRAIN.STUDENT: SOLVER.MAX_ITER is 0"),
    ],
)
def test_keys_of_the_student_are_checked_before_the_teacher_is_trained(
    data, tmp_path, capsys, student, message
):
    command = _self_train(data, tmp_path, "SELFTRAIN.STUDENT", student)
    assert_refused(command, capsys, message, output=tmp_path / "output")


@pytest.mark.parametrize(
    "words, message",
    [
        (("DATASETS.TEST", "('lost',)"), "DATASETS.TEST names 'lost', which is not registered"),
        (("MODEL.META_ARCHITECTURE", "RetinaNett"), "MODEL.META_ARCHITECTURE is 'RetinaNett'"),
        (("MODEL.BACKBONE.NAME", "resnet"), "MODEL.BACKBONE.NAME is 'resnet'"),
        (("OUTPUT_DIR", __file__), "cannot be written"),
    ],
)
def test_mistakes_are_told_before_training(data, tmp_path, capsys, words, message):
    human = ["--human-labels", "red", data[0].json_file, str(data[0].images), *SMALL_MODEL]
    options = [
        "DATASETS.TRAIN",
        "('red',)",
        "OUTPUT_DIR",
        str(tmp_path / "output"),
        "MODEL.RETINANET.NUM_CLASSES",
        "2",
    ]
    assert_refused(["train", "--config-file", CONFIG, *human, *options, *words], capsys, message)
    assert not list(tmp_path.glob("output/*.pth"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_damaged_inside(data, tmp_path, monkeypatch, capsys, workers):
    """Also where a loader's worker meets it: the sentence of its exception, not the text of its traceback."""
    labeled, _ = data
    image = tmp_path / "labeled" / "images" / labeled.content["images"][0]["file_name"]
    image.write_bytes(image.read_bytes()[:400])
    monkeypatch.setattr(launch, "check_images", lambda names: None)  # as if only decoding showed it
    labels = ["--human-labels", "labeled", labeled.json_file, labeled.images]
    keys = ["DATASETS.TRAIN", "('labeled',)", "OUTPUT_DIR", str(tmp_path / "output"), "SOLVER.MAX_ITER", "9"]
    command = ["train", "--config-file", CONFIG, *labels, *SMALL_MODEL, *keys]
    assert main([*command, "DATALOADER.NUM_WORKERS", str(workers)]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert str(image) in error and "Caught" not in error and "Traceback" not in error


def test_batch_norm_over_a_single_value(data, tmp_path, capsys):
    """P7 of one image of 96 pixels. The advice helps."""
    labeled, _ = data
    command = [
        "train", "--config-file", CONFIG, "--human-labels", "human", labeled.json_file, labeled.images, *SMALL_MODEL,
        "DATASETS.TRAIN", "('human',)", "SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "1",
        "OUTPUT_DIR", str(tmp_path / "output"),
    ]  # fmt: skip
    assert_refused(command, capsys, "(images, channels, height, width: 1, 16, 1, 1)", "SOLVER.*IMS_PER_BATCH")
    without = [
        "MODEL.FPN.OUTPUT_NORM", "", "MODEL.RETINANET.NORM", "", "MODEL.RETINANET.NORM_AFFINE_PER_LEVEL", "False",
    ]  # fmt: skip
    assert main([*command, *without]) == 0
