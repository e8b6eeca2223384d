"""The loop on two machines: agents of torchrun that meet on the loopback interface."""

import json

import pytest
import torch
from conftest import SMALL_MODEL, make_coco_set
from machines import Machines

from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels import writer as pseudo_label_writer
from selftrain_d2.data.pseudo_labels.reader import verify_pseudo_labels

# The process of one rank is killed after its first shard; until then no other makes more than one.
KILLED = """
killed = os.path.join(os.path.dirname(__file__), "killed")
if not os.path.exists(killed):
    write = writer.PseudoLabelWriter.write_shard
    def write_shard(self, shard, rows):
        write(self, shard, rows)
        if rank == 1:
            open(killed, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    writer.PseudoLabelWriter.write_shard = write_shard
"""
# One rank takes longer for a shard than any collective may last.
SLOW = """
from selftrain_d2.engine import process_group
from selftrain_d2.labeling.inference import Teacher
process_group.DEFAULT_TIMEOUT = datetime.timedelta(seconds=60)
call = Teacher.__call__
def slowly(self, samples):
    time.sleep(70 if rank == 3 else 3)
    open(os.path.join(os.path.dirname(__file__), f"labeled_{rank}"), "w").close()
    return call(self, samples)
Teacher.__call__ = slowly
"""


@pytest.fixture
def loop(tmp_path):
    """``loop(images a step)``: the command line of a loop of two steps a stage."""
    labeled = make_coco_set(tmp_path / "labeled", 6, seed=1)
    unlabeled = make_coco_set(tmp_path / "unlabeled", 36, seed=2)
    validation = make_coco_set(tmp_path / "validation", 3, seed=3)

    def build(images):
        return [
            "self-train", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml",
            "--labeled-json", labeled.json_file, "--labeled-images", labeled.images,
            "--unlabeled-images", unlabeled.images, "--val-json", validation.json_file, "--val-images",
            validation.images, "--score-floor", "0.001", "--output", str(tmp_path / "output"), *SMALL_MODEL,
            "SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.IMS_PER_BATCH", str(images),
            "SELFTRAIN.SCORE_THRESH", "0.005", "SELFTRAIN.TAKE_OVER_SECONDS", "200",
        ]  # fmt: skip

    return build


def _check(folder, processes, monkeypatch):
    """The loop is finished, all processes worked, and one process alone labels the same to the last byte."""
    summary = json.loads((folder / "output" / "summary.json").read_text())
    assert list(summary["stages"]) == ["teacher", "pseudo_labels", "student"]
    for stage in ("teacher", "student"):
        assert summary["stages"][stage]["metrics"]["bbox"].keys() >= {"AP", "AP50"}
        logs = {path.name for path in (folder / "output" / stage).glob("log.txt*")}
        assert logs == {"log.txt", *(f"log.txt.rank{rank}" for rank in range(1, processes))}
        rows = [
            json.loads(row) for row in (folder / "output" / stage / "metrics.json").read_text().splitlines()
        ]
        assert max(row["iteration"] for row in rows) in (1, 2)

    monkeypatch.setattr(pseudo_label_writer, "SHARD_SIZE", 8)
    torch.set_num_threads(1)  # rounding depends on it
    teacher = folder / "output" / "teacher"
    assert main([
        "label", "--config-file", str(teacher / "config.yaml"), "--images", str(folder / "unlabeled" / "images"),
        "--output", str(folder / "alone"), "--score-floor", "0.001", "MODEL.WEIGHTS", str(teacher / "model_final.pth"),
    ]) == 0  # fmt: skip
    manifests = [
        verify_pseudo_labels(labels) for labels in (folder / "output" / "pseudo_labels", folder / "alone")
    ]
    assert (
        manifests[0]["shards"] == manifests[1]["shards"] and len(manifests[0]["shards"]) == 5
    )  # SHA-256 each
    assert manifests[0]["boxes"] == manifests[1]["boxes"] > 0
    assert {p.name for p in (folder / "output" / "pseudo_labels" / "shards").iterdir()} == {
        *manifests[0]["shards"]
    }


def test_a_loop_on_two_machines(loop, tmp_path, monkeypatch):
    with Machines(tmp_path, loop(2), processes=1) as machines:
        assert machines.wait() == [0, 0], machines.output()
    _check(tmp_path, 2, monkeypatch)
    assert machines.output().count("| student |") == 1  # the main process alone tells


@pytest.mark.slow
def test_a_loop_of_which_one_process_is_killed_in_labeling(loop, tmp_path, monkeypatch):
    with Machines(tmp_path, loop(4), change=KILLED, restarts=1) as machines:
        assert machines.wait() == [0, 0], machines.output()
    assert (tmp_path / "killed").exists() and "teacher is finished already" in machines.output()
    _check(tmp_path, 4, monkeypatch)


@pytest.mark.slow
def test_a_loop_with_a_slow_process_and_a_short_time_limit(loop, tmp_path, monkeypatch):
    with Machines(tmp_path, loop(4), change=SLOW) as machines:
        assert machines.wait() == [0, 0], machines.output()
    _check(tmp_path, 4, monkeypatch)
    assert (tmp_path / "labeled_3").exists()
