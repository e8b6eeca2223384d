"""The loop end to end, through the public command."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import SMALL_MODEL, make_coco_set

from selftrain_d2 import load_pseudo_labels
from selftrain_d2.cli import main

STEPS = ["SOLVER.MAX_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "1", "SELFTRAIN.SCORE_THRESH", "0.005"]


@pytest.fixture
def command(tmp_path):
    """The command line of a loop of three steps a stage, with its output folder."""
    labeled = make_coco_set(tmp_path / "labeled", 6, seed=1)
    unlabeled = make_coco_set(tmp_path / "unlabeled", 5, seed=2)
    validation = make_coco_set(tmp_path / "validation", 3, seed=3)
    (tmp_path / "unlabeled" / "images" / "broken.jpg").write_bytes(b"not an image")
    return [
        "self-train",
        "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml",
        "--labeled-json", labeled.json_file, "--labeled-images", labeled.images,
        "--unlabeled-images", unlabeled.images, "--unlabeled-truth-json", unlabeled.json_file,
        "--val-json", validation.json_file, "--val-images", validation.images,
        "--score-floor", "0.001", "--control", "--output", str(tmp_path / "output"),
        *SMALL_MODEL, *STEPS,
    ]  # fmt: skip


def test_the_loop(command, tmp_path, capsys):
    assert main(command) == 0
    output = tmp_path / "output"
    summary = json.loads((output / "summary.json").read_text())

    stages = summary["stages"]
    assert list(stages) == ["teacher", "pseudo_labels", "student", "control"]
    for name, pseudo_images in (("teacher", 0), ("student", 2), ("control", 0)):
        assert set(stages[name]["metrics"]["bbox"]) >= {"AP", "AP50", "AP75"}
        assert stages[name]["pseudo_images_per_step"] == pseudo_images
        assert os.path.exists(stages[name]["weights"]) and os.path.exists(stages[name]["config"])
    assert stages["pseudo_labels"]["images"] == 6 and stages["pseudo_labels"]["skipped"] == 1
    assert stages["pseudo_labels"]["boxes"] > 0
    assert len(summary["pseudo_label_quality"]) > 5
    for picture in ("contact_sheet.png", "precision_recall.png"):
        assert (output / picture).stat().st_size > 5000
    assert "| student |" in capsys.readouterr().out

    # The student's steps logged both losses; the teacher's had none to balance.
    student = [json.loads(line) for line in (output / "student" / "metrics.json").read_text().splitlines()]
    logged = {key for line in student for key in line}
    assert logged >= {
        "human_loss", "pseudo_loss", "human_loss_average", "pseudo_loss_average",
        "human_loss_weight", "pseudo_loss_weight", "total_loss",
    }  # fmt: skip
    assert "pseudo_loss" not in (output / "teacher" / "metrics.json").read_text()

    # Called again, nothing is redone, even if a config key is newer than the work.
    record = json.loads((output / "teacher" / "stage.json").read_text())
    del record["settings"]["INPUT.CLASSIFICATION_IMAGE_SIZE"]
    (output / "teacher" / "stage.json").write_text(json.dumps(record))
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.suffix in (".pth", ".parquet")}
    assert main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.suffix in (".pth", ".parquet")}

    # Other settings are refused, naming the key.
    assert main([*command, "SOLVER.BASE_LR", "0.5"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"teacher was begun with another SOLVER.BASE_LR: 0\.01 there, 0\.5 now", error), error


def test_label_and_evaluate_as_commands_of_their_own(command, tmp_path, capsys):
    """The teacher of the loop, by hand: `label` on a folder, `train --eval-only` on a COCO file."""
    command.remove("--control")
    assert main(command) == 0
    options = dict(zip(command[1::2], command[2::2]))
    weights = ["MODEL.WEIGHTS", str(tmp_path / "output" / "teacher" / "model_final.pth")]
    config = ["--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml"]

    images = ["--images", options["--unlabeled-images"], "--output", str(tmp_path / "labels")]
    assert main(["label", *config, *images, "--score-floor", "0.001", *SMALL_MODEL, *weights]) == 0
    ours, loops = tmp_path / "labels", tmp_path / "output" / "pseudo_labels"
    assert load_pseudo_labels(ours, 0.001) == load_pseudo_labels(loops, 0.001)
    assert json.loads((ours / "manifest.json").read_text())["thing_classes"] == ["red", "green"]

    capsys.readouterr()
    validation = ["--human-labels", "validation", options["--val-json"], options["--val-images"]]
    keys = ["DATASETS.TEST", "('validation',)", "OUTPUT_DIR", str(tmp_path / "evaluation")]
    assert main(["train", "--eval-only", *config, *validation, *SMALL_MODEL, *weights, *keys]) == 0
    expected = json.loads((tmp_path / "output" / "summary.json").read_text())["stages"]["teacher"]["metrics"]
    # detectron2 gives NaN where nothing was detected, which JSON has as null
    value = float("nan") if expected["bbox"]["AP50"] is None else expected["bbox"]["AP50"]
    assert f"AP50 {value:.2f}" in capsys.readouterr().out


def test_killed_and_started_again(command, tmp_path):
    """A loop killed while the student trains goes on, and the teacher is not trained again."""
    output = tmp_path / "output"
    command = [*command, "SELFTRAIN.STUDENT", "('SOLVER.MAX_ITER', 12)"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from selftrain_d2.cli import main; sys.exit(main())", *command],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (output / "student" / "last_checkpoint").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    teacher = (output / "teacher" / "model_final.pth").stat().st_mtime_ns
    assert not (output / "summary.json").exists()

    assert main(command) == 0
    assert (output / "teacher" / "model_final.pth").stat().st_mtime_ns == teacher
    assert (output / "summary.json").exists()
    log = (output / "student" / "log.txt").read_text()
    starts = [int(n) for n in re.findall(r"Starting training from iteration (\d+)", log)]
    assert starts[0] == 0 and starts[1] > 0


def test_two_rounds(command, tmp_path):
    command.remove("--control")
    assert main([*command[:1], "--rounds", "2", *command[1:]]) == 0
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert list(summary["stages"]) == [
        "teacher", "pseudo_labels", "student", "round_2/pseudo_labels", "round_2/student",
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "output" / "round_2" / "pseudo_labels" / "manifest.json").read_text())
    assert manifest["teacher_weights"] == summary["stages"]["student"]["weights"]


def _student_log(output):
    return (output / "student" / "log.txt").read_text()


def test_a_larger_student_from_random_weights_and_an_average_as_next_teacher(command, tmp_path):
    """Round 2 is labeled by the larger student's averaged weights, with the larger student's config."""
    command.remove("--control")
    student = "('MODEL.FPN.OUT_CHANNELS', 24, 'SELFTRAIN.WEIGHT_EMA_DECAY', 0.9)"
    options = ["SELFTRAIN.STUDENT", student, "SELFTRAIN.STUDENT_WEIGHTS", "random"]
    assert main([*command[:1], "--rounds", "2", *command[1:], *options]) == 0
    output = tmp_path / "output"
    summary = json.loads((output / "summary.json").read_text())
    average = os.path.join("student", "weight_average", "model_final.pth")
    assert summary["stages"]["student"]["weights"] == str(output / average)
    manifest = json.loads((output / "round_2" / "pseudo_labels" / "manifest.json").read_text())
    assert manifest["teacher_weights"] == str(output / average)
    weights = torch.load(output / average, weights_only=True)["model"]
    assert weights["backbone.fpn_output3.weight"].shape[0] == 24
    assert "No checkpoint found. Initializing model from scratch" in _student_log(output)


def test_a_larger_student_cannot_take_the_teachers_weights(command, tmp_path, capsys):
    command.remove("--control")
    options = ["SELFTRAIN.STUDENT", "('MODEL.EFFICIENTNET.NAME', 'efficientnet-b2')"]
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err
    assert "model_final.pth" in error and "of another shape" in error, error


def test_a_student_from_other_weights(command, tmp_path, capsys):
    command.remove("--control")
    assert main([*command, "SELFTRAIN.STUDENT_WEIGHTS", str(tmp_path / "missing.pth")]) == 2
    assert "missing.pth" in capsys.readouterr().err
    shutil.copy(tmp_path / "output" / "teacher" / "model_final.pth", tmp_path / "other.pth")
    assert main([*command, "SELFTRAIN.STUDENT_WEIGHTS", str(tmp_path / "other.pth")]) == 0
    assert "other.pth" in _student_log(tmp_path / "output")
