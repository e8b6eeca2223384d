import json

import pytest
import torch
from detectron2.engine import AMPTrainer, HookBase

from selftrain_d2 import InputError, LossNormalizer, SelfTrainingTrainer
from selftrain_d2.modeling.checkpoint import SafeDetectionCheckpointer


def _trained(cfg, resume=False):
    torch.manual_seed(0)
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def _normalizer(trainer):
    return next(h for h in trainer._hooks if isinstance(h, LossNormalizer))


def test_checkpoints_hold_classes_and_averages(student_config, tmp_path):
    trainer = _trained(student_config)
    # weights_only: nothing in our own checkpoints needs code
    checkpoint = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    assert checkpoint["classes"] == {"thing_classes": ["red", "green"]}
    assert checkpoint["input"]["format"] == "RGB" and len(checkpoint["input"]["pixel_mean"]) == 3
    assert checkpoint["trainer"]["hooks"]["LossNormalizer"] == _normalizer(trainer).state_dict()


def test_resumed_training_goes_on_with_averages_and_images(student_config, tmp_path):
    _trained(student_config)
    first = torch.load(tmp_path / "output" / "model_0000001.pth", weights_only=True)
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    trainer = SelfTrainingTrainer(student_config)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2 and trainer.data_loader.batch_sampler.first_batch == 2
    assert _normalizer(trainer).state_dict() == first["trainer"]["hooks"]["LossNormalizer"]
    seen = next(iter(trainer.data_loader))
    fresh = iter(SelfTrainingTrainer(student_config).data_loader)
    expected = [next(fresh) for _ in range(3)][2]
    for a, b in zip(seen, expected):
        assert a["file_name"] == b["file_name"] and torch.equal(a["image"], b["image"])


def test_averages_do_not_travel_with_weights(student_config, tmp_path):
    _trained(student_config)
    cfg = student_config.clone()
    cfg.MODEL.WEIGHTS = str(tmp_path / "output" / "model_final.pth")
    cfg.OUTPUT_DIR = str(tmp_path / "next")
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert _normalizer(trainer).state_dict() == {"human_average": None, "pseudo_average": None, "steps": 0}
    assert trainer.start_iter == 0


def test_logged_losses_follow_the_formula(student_config, tmp_path):
    student_config.SELFTRAIN.ALPHA = 2.0
    trainer = _trained(student_config)
    line = json.loads((tmp_path / "output" / "metrics.json").read_text().splitlines()[-1])
    history = {k: [v for v, _ in b.values()] for k, b in trainer.storage.histories().items()}
    for step in range(4):
        total = (
            history["human_loss_weight"][step] * history["human_loss"][step]
            + history["pseudo_loss_weight"][step] * history["pseudo_loss"][step]
        )
        assert history["total_loss"][step] == pytest.approx(total, rel=1e-5)
    assert history["human_loss_weight"] == pytest.approx([1 / 3] * 4)
    ratio = history["human_loss"][0] / history["pseudo_loss"][0]
    assert history["pseudo_loss_weight"][:2] == pytest.approx([2 / 3, 2 / 3 * ratio])
    assert "human_loss_average" in line


class _Extra(HookBase):
    def after_step(self):
        self.trainer.storage.put_scalar("extra", self.trainer.iter, smoothing_hint=False)


def test_what_a_hook_before_the_last_one_logs_is_written(student_config, tmp_path):
    """detectron2's idiom for hooks of one's own."""

    class Trainer(SelfTrainingTrainer):
        def build_hooks(self):
            built = super().build_hooks()
            built.insert(-1, _Extra())
            return built

    student_config.SOLVER.MAX_ITER = 2
    Trainer(student_config).train()
    (line,) = (tmp_path / "output" / "metrics.json").read_text().splitlines()  # at the end, or every 20 steps
    assert json.loads(line)["extra"] == json.loads(line)["iteration"] == 1


def test_with_detectron2s_amp_trainer_unchanged(student_config, monkeypatch):
    """AMPTrainer insists on CUDA; told that it is there, it runs in float32 on the CPU."""
    built = SelfTrainingTrainer(student_config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    trainer = AMPTrainer(built.model, built.data_loader, built.optimizer, grad_scaler=scaler)
    normalizer = LossNormalizer(alpha=0.5)
    trainer.register_hooks([normalizer])
    monkeypatch.setattr("torch.cuda.amp.autocast", lambda dtype: torch.autocast("cpu", enabled=False))
    trainer.train(0, 2)
    assert normalizer.human_average > 0 and normalizer.pseudo_average > 0


def test_resuming_with_other_classes_is_refused(student_config, tmp_path):
    _trained(student_config)
    trainer = SelfTrainingTrainer(student_config)
    trainer.checkpointer.checkpointables["classes"].facts = {"thing_classes": ["cat", "dog"]}
    with pytest.raises(InputError, match="cat"):
        trainer.resume_or_load(resume=True)
    assert isinstance(trainer.checkpointer, SafeDetectionCheckpointer)


def test_weights_of_another_normalization_are_warned_about(student_config, tmp_path, caplog):
    _trained(student_config)
    cfg = student_config.clone()
    cfg.MODEL.WEIGHTS = str(tmp_path / "output" / "model_final.pth")
    cfg.OUTPUT_DIR = str(tmp_path / "next")
    with caplog.at_level("WARNING", "selftrain_d2"):
        SelfTrainingTrainer(cfg).resume_or_load(resume=False)
        assert "another input" not in caplog.text
        cfg.INPUT.FORMAT = "BGR"
        SelfTrainingTrainer(cfg).resume_or_load(resume=False)
        assert "INPUT.FORMAT RGB" in caplog.text
