"""Trackers in their offline modes: what they have written is read back from their files."""

import json
import logging
import math
import struct
import sys

import pytest
from detectron2.utils.events import EventStorage

from selftrain_d2 import InputError, SelfTrainingTrainer
from selftrain_d2.engine import trackers
from selftrain_d2.engine.trackers import Tracker, build_trackers, check_trackers


@pytest.fixture
def config(student_config, tmp_path, monkeypatch):
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONFIG_DIR": tmp_path, "WANDB_CACHE_DIR": tmp_path,
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    student_config.SELFTRAIN.TRACKERS = ("wandb", "mlflow")
    (tmp_path / "output").mkdir()
    return student_config


def _write(tracker, steps, start_iter=0, finished=True):
    """A run that logs the loss 1 / step, and at its end an AP."""
    tracker.begin(start_iter)
    with EventStorage(start_iter) as storage:
        for storage.iter in steps:
            storage.put_scalars(total_loss=1 / (storage.iter + 1), smoothing_hint=False)
            tracker.write()
        storage.iter += 1
        storage.put_scalars(**{"bbox/AP": 25.0, "bbox/AP-a(b)": math.nan}, smoothing_hint=False)
        tracker.write()
        tracker.write()  # nothing is sent twice
    tracker.finished = finished
    tracker.close()


def _records(file):
    """Those of a W&B file: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            yield message
            record = b""


def _wandb_run(file):
    """Id, group, name, config and rows of a run, and its exit code."""
    records = list(_records(file))
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    rows = []
    for r in records:
        if r.WhichOneof("record_type") == "history":
            values = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in r.history.item}
            rows.append({key: v for key, v in values.items() if not key.startswith("_")})
    (exit_code,) = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    return run.run_id, run.project, run.run_group, run.display_name, config, rows, exit_code


def test_wandb(config, tmp_path):
    wandb = pytest.importorskip("wandb")
    config.SELFTRAIN.TRACKERS = ("wandb",)
    (first,) = build_trackers(config)
    _write(first, range(3), finished=False)
    (second,) = build_trackers(config)
    _write(second, range(2, 4), start_iter=2)
    wandb.teardown()  # waits for its service, which writes the files
    files = sorted(
        (tmp_path / "output" / "wandb").glob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime_ns
    )
    (run_id, project, group, name, settings, rows, code), (again, *_, more, last_code) = map(
        _wandb_run, files
    )
    assert (project, group, name) == ("selftrain_d2", tmp_path.name, "output")
    assert settings["SOLVER.MAX_ITER"] == 4 and settings["DATASETS.PSEUDO_TRAIN"] == ["pseudo"]
    assert [(row["iteration"], row["total_loss"]) for row in rows if "total_loss" in row] == [
        (0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3)),
    ]  # fmt: skip
    assert [row["bbox/AP"] for row in rows if "bbox/AP" in row] == [25.0]
    assert again == run_id and [row["iteration"] for row in more] == [2, 3, 4]
    assert (code, last_code) == (1, 0)


def test_mlflow(config, tmp_path):
    MlflowClient = pytest.importorskip("mlflow.tracking").MlflowClient
    config.SELFTRAIN.TRACKERS = ("mlflow",)
    (first,) = build_trackers(config)
    _write(first, range(3), finished=False)
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("selftrain_d2").experiment_id])
    assert run.info.status == "FAILED" and run.info.run_name == "output"
    (second,) = build_trackers(config)
    _write(second, range(2, 4), start_iter=2)
    (run,) = client.search_runs([run.info.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["SOLVER.MAX_ITER"] == "4" and len(run.data.params) > 200
    assert run.data.metrics["bbox/AP"] == 25.0 and math.isnan(run.data.metrics["bbox/AP-a_b_"])
    history = client.get_metric_history(run.info.run_id, "total_loss")
    assert [(m.step, m.value) for m in history] == [
        (0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3)), (2, pytest.approx(1 / 3)), (3, 0.25),
    ]  # fmt: skip


class _Broken(Tracker):
    name = "broken"

    def start(self, run_id):
        return "id"

    def log(self, scalars, step):
        self.asked = getattr(self, "asked", 0) + 1
        raise ConnectionError("no route to host")

    def finish(self):
        raise AssertionError("It was given up.")


class _Unreachable(_Broken):
    name = "unreachable"

    def start(self, run_id):
        raise PermissionError("no key")


def test_training_goes_on_without_trackers_that_fail(config, tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setattr("selftrain_d2.engine.trainer.check_trackers", lambda cfg: None)
    monkeypatch.setitem(trackers.TRACKERS, "broken", _Broken)
    monkeypatch.setitem(trackers.TRACKERS, "unreachable", _Unreachable)
    config.SELFTRAIN.TRACKERS, config.SOLVER.MAX_ITER = ("broken", "unreachable", "mlflow"), 2
    config.DATASETS.TEST, config.TEST.EVAL_PERIOD = ("human",), 1
    trainer = SelfTrainingTrainer(config)
    monkeypatch.setattr(trainer, "test", lambda *_: {"bbox": {"AP": 12.5}})
    with caplog.at_level(logging.WARNING, "selftrain_d2"):
        trainer.train()
    warnings = [r.getMessage() for r in caplog.records if r.name.endswith("trackers")]
    assert [w.split(":")[0] for w in warnings] == [
        "The tracker unreachable failed (PermissionError", "The tracker broken failed (ConnectionError",
    ]  # fmt: skip
    assert trainer.trackers[0].asked == 1
    # The writers are the last hook; the tracker that works has what metrics.json has, the final evaluation included.
    assert trainer._hooks[-1]._writers[-3:] == trainer.trackers
    rows = [json.loads(line) for line in (tmp_path / "output" / "metrics.json").read_text().splitlines()]
    run_id = json.loads((tmp_path / "output" / "trackers.json").read_text())["mlflow"]
    for name in ("total_loss", "bbox/AP", "pseudo_loss_weight"):
        history = trainer.trackers[2]._client.get_metric_history(run_id, name)
        assert [(m.step, m.value) for m in history] == [(r["iteration"], r[name]) for r in rows if name in r]
    assert history and rows[-1]["bbox/AP"] == 12.5


def test_trackers_that_are_not_installed(small_config, monkeypatch, tmp_path):
    """A folder of W&B's runs, where Python looks for modules, is no package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "mlflow"):
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        small_config.SELFTRAIN.TRACKERS = (name,)
        with pytest.raises(InputError, match=rf"pip install 'selftrain_d2\[{name}\]'"):
            check_trackers(small_config)


def test_none_by_default(small_config):
    check_trackers(small_config)
    assert build_trackers(small_config) == []
