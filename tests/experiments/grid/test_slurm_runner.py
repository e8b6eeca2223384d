"""Cells as jobs, with submitit's executor for local processes in the place of SLURM."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from selftrain_d2.cli import main
from selftrain_d2.experiments.grid import slurm_runner
from selftrain_d2.experiments.grid.cell_record import begin, read_record
from selftrain_d2.experiments.grid.definition import load_grid

PROGRAM = """
import json, os, sys, time
output, *words = sys.argv[1:]
with open(os.path.join(output, "..", "..", "..", "diary.txt"), "a") as diary:
    diary.write(os.path.dirname(output) + " " + os.environ.get("SUBMITIT_LOCAL_JOB_ID", "no job") + "\\n")
for word in words:
    if word == "fail":
        sys.exit("it cannot work")
    if word == "wait":
        open(os.path.join(output, "waiting"), "w").close()
        time.sleep(60)
with open(os.path.join(output, "results.json"), "w") as file:
    json.dump({"bbox": {"AP": 1.5}}, file)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(steps, *options)``: the exit status of the command; ``run.output`` is the grid's folder."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def call(steps, *options):
        content = {
            "program": [sys.executable, str(tmp_path / "program.py")],
            "steps": steps,
            "axes": {"seed": [0, 1]},
        }
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        try:
            return main(["grid", str(tmp_path / "grid.yaml"), "--output", str(call.output), *options])
        except SystemExit as stop:
            return stop.code

    call.output = tmp_path / "runs"
    return call


@pytest.fixture
def local_jobs(monkeypatch):
    """Jobs are processes of this machine."""
    pytest.importorskip("submitit", reason="an optional dependency; part of the extra 'dev'")
    monkeypatch.setattr(slurm_runner, "_CLUSTER", "local")


STEPS = {
    "teacher": {"axes": ["seed"], "command": "{output}"},
    "student": {"axes": ["seed"], "command": "{output} {teacher}"},
}


def test_jobs_in_their_order(run, local_jobs):
    assert run(STEPS, "--slurm", "timeout_min=5") == 0
    lines = [line.split() for line in (run.output / "diary.txt").read_text().splitlines()]
    cells = [Path(path).relative_to(run.output).as_posix() for path, _ in lines]
    assert sorted(cells[:2]) == ["teacher/seed=0", "teacher/seed=1"] or cells.index(
        "student/seed=0"
    ) > cells.index("teacher/seed=0")
    assert len(cells) == 4 and len({job for _, job in lines}) == 4  # each in a job of its own
    for cell in cells:
        record = read_record(run.output / cell)
        assert record["status"] == "finished" and record["metrics"] == {"bbox/AP": 1.5}
    assert slurm_runner.submitted_jobs(run.output) == {}
    assert run(STEPS, "--slurm") == 0
    assert len((run.output / "diary.txt").read_text().splitlines()) == 4


@pytest.mark.slow
def test_failed_jobs(run, local_jobs, capsys):
    steps = {**STEPS, "teacher": {"axes": ["seed"], "command": "{output} fail"}}
    assert run(steps, "--slurm") == 1
    record = read_record(run.output / "teacher" / "seed=0")
    assert record["status"] == "failed" and record["log_tail"][-1] == "it cannot work"
    assert read_record(run.output / "student" / "seed=0") is None
    assert "teacher/seed=0: failed" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_cancels_the_jobs(run, local_jobs):
    steps = {"teacher": {"axes": ["seed"], "command": "{output} wait"}}
    folder = run.output / "teacher" / "seed=1"

    def stop():
        end = time.monotonic() + 60
        while not (folder / "output" / "waiting").exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    assert run(steps, "--slurm") == 130
    thread.join()
    end = time.monotonic() + 30
    while read_record(folder)["status"] == "running" and time.monotonic() < end:
        time.sleep(0.05)
    assert read_record(folder)["status"] == "interrupted"
    assert slurm_runner.submitted_jobs(run.output) == {}


@pytest.mark.slow
def test_a_new_runner_takes_over_the_jobs_of_a_dead_one(run, local_jobs, monkeypatch, tmp_path):
    import submitit

    class Job(submitit.SlurmJob):  # a job of the old runner: it finishes the cell when first asked
        asked = 0

        def done(self, force_check=False):
            Job.asked += 1
            if Job.asked == 3:
                cell = load_grid(tmp_path / "grid.yaml").cells[0]
                begin(cell, run.output / cell.id, [])
                slurm_runner.finish(run.output / cell.id, 0)
            return Job.asked >= 3

        def __del__(self):
            pass

    monkeypatch.setattr(submitit, "SlurmJob", Job)
    (run.output / "slurm").mkdir(parents=True)
    (run.output / "slurm" / "jobs.json").write_text(json.dumps({"teacher/seed=0": "1234_0"}))
    assert run(STEPS, "--slurm") == 0
    ran = (run.output / "diary.txt").read_text()
    assert "teacher/seed=0" not in ran and "student/seed=0" in ran and "teacher/seed=1" in ran


def test_a_job_that_died_without_a_word_is_interrupted(run, local_jobs, tmp_path):
    class Job:
        def stderr(self):
            return "slurmstepd: error: node failure\n"

    run(STEPS, "--dry-run")
    runner = slurm_runner.SlurmRunner(run.output, ["true"])
    record = runner._record("teacher/seed=0", Job())
    assert record["status"] == "interrupted" and record["log_tail"] == ["slurmstepd: error: node failure"]
    cell = load_grid(tmp_path / "grid.yaml").cells[0]
    begin(cell, run.output / cell.id, ["true"])
    assert runner._record(cell.id, Job())["status"] == "interrupted"
    assert read_record(run.output / cell.id)["status"] == "interrupted"


def test_a_job_whose_time_is_over_is_queued_again(local_jobs, tmp_path):
    submitit = pytest.importorskip("submitit")
    cell = slurm_runner.CellJob(object(), tmp_path, ["true"])
    again = cell.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function is cell


def test_wrong_parameters(run, local_jobs, capsys):
    assert run(STEPS, "--slurm", "slurm_partitoin=gpu") == 2
    assert "partitoin" in capsys.readouterr().err
    assert run(STEPS, "--slurm", "timeout_min=soon") == 2
    assert "timeout_min" in capsys.readouterr().err


def test_without_submitit(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run(STEPS, "--slurm") == 2
    assert "pip install submitit" in capsys.readouterr().err


def test_local_cells_beside_submitted_ones_are_refused(run, capsys):
    (run.output / "slurm").mkdir(parents=True)
    (run.output / "slurm" / "jobs.json").write_text(json.dumps({"teacher/seed=0": "1234_0"}))
    assert run(STEPS) == 2
    assert "1234_0" in capsys.readouterr().err
    assert not (run.output / "diary.txt").exists()
