"""Grids of small programs: what runs, in which order, what is kept, and what happens when something dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import SMALL_MODEL, make_coco_set

from selftrain_d2.cli import main
from selftrain_d2.experiments.grid import local_runner
from selftrain_d2.experiments.grid.cell_record import collect_results, log_tail, read_record
from selftrain_d2.experiments.grid.runner import locked

# Does what its words say, in their order, and writes in a diary when it starts and ends.
PROGRAM = """
import json, os, signal, sys, time

def note(event):
    with open(os.environ["DIARY"], "a") as diary:
        diary.write(f"{event} {os.path.dirname(output)}\\n")

def exists(path):
    return os.path.exists(os.path.join(os.environ["BOARD"], path))

output, *words = sys.argv[1:]
os.makedirs(output, exist_ok=True)
note("start")
for word in words:
    action, _, value = word.partition(":")
    if action == "say":
        print(value, flush=True)
    elif action == "sleep":
        time.sleep(float(value))
    elif action == "post":
        open(os.path.join(os.environ["BOARD"], value), "w").close()
    elif action == "await":
        end = time.time() + 20
        while not exists(value) and time.time() < end:
            time.sleep(0.01)
        assert exists(value), f"nobody posted {value}"
    elif action == "unless":  # the rest only if nobody posted it
        if exists(value):
            break
    elif action == "signal":
        os.kill(os.getpid(), getattr(signal, value))
    elif action == "exit":
        sys.exit(int(value))
    elif action == "stubborn":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif action == "pid":
        with open(os.path.join(output, "pid"), "w") as file:
            file.write(str(os.getpid()))
        os.replace(os.path.join(output, "pid"), os.path.join(os.environ["BOARD"], "pid"))
    elif action == "environment":
        with open(os.path.join(output, "environment.json"), "w") as file:
            json.dump(dict(os.environ), file)
    elif action == "ap":
        with open(os.path.join(output, "results.json"), "w") as file:
            json.dump({"bbox": {"AP": float(value)}}, file)
    else:
        sys.exit(f"what is {word}?")
note("end")
"""


class Desk:
    """A grid file, its folder, and the diary of its programs."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder = folder
        self.output = folder / "runs"
        self.diary = folder / "diary.txt"
        self.board = folder / "board"
        self.board.mkdir()
        self.program = folder / "program.py"
        self.program.write_text(PROGRAM)
        monkeypatch.setenv("DIARY", str(self.diary))
        monkeypatch.setenv("BOARD", str(self.board))

    def write(self, steps, **content):
        content = {"program": [sys.executable, "-S", str(self.program)], "steps": steps, **content}
        (self.folder / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def arguments(self, *options):
        return ["grid", str(self.folder / "grid.yaml"), "--output", str(self.output), *options]

    def run(self, *options):
        """The exit status of the command, in this process."""
        try:
            return main(self.arguments(*options))
        except SystemExit as stop:
            return stop.code

    def record(self, cell):
        return read_record(self.output / cell)

    def events(self):
        """Pairs of event and cell."""
        lines = self.diary.read_text().splitlines() if self.diary.exists() else []
        pairs = (line.split(" ", 1) for line in lines)
        return [(event, Path(path).relative_to(self.output).as_posix()) for event, path in pairs]

    def starts(self):
        return [cell for event, cell in self.events() if event == "start"]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return Desk(tmp_path, monkeypatch)


FAMILY = {
    "teacher": {"axes": ["seed"], "command": "{output} say:hello ap:10.5"},
    "student": {"axes": ["seed", "alpha"], "command": "{output} ap:2{seed}.{alpha} say:from={teacher}"},
}
AXES = {"seed": [0, 1], "alpha": [3, 5]}


def test_every_cell_once_and_after_what_it_needs(desk):
    desk.write(FAMILY, axes=AXES)
    assert desk.run() == 0
    # One at a time: each start is followed by its own end.
    events = desk.events()
    assert [event for event, _ in events] == ["start", "end"] * 6
    order = desk.starts()
    assert len(set(order)) == 6
    for seed in (0, 1):
        for alpha in (3, 5):
            student = f"student/seed={seed},alpha={alpha}"
            assert order.index(f"teacher/seed={seed}") < order.index(student)
            assert (
                f"from={desk.output}/teacher/seed={seed}/output"
                in (desk.output / student / "log.txt").read_text()
            )
    record = desk.record("student/seed=1,alpha=5")
    assert record["status"] == "finished" and record["metrics"] == {"bbox/AP": 21.5}
    assert record["axes"] == {"seed": 1, "alpha": 5} and record["exit_status"] == 0
    assert record["run"][0] == sys.executable and record["run"][4] == "ap:21.5" and record["seconds"] > 0
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    if revision.returncode == 0:
        assert record["git_revision"] == revision.stdout.strip() and record["git_dirty"] in (True, False)

    # Again: nothing is left to do, and nothing is touched.
    before = {file: file.stat().st_mtime_ns for file in desk.output.rglob("*.json")}
    assert desk.run() == 0
    assert desk.events() == events
    assert {file: file.stat().st_mtime_ns for file in desk.output.rglob("*.json")} == before

    # Another seed: only what is new runs.
    desk.write(FAMILY, axes={**AXES, "seed": [0, 1, 2]})
    assert desk.run() == 0
    assert sorted(set(desk.starts()) - set(order)) == sorted(desk.starts()[6:])
    assert len(desk.starts()) == 9


def test_jobs_run_side_by_side_but_not_more_than_asked(desk):
    # Each of a pair waits for the other: alone it would fail.
    meet = {"axes": ["side", "pair"], "command": "{output} {side} sleep:0.1"}
    axes = {
        "pair": [1, 2],
        "side": {"left": ["post:left", "await:right"], "right": ["post:right", "await:left"]},
    }
    desk.write({"meet": meet}, axes=axes)
    assert desk.run("--jobs", "2") == 0
    at_once = most = 0
    for event, _ in desk.events():
        at_once += 1 if event == "start" else -1
        most = max(most, at_once)
    assert most == 2


def test_devices_and_threads(desk, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    side = {"left": ["post:left", "await:right"], "right": ["post:right", "await:left"]}
    desk.write({"a": {"axes": ["side"], "command": "{output} {side} environment"}}, axes={"side": side})

    def environments():
        files = sorted(desk.output.rglob("environment.json"))
        return [json.loads(file.read_text()) for file in files]

    assert desk.run("--devices", "4,7") == 0  # two devices: two jobs
    assert sorted(e["CUDA_VISIBLE_DEVICES"] for e in environments()) == ["4", "7"]
    assert {e["OMP_NUM_THREADS"] for e in environments()} == {"4"}
    assert {e["OMP_WAIT_POLICY"] for e in environments()} == {"PASSIVE"}

    desk.output = desk.folder / "cpu"
    assert desk.run("--devices", "cpu", "--jobs", "4") == 0
    assert {e["CUDA_VISIBLE_DEVICES"] for e in environments()} == {""}
    assert {e["OMP_NUM_THREADS"] for e in environments()} == {"2"}

    desk.output = desk.folder / "own"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own choice stays
    assert desk.run("--jobs", "2") == 0
    assert {e["OMP_NUM_THREADS"] for e in environments()} == {"3"}
    assert "CUDA_VISIBLE_DEVICES" not in environments()[0]


def test_failures_are_kept_and_not_tried_again(desk, capsys):
    steps = {
        "teacher": {"axes": ["seed"], "command": "{output} say:one say:two unless:fixed-{seed} exit:{seed}"},
        "student": {"axes": ["seed"], "command": "{output} say:{teacher} ap:1"},
    }
    desk.write(steps, axes={"seed": [0, 3]})
    assert desk.run() == 1
    printed = capsys.readouterr().out
    assert "teacher/seed=3: failed" in printed and "(exit status 3): two" in printed
    record = desk.record("teacher/seed=3")
    assert record["status"] == "failed" and record["exit_status"] == 3
    assert record["log_tail"][-2:] == ["one", "two"] and "metrics" not in record
    # The other branch went on; what needs the failed one did not start.
    assert desk.record("student/seed=0")["status"] == "finished"
    assert desk.record("student/seed=3") is None

    assert desk.run() == 1
    assert desk.starts().count("teacher/seed=3") == 1
    assert "teacher/seed=3: not run (failed); --retry-failed" in capsys.readouterr().out
    (desk.board / "fixed-3").touch()
    assert desk.run("--retry-failed") == 0
    assert desk.record("teacher/seed=3")["status"] == "finished"
    assert "log_tail" not in desk.record("teacher/seed=3") and desk.record("teacher/seed=3")["starts"] == 2
    assert desk.record("student/seed=3")["status"] == "finished"
    assert len(desk.starts()) == 5


def test_a_failed_cell_goes_on_with_a_corrected_command(desk, capsys):
    steps = {"teacher": {"command": "{output} pid exit:2"}}
    desk.write(steps)
    assert desk.run() == 1
    (desk.output / "teacher" / "all" / "output" / "model_0000099.pth").write_text("hours of work")
    desk.write({"teacher": {"command": "{output} ap:7"}})
    assert desk.run() == 2
    assert "'pid' there, 'ap:7' now; run the corrected command with --retry-failed" in capsys.readouterr().err
    assert desk.run("--retry-failed") == 0
    record = desk.record("teacher/all")
    assert record["command"] == ["{DIR}/teacher/all/output", "ap:7"] and record["metrics"] == {"bbox/AP": 7.0}
    assert (desk.output / "teacher" / "all" / "output" / "model_0000099.pth").exists()
    # A finished cell is what its command made.
    desk.write(steps)
    assert desk.run("--retry-failed") == 2


def test_killed_cells_are_interrupted_and_go_on(desk, capsys):
    steps = {
        "teacher": {"axes": ["name"], "command": "{output} unless:later signal:{name} ap:7"},
        "student": {"axes": ["name"], "command": "{output} say:{teacher}"},
    }
    desk.write(steps, axes={"name": ["SIGKILL", "SIGTERM", "SIGSEGV"]})
    assert desk.run() == 1
    assert [desk.record(f"teacher/name={name}")["status"] for name in ("SIGKILL", "SIGTERM", "SIGSEGV")] == [
        "interrupted",
        "interrupted",
        "failed",  # a crash
    ]
    assert "(signal SIGKILL)" in capsys.readouterr().out
    assert len(desk.starts()) == 3  # not tried again by itself; no student
    (desk.board / "later").touch()
    assert desk.run() == 1
    assert len(desk.starts()) == 3 + 2 + 2
    assert desk.record("student/name=SIGTERM")["status"] == "finished"
    assert desk.record("teacher/name=SIGTERM")["starts"] == 2
    assert desk.record("teacher/name=SIGSEGV")["starts"] == 1


def test_a_cell_whose_folder_is_deleted_under_it(desk, capsys):
    desk.write({"one": {"axes": [], "command": "{output} post:begun await:deleted"}})

    def delete():
        while not (desk.board / "begun").exists():
            time.sleep(0.01)
        shutil.rmtree(desk.output / "one")
        (desk.board / "deleted").touch()

    thread = threading.Thread(target=delete)
    thread.start()
    assert desk.run() == 2
    thread.join()
    assert f"{desk.output / 'one/all/cell.json'} is gone" in capsys.readouterr().err
    desk.write({"one": {"axes": [], "command": "{output} post:begun await:deleted"}})
    assert desk.run() == 0 and desk.record("one/all")["status"] == "finished"


def test_a_program_that_does_not_exist_is_a_failure(desk):
    desk.write({"a": {"command": "x"}}, program=["/no/such/program"])
    assert desk.run() == 1
    record = desk.record("a/all")
    assert record["status"] == "failed" and record["exit_status"] == 127
    assert "/no/such/program" in record["log_tail"][-1]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "temper"), [(signal.SIGINT, ""), (signal.SIGTERM, ""), (signal.SIGINT, "stubborn")]
)
def test_stopping_the_runner_stops_its_cells(desk, monkeypatch, capsys, number, temper):
    # A cell that stops by itself may take a while on a busy machine.
    monkeypatch.setattr(local_runner, "GRACE_SECONDS", 0.3 if temper else 15)
    desk.write(
        {"a": {"command": f"{{output}} {temper} pid unless:later sleep:60"}, "b": {"command": "{output}"}}
    )

    def b_is_finished():
        record = desk.record("b/all")
        return record is not None and record["status"] == "finished"

    def stop():
        wait_for((desk.board / "pid").exists)
        wait_for(b_is_finished)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    handler = signal.getsignal(signal.SIGTERM)
    assert desk.run("--jobs", "2") == 130
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert "the same command goes on" in capsys.readouterr().err
    assert not is_alive(int((desk.board / "pid").read_text()))
    record = desk.record("a/all")
    assert record["status"] == "interrupted"
    assert (record["exit_status"] == -signal.SIGKILL) == bool(temper)
    (desk.board / "later").touch()
    assert desk.run() == 0
    assert desk.record("a/all")["starts"] == 2
    assert desk.starts().count("b/all") == 1


def test_a_killed_runner_leaves_no_two_cells_in_one_folder(desk, capsys):
    desk.write({"a": {"command": "{output} stubborn pid unless:later sleep:120"}})
    runner = subprocess.Popen(
        [sys.executable, "-m", "selftrain_d2.cli", *desk.arguments()], stdout=subprocess.DEVNULL
    )
    wait_for((desk.board / "pid").exists, 60)
    pid = int((desk.board / "pid").read_text())
    try:
        runner.kill()
        runner.wait()
        assert is_alive(pid) and desk.record("a/all")["status"] == "running"
        # What it started is still at work there.
        assert desk.run() == 2
        assert "is in use" in capsys.readouterr().err
        assert desk.run("--dry-run") == 0  # looking is allowed
        assert "a/all (goes on)" in capsys.readouterr().out
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(pid))
    (desk.board / "later").touch()
    assert desk.run() == 0
    assert desk.record("a/all")["status"] == "finished" and desk.record("a/all")["starts"] == 2


def test_a_second_runner_is_refused(desk, capsys):
    desk.write(FAMILY, axes=AXES)
    with locked(desk.output):
        assert desk.run() == 2
    assert f"{desk.output} is in use" in capsys.readouterr().err
    assert desk.starts() == []
    assert desk.run() == 0


def test_dry_run_prints_a_script_that_does_the_same(desk, capsys):
    desk.write(FAMILY, axes=AXES, title="A family")
    assert desk.run("--dry-run", "--devices", "cpu") == 0
    script = capsys.readouterr().out
    assert not desk.output.exists()
    assert "# A family: 6 cells to run" in script and "an unknown time, 1 at a time" in script
    subprocess.run(["bash", "-eu", "-c", script], check=True, stdout=subprocess.DEVNULL)
    by_script = desk.starts()
    results = {file: file.read_text() for file in desk.output.rglob("results.json")}
    assert len(by_script) == len(results) == 6
    desk.diary.unlink()
    assert desk.run() == 0
    assert desk.starts() == by_script
    assert {file: file.read_text() for file in desk.output.rglob("results.json")} == results
    capsys.readouterr()
    assert desk.run("--dry-run") == 0
    assert ": 0 cells to run" in capsys.readouterr().out


def test_estimate(desk, capsys):
    steps = {
        "teacher": {"axes": ["seed"], "command": "{output}", "seconds": 3600},
        "student": {"axes": ["seed"], "command": "{output} say:{teacher}", "seconds": 7200},
    }
    desk.write(steps, axes={"seed": [0, 1]})
    for jobs, said in ((1, "about 6.0 h"), (2, "about 3.0 h")):
        desk.run("--dry-run", "--jobs", str(jobs))
        assert said in capsys.readouterr().out
    # A finished cell knows better.
    assert desk.run("--only", "seed=0") == 0
    for step, seconds in (("teacher", 600.0), ("student", 1800.0)):
        file = desk.output / step / "seed=0" / "cell.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": seconds}))
    capsys.readouterr()
    desk.run("--dry-run")
    printed = capsys.readouterr().out
    assert "about 40 min" in printed and "# student/seed=1" in printed and "seed=0\n" not in printed


def test_only_and_set(desk):
    desk.write(FAMILY, axes=AXES, values={"unused": 1})
    assert desk.run("--only", "seed=1", "--only", "alpha=3,5", "--set", "unused=2") == 0
    assert sorted(desk.starts()) == ["student/seed=1,alpha=3", "student/seed=1,alpha=5", "teacher/seed=1"]
    assert yaml.safe_load((desk.output / "grid.yaml").read_text())["values"] == {"unused": "2"}


def test_other_commands_in_the_same_folder_are_refused(desk, capsys):
    desk.write(FAMILY, axes=AXES)
    assert desk.run() == 0
    desk.write(
        {**FAMILY, "student": {**FAMILY["student"], "command": "{output} ap:9 say:from={teacher}"}}, axes=AXES
    )
    assert desk.run() == 2
    error = capsys.readouterr().err
    assert "'ap:20.3' there, 'ap:9' now" in error and "student/seed=0,alpha=3" in error
    assert len(desk.starts()) == 6


def test_cells_whose_source_was_made_anew_are_refused(desk, capsys):
    desk.write(FAMILY, axes=AXES)
    assert desk.run() == 0
    file = desk.output / "teacher" / "seed=1" / "cell.json"
    record = json.loads(file.read_text())
    file.unlink()
    assert desk.run() == 2
    assert "teacher/seed=1, which is gone or newer" in capsys.readouterr().err
    file.write_text(json.dumps({**record, "ended": "2999-01-01T00:00:00+00:00"}))
    assert desk.run() == 2
    assert "gone or newer" in capsys.readouterr().err


def test_results_below_a_folder(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "results.json").write_text('{"bbox": {"AP": 12.5, "APl": NaN}}')
    (tmp_path / "metrics.json").write_text(
        '{"iteration": 9, "bbox/AP": 3.0, "total_loss": 2.0}\n'
        '{"iteration": 19, "total_loss": 1.0}\n'
        '{"iteration": 19, "bbox/AP": NaN}\n'
        '{"iteration": 9, "bbox/AP": 4.0}\n'  # resumed
        "3\n[1]\n{}\n"  # another program's
        '{"iteration": 29, "bbox/A'  # killed
    )
    (tmp_path / "student" / "results.json").write_text('{"bbox": {"AP": 14}, "sem_seg": {"mIoU": 50.0}}')
    metrics, curve = collect_results(tmp_path)
    assert metrics == {
        "bbox/AP": 12.5,
        "bbox/APl": None,
        "student/bbox/AP": 14,
        "student/sem_seg/mIoU": 50.0,
    }
    assert curve == [{"iteration": 9, "bbox/AP": 4.0}, {"iteration": 19, "bbox/AP": None}]


def test_results_that_cannot_be_read_make_a_failure(desk):
    desk.write({"a": {"command": "{output} ap:1"}})
    program = desk.program.read_text()
    desk.program.write_text(
        program.replace('json.dump({"bbox": {"AP": float(value)}}, file)', 'file.write("{")')
    )
    assert desk.run() == 1
    record = desk.record("a/all")
    assert record["status"] == "failed" and "not valid JSON" in record["log_tail"][-1]


def test_log_tail_of_a_progress_bar(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"first\n" + b"".join(b"\r%d%%" % i for i in range(101)) + b"\n\nlast \xff\n")
    assert log_tail(log) == ["first", "100%", "last \ufffd"]
    log.write_text("\n".join(map(str, range(100_000))))
    assert log_tail(log)[-1] == "99999" and len(log_tail(log)) == 15
    assert log_tail(tmp_path / "none.txt") == []


@pytest.mark.slow
def test_a_grid_of_the_real_tools(tmp_path):
    """Teacher, labels and two students of one teacher, then the report; and a failed cell for a NaN loss."""
    data = make_coco_set(tmp_path / "labeled", 4, seed=1)
    unlabeled = make_coco_set(tmp_path / "unlabeled", 4, seed=2)
    train = [
        "train", "--resume", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml", "--human-labels", "human",
        data.json_file, data.images,
    ]  # fmt: skip
    keys = [
        *SMALL_MODEL, "DATASETS.TRAIN", "('human',)", "DATASETS.TEST", "('human',)", "SOLVER.MAX_ITER", "2",
        "OUTPUT_DIR", "{output}",
    ]  # fmt: skip
    content = {
        "axes": {"alpha": [0, 1, 1.0e30], "seed": [0]},
        "steps": {
            "teacher": {"axes": ["seed"], "command": [*train, *keys]},
            "labels": {
                "axes": ["seed"],
                "command": [
                    "label", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml", "--images", unlabeled.images,
                    "--score-floor", "0.001", "--output", "{output}", *SMALL_MODEL, "MODEL.WEIGHTS",
                    "{teacher}/model_final.pth",
                ],
            },
            "student": {
                "axes": ["alpha", "seed"],
                "command": [
                    *train, "--pseudo-labels", "pseudo", "{labels}", *keys, "DATASETS.PSEUDO_TRAIN", "('pseudo',)",
                    "SOLVER.PSEUDO_IMS_PER_BATCH", "2", "SELFTRAIN.ALPHA", "{alpha}", "SELFTRAIN.SCORE_THRESH", "0.001",
                    "SELFTRAIN.NORMALIZE_LOSS", "False", "MODEL.WEIGHTS", "{teacher}/model_final.pth",
                ],
            },
        },
        "report": [{"name": "alpha", "steps": ["teacher", "student"], "x": "alpha", "lines": ["step"]}],
    }  # fmt: skip
    grid, output = tmp_path / "grid.yaml", tmp_path / "runs"
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(SystemExit) as stop:
        main(["grid", str(grid), "--output", str(output), "--devices", "cpu"])
    assert stop.value.code == 1
    statuses = {
        folder.name: read_record(folder)["status"] for step in ("teacher", "labels", "student") for folder in
        sorted((output / step).iterdir())
    }  # fmt: skip
    assert statuses["seed=0"] == "finished"
    assert statuses["alpha=1,seed=0"] == statuses["alpha=0,seed=0"] == "finished"
    assert statuses["alpha=1e+30,seed=0"] == "failed"
    assert "bbox/AP" in read_record(output / "student" / "alpha=1,seed=0")["metrics"]
    assert main(["report", str(output), "--output", str(tmp_path / "report")]) == 0
    assert "alpha=1e+30" in (tmp_path / "report" / "report.md").read_text()
