"""``self-train --seeds`` through the public command: in one process, resumed, and as several processes."""

import json
import sys
from pathlib import Path

import pytest
from conftest import SMALL_MODEL, assert_refused, make_coco_set

from selftrain_d2.cli import jobs, main
from selftrain_d2.engine.loop import seeds
from selftrain_d2.engine.loop import stages as loop_stages


@pytest.fixture
def command(tmp_path):
    """Two seeds of a loop of one step a stage."""
    labeled = make_coco_set(tmp_path / "labeled", 3, seed=1)
    unlabeled = make_coco_set(tmp_path / "unlabeled", 3, seed=2)
    return [
        "self-train", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml", "--seeds", "0", "1",
        "--labeled-json", labeled.json_file, "--labeled-images", labeled.images,
        "--unlabeled-images", unlabeled.images,
        "--val-json", labeled.json_file, "--val-images", labeled.images,
        "--score-floor", "0.001", "--output", str(tmp_path / "output"),
        *SMALL_MODEL[:-2], "SOLVER.MAX_ITER", "1", "SELFTRAIN.SCORE_THRESH", "0.005",
    ]  # fmt: skip


@pytest.mark.slow
def test_stopped_in_the_second_seed_and_resumed(command, tmp_path, monkeypatch, capsys):
    output, train = tmp_path / "output", loop_stages.train

    def until_the_second_student(cfg, *arguments, **options):
        if cfg.OUTPUT_DIR.endswith("seed_1/student"):
            raise KeyboardInterrupt
        train(cfg, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop_stages, "train", until_the_second_student)
        assert main(command) == 130
    assert "1 of 2 seeds, about" in capsys.readouterr().out and not (output / "summary.json").exists()
    made = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.suffix in (".pth", ".parquet")}
    assert {p.relative_to(output).parts[:2] for p in made} >= {("seed_0", "student"), ("seed_1", "teacher")}

    assert main(command) == 0
    assert all(p.stat().st_mtime_ns == then for p, then in made.items())
    summary = json.loads((output / "summary.json").read_text())
    assert summary["seeds"] == [0, 1] and summary["runs"] == ["seed_0/summary.json", "seed_1/summary.json"]
    for seed in (0, 1):
        one = json.loads((output / f"seed_{seed}" / "summary.json").read_text())
        assert one["seed"] == seed and next(iter(one)) == "in_words"
        assert f"\nSEED: {seed}\n" in (output / f"seed_{seed}" / "student" / "config.yaml").read_text()
    printed = capsys.readouterr().out
    assert (output / "summary.md").read_text().strip() in printed
    assert "2 of 2 seeds, about 0 min to go" in printed

    # A folder is of one seed or of several.
    assert_refused(command[:3] + command[6:], capsys, "holds runs of several seeds: give --seeds")
    (tmp_path / "single" / "teacher").mkdir(parents=True)
    command[command.index("--output") + 1] = str(tmp_path / "single")
    assert_refused(command, capsys, "holds a run of one seed")


PROGRAM = """
import json, os, sys, time
words = sys.argv[1:]
assert words[:2] == ["self-train", "--one-seed"], words
seed, output = int(words[2]), words[words.index("--output") + 1]
print("threads", os.environ["OMP_NUM_THREADS"])
if seed == int(os.environ.get("FAULTY", -1)):
    print("selftrain-d2 self-train: error: it is bad")
    sys.exit(2)
open(os.path.join(output, f"running_{seed}"), "w").close()
end = time.monotonic() + 30
while seed < 2 and not all(os.path.exists(os.path.join(output, f"running_{i}")) for i in (0, 1)):
    assert time.monotonic() < end  # 0 and 1 run at the same time
    time.sleep(0.02)
values = {"student": 31.0 + seed, "control": 30.0 + seed}
stages = {name: {"metrics": {"bbox": {"AP": value}}, "seconds": 60.0} for name, value in values.items()}
stages["pseudo_labels"] = {"boxes": 4, "images": 2, "skipped": 0, "seconds": 60.0}
summary = {"task": "detection", "seed": seed, "score_thresh": 0.5, "stages": stages}
with open(os.path.join(output, f"seed_{seed}", "summary.json"), "w") as file:
    json.dump(summary, file)
"""


def test_two_at_a_time(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(jobs, "program_words", lambda _: [sys.executable, str(tmp_path / "program.py")])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command[5:6] = ["1", "2", "--jobs", "2"]
    assert main(command) == 0
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert summary["differences"]["student - control"]["by_seed"] == [1.0, 1.0, 1.0]
    assert "threads 1" in (tmp_path / "output" / "seed_2" / "log.txt").read_text()
    # Three stages of a minute a seed; with one of three done, two at a time need that once more.
    assert "1 of 3 seeds, about 3 min to go" in capsys.readouterr().out


def test_a_seed_that_fails_is_told_when_the_others_are_done(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(jobs, "program_words", lambda _: [sys.executable, str(tmp_path / "program.py")])
    monkeypatch.setenv("FAULTY", "3")
    command[4:6] = ["3", "2", "--jobs", "2"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "seed 3 ended with exit status 2" in error and error.strip().endswith("error: it is bad")
    assert (tmp_path / "output" / "seed_2" / "summary.json").exists()
    assert not (tmp_path / "output" / "summary.json").exists()


def _drawing(command, number="1"):
    """The command with a draw in place of the unlabeled images, which are those of validation."""
    command = list(command)
    place = command.index("--unlabeled-images")
    command[place : place + 2], images = ["--draw", number, "--oracle", "--control"], command[place + 1]
    command[command.index("--val-images") + 1] = images
    command[command.index("--val-json") + 1] = str(Path(images).with_name("labels.json"))
    return command


def test_each_seed_has_its_own_draw(command, tmp_path, monkeypatch):
    tasks = {}

    def noted(cfg, task, output, options):
        tasks[cfg.SEED] = task
        stages = {"student": {"metrics": {"bbox": {"AP": 1.0}}, "seconds": 60.0}}
        stages["pseudo_labels"] = {"boxes": 4, "images": 2, "skipped": 0, "seconds": 60.0}
        summary = {"task": "detection", "seed": cfg.SEED, "score_thresh": 0.5, "stages": stages}
        (output / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(seeds, "self_train", noted)
    command[5:6] = map(str, range(1, 6))
    assert main(_drawing(command)) == 0  # the checks of the first seed are made, also those of --oracle
    drawn = set()
    for seed, task in tasks.items():
        labeled = [image["file_name"] for image in json.loads(Path(task.labeled_json).read_text())["images"]]
        assert task.labeled_json == str(tmp_path / "output" / f"seed_{seed}" / "draw" / "labeled.json")
        assert sorted([*labeled, *task.unlabeled.file_names]) == ["001.png", "002.png", "003.png"]
        assert task.unlabeled_truth_json == task.labeled_json.replace("labeled.json", "unlabeled.json")
        drawn.add(tuple(labeled))
    assert len(tasks) == 6 and len(drawn) > 1 and all(len(labeled) == 1 for labeled in drawn)
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert summary["drawn"] == 1
    assert "a draw of its own of 1 labeled images" in (tmp_path / "output" / "summary.md").read_text()


@pytest.mark.slow
def test_a_drawn_loop_to_its_end(command, tmp_path):
    assert main(_drawing([*command[:5], *command[6:]])) == 0  # seed 0 alone
    summary = json.loads((tmp_path / "output" / "seed_0" / "summary.json").read_text())
    assert {"teacher", "pseudo_labels", "student", "control", "oracle"} <= summary["stages"].keys()
    assert summary["stages"]["pseudo_labels"]["images"] == 2 and "pseudo_label_quality" in summary


def _seeds_before_the_keys(command):
    keys = command.index("MODEL.DEVICE")
    return [*command[:3], *command[6:keys], "--seeds", "0", *command[keys:]]


def _without_draw(command):
    draw = command.index("--draw")
    return [*command[:draw], *command[draw + 2 :]]


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (_seeds_before_the_keys, "--seeds took MODEL.DEVICE for a seed"),
        (lambda c: [*c[:5], "0", *c[6:]], "--seeds names 0 twice"),
        (lambda c: [*c, "SEED", "3"], "leave one of the two out"),
        (lambda c: [*c[:3], "--jobs", "2", *c[6:]], "give --seeds"),
        (lambda c: [*c[:3], "--jobs", "0", *c[3:]], "--jobs must be at least 1"),
        (lambda c: [*c[:3], "--oracle", *c[3:]], "--oracle trains on the truth of the unlabeled images"),
        (lambda c: [*c[:3], "--draw", "1", *c[3:]], "leave --unlabeled-images out"),
        (lambda c: _drawing([*c[:3], *c[6:]]), "--draw draws labeled images for each of several seeds"),
        (lambda c: _drawing(c, "3"), "Of the 3 images of"),
        (lambda c: _without_draw(_drawing(c)), "--unlabeled-images is missing"),
    ],
)  # fmt: skip
def test_mistakes(command, tmp_path, capsys, change, fragment):
    assert_refused(change(command), capsys, fragment, output=tmp_path / "output")
