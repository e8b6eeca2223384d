"""The loop end to end, through the public command."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from typing import ClassVar

import cv2
import pytest
import torch
from conftest import SMALL_MODEL, assert_refused, make_coco_set
from detectron2.data import DatasetCatalog

from selftrain_d2 import InputError, SelfTrainingTrainer, load_pseudo_labels
from selftrain_d2.cli import main
from selftrain_d2.engine.loop import stage_record
from selftrain_d2.engine.loop import stages as loop_stages
from selftrain_d2.engine.loop.tasks import Detection
from selftrain_d2.folder_lock import FolderLock
from selftrain_d2.modeling.checkpoint import file_sha256

STEPS = ["SOLVER.MAX_ITER", "3", "SELFTRAIN.SCORE_THRESH", "0.005"]


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


def test_the_loop(command, tmp_path, monkeypatch, capsys):
    command = [*command[:1], "--oracle", *command[1:]]
    command += ["SELFTRAIN.REFINE_ITERS", "1", "SELFTRAIN.REFINE_LR_FACTOR", "0.5"]
    # Images that are labeled, or of validation, lie among the unlabeled ones.
    for part, number in (("labeled", 1), ("labeled", 2), ("validation", 1)):
        copy = f"{part}_{number}.png"
        shutil.copy(
            tmp_path / part / "images" / f"{number:03d}.png", tmp_path / "unlabeled" / "images" / copy
        )
    known, train = {}, loop_stages.train

    def note_datasets(cfg, datasets, **options):
        known[os.path.basename(cfg.OUTPUT_DIR)] = [name for name, *_ in datasets]
        assert "selftrain_oracle" not in DatasetCatalog
        train(cfg, datasets, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop_stages, "train", note_datasets)
        assert main(command) == 0
    output = tmp_path / "output"
    summary = json.loads((output / "summary.json").read_text())

    stages = summary["stages"]
    assert list(stages) == ["teacher", "pseudo_labels", "student", "control", "oracle"]
    # The truth is the oracle's alone, which in all else is the student.
    human = ["selftrain_labeled", "selftrain_validation"]
    assert known == {
        "teacher": human, "student": [*human, "selftrain_pseudo"], "control": human,
        "oracle": [*human, "selftrain_oracle"],
    }  # fmt: skip
    student, oracle = (
        json.loads((output / name / "stage.json").read_text())["settings"] for name in ("student", "oracle")
    )
    assert oracle.pop("unlabeled_truth_json_sha256")
    assert student.pop("DATASETS.PSEUDO_TRAIN") != oracle.pop("DATASETS.PSEUDO_TRAIN")
    assert oracle == student and "weights_sha256" in student
    assert all(
        "STAGE: 1\n" in (output / name / "config.yaml").read_text()
        for name in ("student", "control", "oracle")
    )
    page = (output / "summary.md").read_text().splitlines()
    assert page[2] == " ".join(summary["in_words"]) and summary["human_boxes_per_image"] > 0
    assert set(summary["selected_quality"]) == {"precision", "recall"}
    for name, pseudo_images in (("teacher", 0), ("student", 2), ("control", 0), ("oracle", 2)):
        assert set(stages[name]["metrics"]["bbox"]) >= {"AP", "AP50", "AP75"}
        assert stages[name]["pseudo_images_per_step"] == pseudo_images
        # The last step is on human labels alone, at half of BASE_LR, in the student and the control.
        assert stages[name]["refine_steps"] == (name != "teacher")
        rows = [json.loads(line) for line in (output / name / "metrics.json").read_text().splitlines()]
        last = max((row for row in rows if "lr" in row), key=lambda row: row["iteration"])
        # The teacher's cosine has 0.01 * (1 + cos(2 pi / 3)) / 2 there.
        rate = 0.0025 if name == "teacher" else 0.005
        assert (last["iteration"], last["lr"]) == (2, pytest.approx(rate))
        assert (
            stages[name]["weights"] == f"{name}/model_final.pth"
            and (output / stages[name]["weights"]).exists()
        )
        assert (output / stages[name]["config"]).exists()
    assert stages["pseudo_labels"]["images"] == 6 and stages["pseudo_labels"]["skipped"] == 1
    assert stages["pseudo_labels"]["left_out"] == {"labeled": 2, "of validation": 1}
    assert "(1 unreadable, 2 left out as labeled, 1 left out as of validation)" in "\n".join(page)
    assert stages["pseudo_labels"]["boxes"] > 0
    assert len(summary["pseudo_label_quality"]) > 5
    for picture in ("contact_sheet.png", "precision_recall.png"):
        assert (output / picture).stat().st_size > 5000
    assert "| student |" in capsys.readouterr().out
    assert (output / "summary.md").read_text().count("| 3 (the last 1 on human labels alone) | 2 + ") == 3

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

    # A truth that does not fit is refused before anything is done, other truth when the oracle is asked for.
    truth = tmp_path / "unlabeled" / "labels.json"
    content = truth.read_text()
    truth.write_text(content.replace('"iscrowd": 0', '"iscrowd": 0, "by": "another"'))
    assert main(command) == 2 and "another unlabeled_truth_json_sha256" in capsys.readouterr().err
    truth.write_text(content)

    # Other settings are refused, naming the key.
    assert main([*command, "SOLVER.BASE_LR", "0.5"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"teacher was begun with another SOLVER.BASE_LR: 0\.01 there, 0\.5 now", error), error

    # Moved, called from another folder, and on another device than it was trained on, it is still finished.
    names = {p.relative_to(output) for p in before}
    shutil.move(output, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for config in (tmp_path / "moved").glob("*/config.yaml"):
        text = config.read_text()
        assert "DEVICE: cpu" in text and "NUM_WORKERS: 0" in text
        config.write_text(
            text.replace("DEVICE: cpu", "DEVICE: cuda:7").replace("NUM_WORKERS: 0", "NUM_WORKERS: 9")
        )
    command[command.index("--output") + 1] = "moved"
    assert main(command) == 0
    assert names == {
        p.relative_to(tmp_path / "moved")
        for p in (tmp_path / "moved").rglob("*")
        if p.suffix in (".pth", ".parquet")
    }
    assert {p.stat().st_mtime_ns for p in (tmp_path / "moved").rglob("*.pth")} <= set(before.values())


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


def test_images_of_archives_and_folders_together(command, tmp_path):
    command.remove("--control")
    for argument in ("--unlabeled-truth-json", "--val-json", "--val-images"):
        del command[command.index(argument) : command.index(argument) + 2]
    images = tmp_path / "unlabeled" / "images"
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:
        for number in (1, 2):
            archive.add(images / f"{number:03d}.png", f"{number:03d}.png")
            (images / f"{number:03d}.png").unlink()
    # The labeled images lie there as well.
    place = command.index("--unlabeled-images")
    command[place + 1 : place + 2] = [
        str(tmp_path / name) for name in ("shard-0.tar", "unlabeled", "labeled")
    ]
    assert main(command) == 0
    output = tmp_path / "output"
    stage = json.loads((output / "summary.json").read_text())["stages"]["pseudo_labels"]
    assert (stage["images"], stage["skipped"], stage["left_out"]) == (6, 1, {"labeled": 6})
    names = {d["image_id"] for d in load_pseudo_labels(output / "pseudo_labels", 0.001)}
    assert names == {f"shard-0.tar/00{n}.png" for n in (1, 2)} | {
        f"unlabeled/images/00{n}.png" for n in (3, 4, 5)
    }


def test_killed_and_started_again(command, tmp_path):
    """A loop killed while the student trains goes on, and the teacher is not trained again."""
    output = tmp_path / "output"
    command = [
        *command, "SELFTRAIN.STUDENT", "('SOLVER.MAX_ITER', 12, 'SOLVER.CHECKPOINT_PERIOD', 1)",
        "SELFTRAIN.TEACHER_CHECKPOINT", "best", "TEST.BEST_METRIC", "validation/loss",
        "TEST.VALIDATION_LOSS", "True", "TEST.EVAL_PERIOD", "2",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from selftrain_d2.cli import main; sys.exit(main())", *command],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
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

    # The teacher with the lowest validation loss labeled, and is the student's start.
    stages = json.loads((output / "summary.json").read_text())["stages"]
    assert stages["teacher"]["weights"] == "teacher/best/model_best.pth"
    assert stages["teacher"]["best"]["steps"] in (2, 3)
    best = file_sha256(output / stages["teacher"]["weights"])
    manifest = json.loads((output / "pseudo_labels" / "manifest.json").read_text())
    assert manifest["teacher_weights_sha256"] == best
    settings = json.loads((output / "student" / "stage.json").read_text())["settings"]
    assert settings["weights_sha256"] == best and settings["TEST.EVAL_PERIOD"] == 2
    assert "`teacher`: the best weights by validation/loss (" in (output / "summary.md").read_text()


def test_a_worse_second_round_is_not_made_unless_asked_for(command, tmp_path, monkeypatch, capsys):
    command.remove("--control")
    judged, labels = [], []

    def judge(self, folder):
        labels.append(os.path.relpath(folder, tmp_path / "output"))
        assert len(load_pseudo_labels(folder, 0.001)) == 6  # the labeled images
        return judged[len(labels) - 1]

    monkeypatch.setattr(Detection, "judge_on_labeled", judge)
    command = [*command[:1], "--rounds", "2", *command[1:]]
    judged[:] = [61.2, 60.7]
    assert main(command) == 0
    output = tmp_path / "output"
    assert labels == ["labels_of_labeled", "round_2/labels_of_labeled"]
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary["stages"]) == ["teacher", "pseudo_labels", "student"]
    sentence = (
        "The teacher of round 2 labels the labeled images worse than that of round 1 (AP 60.7 after 61.2)"
    )
    assert summary["stopped"].startswith(sentence) and "--keep-going" in summary["stopped"]
    assert summary["labels_of_labeled"] == {"metric": "AP", "by_round": [61.2, 60.7]}
    assert summary["stopped"] in (page := capsys.readouterr().out) and "round 1 61.2, round 2 60.7" in page
    assert not (output / "round_2" / "pseudo_labels").exists()

    labels.clear()
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.suffix in (".pth", ".parquet")}
    assert main([*command[:1], "--keep-going", *command[1:]]) == 0
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())
    assert "stopped" not in json.loads((output / "summary.json").read_text())
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary["stages"])[-1] == "round_2/student"


def test_two_rounds(command, tmp_path):
    """With thresholds by people's counts, for each round's labels anew."""
    command.remove("--control")
    rounds = ["--rounds", "2", "--keep-going"]
    assert main([*command[:1], *rounds, *command[1:], "SELFTRAIN.THRESHOLDS", "counts"]) == 0
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert list(summary["stages"]) == [
        "teacher", "pseudo_labels", "student", "round_2/pseudo_labels", "round_2/student",
    ]  # fmt: skip
    human = json.loads((tmp_path / "labeled" / "labels.json").read_text())
    for stage in ("pseudo_labels", "round_2/pseudo_labels"):
        labels = summary["stages"][stage]
        counts, selection = labels["thresholds_by_counts"], labels["selection"]
        assert (counts["human_images"], counts["pseudo_images"]) == (6, 5)  # one of 6 cannot be read
        assert sum(row["human_boxes"] for row in counts["classes"]) == len(human["annotations"])
        assert selection["score_thresh"] == {r["category"]: r["score_thresh"] for r in counts["classes"]}
        trained = load_pseudo_labels(tmp_path / "output" / stage, **selection)
        assert labels["boxes"] == trained.box_counts.sum() == counts["all_classes"]["boxes"]
        # Scores seldom tie: what is left is people's count to the nearest box.
        assert labels["boxes"] == pytest.approx(len(human["annotations"]) / 6 * 5, abs=1)
    page = (tmp_path / "output" / "summary.md").read_text()
    assert page.count("Thresholds by people's counts on 6 labeled images, for 5 pseudo-labeled ones:") == 2
    assert "boxes of a score that as many an image as people drew have on" in page
    assert "score thresholds by people's counts" in _student_log(tmp_path / "output")
    manifest = json.loads((tmp_path / "output" / "round_2" / "pseudo_labels" / "manifest.json").read_text())
    assert manifest["teacher_weights"] == str(tmp_path / "output" / summary["stages"]["student"]["weights"])


def _student_log(output):
    return (output / "student" / "log.txt").read_text()


def test_a_larger_student_from_random_weights_and_an_average_as_next_teacher(command, tmp_path):
    """Round 2 is labeled by the larger student's averaged weights, with the larger student's config."""
    command.remove("--control")
    student = "('MODEL.FPN.OUT_CHANNELS', 24, 'SELFTRAIN.WEIGHT_EMA_DECAY', 0.9)"
    options = ["SELFTRAIN.STUDENT", student, "SELFTRAIN.STUDENT_WEIGHTS", "random"]
    assert main([*command[:1], "--rounds", "2", "--keep-going", *command[1:], *options]) == 0
    output = tmp_path / "output"
    summary = json.loads((output / "summary.json").read_text())
    average = os.path.join("student", "weight_average", "model_final.pth")
    assert summary["stages"]["student"]["weights"] == average
    manifest = json.loads((output / "round_2" / "pseudo_labels" / "manifest.json").read_text())
    assert manifest["teacher_weights"] == str(output / average)
    weights = torch.load(output / average, weights_only=True)["model"]
    assert weights["backbone.fpn_output3.weight"].shape[0] == 24
    assert "No checkpoint found. Initializing model from scratch" in _student_log(output)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["SELFTRAIN.STUDENT", "('MODEL.EFFICIENTNET.NAME', 'efficientnet-b2')"],
            ["model_final.pth", "of another shape"],
        ),
        (
            ["SELFTRAIN.STUDENT_WEIGHTS", "missing.pth"],
            ["SELFTRAIN.STUDENT_WEIGHTS: missing.pth does not exist"],
        ),
        (["SELFTRAIN.STUDENT", "('MODEL.MASK_ON', True)"], ["MODEL.MASK_ON", "its teacher makes none"]),
        (["MODEL.MASK_ON", "True"], ["INPUT.MASK_FORMAT of the student is polygon", "SELFTRAIN.STUDENT"]),
        (["SELFTRAIN.STUDENT", "('SOLVER.WARMUP_ITERS', 3)"], ["SOLVER.WARMUP_ITERS is 3"]),
        (["SELFTRAIN.SCORE_THRESH_BY_CLASS", "('blue', 0.5)"], ["no class 'blue'"]),
        (["SELFTRAIN.SCORE_THRESH", "0.0001"], ["The score threshold 0.0001"]),
        (["SELFTRAIN.IGNORE_SCORE_THRESH", "0.4"], ["from a score of 0.4 on are to be ignored"]),
    ],
)
def test_mistakes_in_later_stages_are_told_before_the_first(command, tmp_path, capsys, options, words):
    for part in ("labeled", "unlabeled", "validation"):
        labels = tmp_path / part / "labels.json"
        coco = json.loads(labels.read_text())
        for annotation in coco["annotations"]:
            x, y, width, height = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        labels.write_text(json.dumps(coco))
    assert_refused([*command, *options], capsys, *words, output=tmp_path / "output")


def test_a_score_floor_that_is_none_is_told_before_the_teacher_is_trained(command, tmp_path, capsys):
    command[command.index("--score-floor") + 1] = "1"
    assert_refused(command, capsys, "score floor must be in", output=tmp_path / "output")


def _cut_short(file):
    os.truncate(file, file.stat().st_size // 2)  # the header with the size is whole


def _halve(file):
    cv2.imwrite(str(file), cv2.imread(str(file))[::2])


@pytest.mark.parametrize("part", ["labeled", "validation"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.write_bytes(b"no image"), "cannot be read"),
        (_cut_short, "cannot be read"),
        (_halve, "is 96 x 48 pixels, but its annotations say 96 x 96"),
    ],
)
def test_faulty_images_are_told_before_any_work(command, tmp_path, capsys, part, spoil, words):
    file = tmp_path / part / "images" / "002.png"
    spoil(file)
    assert_refused(command, capsys, str(file), words, output=tmp_path / "output")


def test_a_teacher_is_kept_when_its_evaluation_meets_a_mistake(command, tmp_path, monkeypatch, capsys):
    """A validation image lost after all steps: nothing else is, and nothing is redone."""
    output, image = tmp_path / "output", tmp_path / "validation" / "images" / "002.png"
    whole, test = image.read_bytes(), SelfTrainingTrainer.test

    def lose_it(*arguments):
        image.write_bytes(b"")
        return test(*arguments)

    command = [*command, "SELFTRAIN.SCORE_THRESH", "1.0"]  # no label has it: the loop ends after labeling
    with monkeypatch.context() as patch:
        patch.setattr(SelfTrainingTrainer, "test", staticmethod(lose_it))
        assert_refused(command, capsys, str(image), "cannot be read")
    trained = {file: file.stat().st_mtime_ns for file in (output / "teacher").glob("*.pth")}
    assert output / "teacher" / "model_final.pth" in trained
    image.write_bytes(whole)
    assert_refused(command, capsys, "No pseudo label")
    assert {file: file.stat().st_mtime_ns for file in (output / "teacher").glob("*.pth")} == trained
    assert json.loads((output / "teacher" / "stage.json").read_text())["result"]["metrics"]["bbox"]


@pytest.fixture
def stops(monkeypatch):
    """Training that leaves checkpoints and ends as told; ``calls`` are the learning rates it was called with."""

    class Stops:
        checkpoints: ClassVar = ()
        error = None

        def __call__(self, cfg, *arguments, **options):
            self.calls.append(cfg.SOLVER.BASE_LR)
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
            for name in self.checkpoints:
                open(os.path.join(cfg.OUTPUT_DIR, name), "w").close()
            raise self.error

    stops = Stops()
    stops.calls = []
    monkeypatch.setattr(loop_stages, "train", stops)
    return stops


def test_corrected_settings_go_on(command, tmp_path, stops, capsys):
    teacher = tmp_path / "output" / "teacher"
    stops.error = KeyboardInterrupt()
    assert main(command) == 130
    # Before the first checkpoint nothing is spoiled by other settings.
    assert main([*command, "SOLVER.BASE_LR", "0.02"]) == 130
    stops.checkpoints = ["model_0000000.pth"]
    assert main([*command, "SOLVER.BASE_LR", "0.03"]) == 130
    capsys.readouterr()
    # Work that was stopped, not wrong, has settled its settings.
    stops.checkpoints, stops.error = (), InputError("a mistake")
    assert_refused(
        [*command, "SOLVER.BASE_LR", "0.04"], capsys, "another SOLVER.BASE_LR: 0.03 there, 0.04 now"
    )
    assert_refused([*command, "SOLVER.BASE_LR", "0.03"], capsys, "a mistake")
    # A mistake may be corrected; nothing was deleted, and what began the work cannot be corrected any more.
    (tmp_path / "other.pth").write_bytes(b"")
    weights = ["MODEL.WEIGHTS", str(tmp_path / "other.pth")]
    assert_refused([*command, "SOLVER.BASE_LR", "0.05", *weights], capsys, "another weights_sha256")
    assert main([*command, "SOLVER.BASE_LR", "0.05"]) == 2
    assert "corrected settings (SOLVER.BASE_LR 0.03 -> 0.05)" in capsys.readouterr().out
    assert stops.calls == [0.01, 0.02, 0.03, 0.03, 0.05] and (teacher / "model_0000000.pth").exists()
    assert json.loads((teacher / "stage.json").read_text())["settings"]["SOLVER.BASE_LR"] == 0.05


def test_a_record_that_a_full_disk_does_not_take_hides_no_mistake(
    command, tmp_path, stops, monkeypatch, capsys
):
    stops.error = InputError("the disk is full")
    write_json, written = stage_record.write_json, []

    def once(file, content):
        if written:
            raise InputError("the record cannot be written")
        written.append(file)
        write_json(file, content)

    monkeypatch.setattr(stage_record, "write_json", once)
    assert_refused(command, capsys, "the disk is full")


def test_one_loop_at_a_time(command, tmp_path, capsys):
    output = tmp_path / "output"
    output.mkdir()
    with contextlib.closing(FolderLock(output)):
        assert_refused(command, capsys, "is being written by process")


def test_a_student_from_other_weights(command, tmp_path):
    command.remove("--control")
    teacher = [*command, "SELFTRAIN.SCORE_THRESH", "1.0"]
    assert main(teacher) == 2  # no pseudo label: it ends with the teacher
    shutil.copy(tmp_path / "output" / "teacher" / "model_final.pth", tmp_path / "other.pth")
    assert main([*command, "SELFTRAIN.STUDENT_WEIGHTS", str(tmp_path / "other.pth")]) == 0
    assert "other.pth" in _student_log(tmp_path / "output")


def test_the_loop_with_a_teacher_that_keeps_learning(command, tmp_path, capsys):
    command = [*command[:1], "--oracle", "--teacher", "moving-average", *command[1:]]
    command += ["SELFTRAIN.TEACHER_CHECK_PERIOD", "2"]
    assert main(command) == 0
    output = tmp_path / "output"
    summary = json.loads((output / "summary.json").read_text())
    assert summary["teacher"] == "moving_average"
    assert list(summary["stages"]) == ["teacher", "student", "pseudo_labels", "control", "oracle"]
    settings = {
        name: json.loads((output / name / "stage.json").read_text())["settings"]
        for name in ("student", "control", "oracle")
    }
    assert settings["student"]["SELFTRAIN.TEACHER"] == "moving_average"
    assert settings["oracle"]["SELFTRAIN.TEACHER"] == "labels"
    assert len({s["weights_sha256"] for s in settings.values()}) == 1
    # What is judged is what the average finds at the end.
    manifest = json.loads((output / "pseudo_labels" / "manifest.json").read_text())
    assert manifest["teacher_weights_sha256"] == file_sha256(
        output / "student/moving_teacher/model_final.pth"
    )
    assert len(summary["pseudo_label_quality"]) > 5
    page = (output / "summary.md").read_text()
    assert "at the end of training" in page
    rows = [json.loads(line) for line in (output / "student" / "metrics.json").read_text().splitlines()]
    assert any("pseudo_loss" in row for row in rows) and any("teacher_agreement" in row for row in rows)

    before = {p: p.stat().st_mtime_ns for p in output.rglob("*.pth")}
    assert main(command) == 0  # nothing is redone
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("*.pth")}
    assert_refused([*command[:1], "--rounds", "2", *command[1:]], capsys, "leave --rounds out")
