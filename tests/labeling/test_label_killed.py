"""The label command, killed at random moments and started again: the end is that of an undisturbed run."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL
from detectron2.modeling import build_model

from selftrain_d2 import load_pseudo_labels
from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels import writer as pseudo_label_writer
from selftrain_d2.data.pseudo_labels.manifest import read_manifest

IMAGES = 160
SHARD = 4
# The real command, with shards of a few images, on one thread.
PROGRAM = f"""
import sys, torch
from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels import writer as pseudo_label_writer
torch.set_num_threads(1)
pseudo_label_writer.SHARD_SIZE = {SHARD}
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(small_config, tmp_path):
    """Images of two sizes, some of them broken, and a detector with random weights that finds something everywhere."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(IMAGES):
        name = str(tmp_path / "photos" / f"{i:03d}.png")
        cv2.imwrite(name, rng.integers(0, 255, (48, 32 + 16 * (i % 2), 3), dtype=np.uint8))
        if i % 50 == 7:
            os.truncate(name, 200)
    torch.manual_seed(0)
    detector = build_model(small_config)
    torch.nn.init.normal_(detector.head.cls_score.weight, std=0.5)
    torch.nn.init.constant_(detector.head.cls_score.bias, -2.0)
    weights = {"model": detector.state_dict(), "classes": {"thing_classes": ["red", "green"]}}
    torch.save(weights, tmp_path / "teacher.pth")
    return tmp_path


def _arguments(folder, output, *options, weights="teacher.pth"):
    return [
        "label", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml", "--images", str(folder / "photos"),
        "--output", str(folder / output), "--score-floor", "0.001", "--batch-size", "3", *options, *SMALL_MODEL,
        "MODEL.WEIGHTS", str(folder / weights), "DATALOADER.NUM_WORKERS", "1", "TEST.DETECTIONS_PER_IMAGE", "5",
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "20", "INPUT.AUGMENTATION.IMAGE_SIZE", "64",
    ]  # fmt: skip


@pytest.fixture
def label_here(folder, monkeypatch):
    """The command in this process, undisturbed."""
    monkeypatch.setattr(pseudo_label_writer, "SHARD_SIZE", SHARD)
    torch.set_num_threads(1)  # rounding depends on it
    return lambda *arguments, **keywords: main(_arguments(folder, *arguments, **keywords))


def _shards(folder, output):
    return sorted(path.name for path in (folder / output / "shards").glob("shard-*.parquet"))


def _start(folder, output):
    """Start the command in a process of its own; returns it once it has labeled something."""
    before = len(_shards(folder, output))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *_arguments(folder, output)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(_shards(folder, output)) == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def _assert_equal(folder, one, other):
    """The same rows to the last bit (names of shards have their checksums), and nothing else in the folder."""
    assert load_pseudo_labels(folder / one, 0.001) == load_pseudo_labels(folder / other, 0.001)
    first, second = (read_manifest(folder / output) for output in (one, other))
    for key in ("listed", "labeled", "empty", "boxes", "skipped", "teacher_config_sha256"):
        assert first[key] == second[key]
    assert first["listed"] == IMAGES and len(first["skipped"]) == 4 and first["boxes"] > IMAGES
    files = [sorted(p.name for p in (folder / o).rglob("*") if p.is_file()) for o in (one, other)]
    assert files[0] == files[1] and len(files[0]) == IMAGES // SHARD + 2  # manifest and lock


def _stopped(process, number):
    """Send a signal to the command and its loader workers, as a machine that goes down and a terminal do."""
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=60)[1]
    if number == signal.SIGKILL:
        return process.returncode == -signal.SIGKILL
    last = errors.strip().splitlines()[-1]
    return (
        process.returncode == 130
        and "Traceback" not in errors
        and last == "selftrain-d2 label: stopped; the same command goes on from here"
    )


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGKILL],
        pytest.param([signal.SIGKILL] * 20, marks=pytest.mark.slow),
    ],
    ids=["3 kills, 1 interruption", "20 kills"],
)
def test_stopped_at_random_moments(folder, label_here, signals):
    assert label_here("undisturbed") == 0
    moments = random.Random(len(signals))
    shards = IMAGES // SHARD
    for left, number in zip(range(len(signals), 0, -1), signals):
        before = _shards(folder, "stopped")
        process = _start(folder, "stopped")
        # Some moment up to the shard that leaves one to each of those to come.
        last = len(before) + moments.randint(1, max((shards - len(before)) // (left + 1), 1))
        while len(_shards(folder, "stopped")) < last:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        assert _stopped(process, number)
        assert len(_shards(folder, "stopped")) < shards
        assert set(before) < set(_shards(folder, "stopped"))  # nothing is lost, something was gained
    assert label_here("stopped") == 0
    _assert_equal(folder, "undisturbed", "stopped")


def test_another_teacher_may_not_go_on(folder, label_here, capsys):
    for path in sorted((folder / "photos").iterdir())[SHARD:]:
        path.unlink()
    assert label_here("labels") == 0
    weights = torch.load(folder / "teacher.pth")
    weights["model"]["head.cls_score.bias"] += 1
    torch.save(weights, folder / "other.pth")
    capsys.readouterr()
    assert label_here("labels", weights="other.pth") == 2
    error = capsys.readouterr().err
    hashes = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("teacher.pth", "other.pth")
    ]
    assert "another teacher_weights_sha256" in error and all(h in error for h in hashes)
    assert error.count("\n") == 1


def test_two_processes_share_the_work(folder, label_here, monkeypatch, capsys):
    """Processes that start anew have shards of the usual size: here two, one each."""
    size = 256
    monkeypatch.setattr(pseudo_label_writer, "SHARD_SIZE", size)
    for i in range(IMAGES, size + 20):
        os.link(folder / "photos" / f"{i - IMAGES:03d}.png", folder / "photos" / f"{i:03d}.png")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert label_here("alone") == 0
    assert label_here("together", "--num-gpus", "2") == 0
    one, two = (load_pseudo_labels(folder / output, 0.001) for output in ("alone", "together"))
    assert len(one) > size and one == two
    assert _shards(folder, "alone") == _shards(folder, "together") and len(_shards(folder, "alone")) == 2
