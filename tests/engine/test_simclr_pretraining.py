"""SimCLR pre-training from the command line: what it writes, how it goes on, and what it refuses."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL
from detectron2.modeling import build_model
from PIL import Image

from selftrain_d2.cli import main
from selftrain_d2.engine.simclr_training import SimCLRTrainer
from selftrain_d2.modeling.checkpoint import load_weights
from selftrain_d2.modeling.simclr import SimCLR

pytest.importorskip("lightly")

IMAGES, BATCH, EPOCHS = 9, 4, 3
STEPS = EPOCHS * (IMAGES // BATCH)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine textures that differ in colour and in grain."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        grain = rng.integers(0, 256, (2 + i, 2 + i, 3), dtype=np.uint8)
        Image.fromarray(grain).resize((48, 48), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    return folder


def _command(photos, output, *options, keys=()):
    return [
        "pretrain-simclr", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml", "--images", str(photos),
        "--output", str(output), "--epochs", str(EPOCHS), "--batch-size", str(BATCH), "--crop-size", "32",
        *options, *SMALL_MODEL, *keys,
    ]  # fmt: skip


def _metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main(_command(photos, output)) == 0
    return output


def test_detector_starts_from_it(undisturbed, small_config):
    """Every tensor of the detector's backbone is filled, and its features are those of the trained one."""
    torch.manual_seed(1)
    detector = build_model(small_config).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = detector.backbone(image)["p3"]
        report = load_weights(detector, str(undisturbed / "backbone.pth"))
        after = detector.backbone(image)["p3"]
    bottom_up = {f"backbone.bottom_up.{name}" for name in detector.backbone.bottom_up.state_dict()}
    assert set(report.matched) == bottom_up and not report.unexpected and not report.incorrect_shapes
    assert not torch.allclose(before, after)
    trained = torch.load(undisturbed / "model_final.pth", weights_only=True)["model"]
    for name, tensor in detector.backbone.bottom_up.state_dict().items():
        assert torch.equal(tensor, trained[f"backbone.{name}"])
    assert report.input == {
        "format": small_config.INPUT.FORMAT,
        "pixel_mean": list(small_config.MODEL.PIXEL_MEAN),
        "pixel_std": list(small_config.MODEL.PIXEL_STD),
    }


@pytest.mark.parametrize("stop", [1, 4])
def test_stopped_and_resumed_equals_undisturbed(photos, undisturbed, tmp_path, monkeypatch, stop, capsys):
    """Within the first epoch, before any checkpoint, and within the third; with loader processes from then on."""
    step = SimCLRTrainer.run_step

    def interrupted(trainer):
        if trainer.iter == stop:
            raise KeyboardInterrupt
        step(trainer)

    output = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(SimCLRTrainer, "run_step", interrupted)
        assert main(_command(photos, output)) == 130
    assert not (output / "backbone.pth").exists()
    assert main(_command(photos, output, keys=["DATALOADER.NUM_WORKERS", "1"])) == 0
    one, other = (torch.load(f / "model_final.pth", weights_only=True) for f in (undisturbed, output))
    assert one["trainer"]["iteration"] == other["trainer"]["iteration"] == STEPS - 1
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name

    written = (output / "backbone.pth").read_bytes()
    assert main(_command(photos, output)) == 0
    assert "is finished already" in capsys.readouterr().out
    assert (output / "backbone.pth").read_bytes() == written


def test_schedule_and_log(undisturbed):
    """A cosine to zero after one epoch of warm-up; one line an epoch."""
    rate = _metrics(undisturbed)[-1]["lr"]
    assert rate == pytest.approx(0.06 * (1 + math.cos(math.pi * (STEPS - 1) / STEPS)) / 2)
    lines = [line for line in (undisturbed / "log.txt").read_text().splitlines() if "by chance" in line]
    assert len(lines) == EPOCHS and all("among 7 (by chance 14.3 %)" in line for line in lines)


def test_unreadable_images_are_left_out_and_listed(photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:40])
    (folder / "text.jpg").write_text("no image")
    output = tmp_path / "output"
    assert main(_command(folder, output, "--epochs", "1", "--warmup-epochs", "0")) == 0
    record = json.loads((output / "simclr.json").read_text())
    assert set(record["skipped"]) == {"broken.png", "text.jpg"} and all(record["skipped"].values())
    out = capsys.readouterr().out
    assert "2 images cannot be read" in out and "SimCLR on 9 images: 1 epochs of 2 steps" in out


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    [
        (["--epochs", "4"], [], "was begun with another epochs: 3 there, 4 now"),
        ([], ["MODEL.PIXEL_MEAN", "[1.0,2.0,3.0]"], "was begun with another MODEL.PIXEL_MEAN"),
        ([], ["SEED", "1"], "was begun with another SEED"),
    ],
)
def test_other_settings_are_refused(photos, undisturbed, capsys, options, keys, message):
    assert main(_command(photos, undisturbed, *options, keys=keys)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    [
        (["--batch-size", "10"], [], "more than the 9 images: make it at most 9"),
        (["--batch-size", "1"], [], "--batch-size is 1: it must be at least 2"),
        (["--epochs", "0"], [], "--epochs is 0"),
        (["--warmup-epochs", "3"], [], "less than --epochs"),
        (["--learning-rate", "nan"], [], "--learning-rate is nan"),
        (["--temperature", "0"], [], "--temperature is 0.0"),
        (["--crop-size", "8"], [], "at least 32 pixels"),
        (["--gaussian-blur", "2"], [], "--gaussian-blur is 2.0"),
        ([], ["INPUT.FORMAT", "L"], "INPUT.FORMAT is 'L'"),
        ([], ["MODEL.EFFICIENTNET.NAME", "efficientnet-b42"], "Unknown MODEL.EFFICIENTNET.NAME"),
        ([], ["MODEL.WEIGHTS", "no_such.pth"], "Weights no_such.pth do not exist"),
    ],
)
def test_mistakes(photos, tmp_path, capsys, options, keys, message):
    assert main(_command(photos, tmp_path / "output", *options, keys=keys)) == 2
    assert message in capsys.readouterr().err
    # Corrected, the same command with the same output must not be refused for what the mistake left there.
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(("count", "message"), [(0, "holds no image"), (1, "there are only 1")])
def test_too_few_images(photos, tmp_path, capsys, count, message):
    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(count):
        shutil.copy(photos / f"{i}.png", folder)
    assert main(_command(folder, tmp_path / "output")) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(photos, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear reader")
    assert main(_command(photos, tmp_path)) == 2
    assert "is not empty and has no simclr.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_loss_that_is_not_finite_stops_before_the_weights(photos, tmp_path, monkeypatch, capsys):
    forward = SimCLR.forward
    calls = []

    def overflowing(model, views):
        calls.append(None)
        scale = math.inf if len(calls) == 4 else 1.0
        return {name: loss * scale for name, loss in forward(model, views).items()}

    monkeypatch.setattr(SimCLR, "forward", overflowing)
    assert main(_command(photos, tmp_path / "output")) == 1
    assert "The contrastive loss is not finite at step 3: lower --learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "output" / "backbone.pth").exists()


def test_without_lightly(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    assert main(_command(photos, tmp_path / "output")) == 2
    assert "pip install lightly" in capsys.readouterr().err


def test_it_starts_from_weights(photos, undisturbed, tmp_path):
    """With a learning rate of next to nothing, the weights given come out again."""
    output = tmp_path / "continued"
    options = ["--epochs", "1", "--warmup-epochs", "0", "--learning-rate", "1e-12"]
    given = undisturbed / "backbone.pth"
    assert main(_command(photos, output, *options, keys=["MODEL.WEIGHTS", str(given)])) == 0
    one, other = (torch.load(f / "backbone.pth", weights_only=True)["model"] for f in (undisturbed, output))
    for name in one:
        if name.endswith("weight"):
            assert torch.allclose(one[name], other[name], atol=1e-6), name
