"""A training process that is killed and resumed ends with the weights of one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, make_coco_set

from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.modeling.checkpoint import BEST_WEIGHTS

STEPS = 24


@pytest.fixture
def command(tmp_path):
    """``command(output, *options)``: a student with drop connect, S4, evaluation on the way."""
    coco = make_coco_set(tmp_path / "coco", 5, seed=0)
    identity = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": coco.images}
    writer = PseudoLabelWriter(tmp_path / "pseudo", identity, ["001.png", "002.png"])
    row = make_row("001.png", 96, 96, [[10, 10, 60, 60]], [0.9], [0])
    writer.write_shard(0, [row, make_row("002.png", 96, 96)])
    writer.finish()

    def build(output, *options):
        return [
            "train", "--resume", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml",
            "--human-labels", "human", coco.json_file, coco.images,
            "--pseudo-labels", "pseudo", str(tmp_path / "pseudo"),
            *SMALL_MODEL, "DATASETS.TRAIN", "('human',)", "DATASETS.PSEUDO_TRAIN", "('pseudo',)",
            "DATASETS.TEST", "('human',)", "TEST.EVAL_PERIOD", "6", "SOLVER.PSEUDO_IMS_PER_BATCH", "1",
            "INPUT.AUGMENTATION.POLICY", "S4", "MODEL.RETINANET.LOSS_NORMALIZER", "moving_average",
            "SOLVER.MAX_ITER", str(STEPS), "SOLVER.CHECKPOINT_PERIOD", "3", "SOLVER.CHECKPOINTS_TO_KEEP", "3",
            "TEST.VALIDATION_LOSS", "True", "TEST.BEST_METRIC", "validation/loss", "OUTPUT_DIR", str(output), *options,
        ]  # fmt: skip

    return build


def _start(command):
    code = "import sys; from selftrain_d2.cli import main; sys.exit(main())"
    # Sums depend on the number of threads, in their last bits.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-c", code, *command], stdout=subprocess.DEVNULL, env=environment
    )


def _run(command):
    """In a process of its own: TorchScript rounds otherwise once another test has warmed it up."""
    process = _start(command)
    assert process.wait() == 0


def _kill_after_checkpoint(command, output, name, seconds):
    """Kill a real process some time after a checkpoint was written."""
    process = _start(command)
    deadline = time.monotonic() + 600
    while not (output / name).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _validation_losses(folder):
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [row["validation/loss"] for row in rows if "validation/loss" in row]


def _assert_equal_weights(one, other):
    best, same = (torch.load(folder / BEST_WEIGHTS, weights_only=True) for folder in (one, other))
    assert best["best"] == same["best"] and best["best"]["steps"] in range(6, STEPS + 1, 6)
    assert all(torch.equal(value, same["model"][name]) for name, value in best["model"].items())
    losses, same = (_validation_losses(folder) for folder in (one, other))
    # The writer writes every 20 steps, and at the end, what is newest.
    assert losses == same and len(losses) == 2 and min(losses) >= best["best"]["value"] > 0
    one, other = (torch.load(folder / "model_final.pth", weights_only=True) for folder in (one, other))
    assert one["model"].keys() == other["model"].keys()
    for name in one["model"]:
        assert torch.equal(one["model"][name], other["model"][name]), name
    hooks = one["trainer"]["hooks"]["LossNormalizer"]
    assert hooks == other["trainer"]["hooks"]["LossNormalizer"] and hooks["pseudo_average"] > 0


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_killed_once(command, tmp_path, num_workers):
    options = ("DATALOADER.NUM_WORKERS", num_workers)
    _run(command(tmp_path / "undisturbed", *options))
    killed = command(tmp_path / "killed", *options)
    _kill_after_checkpoint(killed, tmp_path / "killed", "model_0000008.pth", 0.2)
    assert not (tmp_path / "killed" / "model_final.pth").exists()
    _run(killed)
    _assert_equal_weights(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_killed_at_five_random_moments(command, tmp_path, num_workers):
    options = ("DATALOADER.NUM_WORKERS", num_workers)
    _run(command(tmp_path / "undisturbed", *options))
    killed = command(tmp_path / "killed", *options)
    random = np.random.default_rng(0)
    for _ in range(5):
        process = _start(killed)
        time.sleep(random.uniform(4, 10))  # in start-up, in training, while saving or evaluating
        process.send_signal(signal.SIGKILL)
        process.wait()
    _run(killed)
    _assert_equal_weights(tmp_path / "undisturbed", tmp_path / "killed")


def test_a_truncated_last_checkpoint_falls_back_to_the_one_before(command, tmp_path, capsys):
    output = tmp_path / "output"
    assert main(command(output, "SOLVER.MAX_ITER", "7")) == 0
    final = output / "model_final.pth"
    expected = torch.load(final, weights_only=True)["model"]
    os.truncate(final, final.stat().st_size // 2)
    assert main(command(output, "SOLVER.MAX_ITER", "7")) == 0
    assert "Cannot resume from" in capsys.readouterr().out
    assert "Starting training from iteration 6" in (output / "log.txt").read_text()
    weights = torch.load(final, weights_only=True)["model"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_no_checkpoint_can_be_read(command, tmp_path, capsys):
    output = tmp_path / "output"
    assert main(command(output, "SOLVER.MAX_ITER", "2")) == 0
    for file in output.glob("*.pth"):
        shutil.copy(file, output / "not_finite_step_0000001_rank_0.pth")  # newer, and no checkpoint
        os.truncate(file, 100)
    assert main(command(output, "SOLVER.MAX_ITER", "2")) == 2
    assert "No checkpoint in" in capsys.readouterr().err
