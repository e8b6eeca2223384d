"""Last steps on human labels alone: learning rates worked by hand, images, losses, and a run that goes on."""

import math

import pytest
import torch
from detectron2.engine import HookBase

from selftrain_d2 import InputError, SelfTrainingTrainer
from selftrain_d2.engine.checks import check_training


def _learning_rates(cfg):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    schedule = SelfTrainingTrainer.build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_the_schedule_ends_before_them_and_they_have_a_constant(small_config):
    cfg = small_config
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 10, 0.02, 0
    cfg.SELFTRAIN.REFINE_ITERS, cfg.SELFTRAIN.REFINE_LR_FACTOR = 4, 0.25
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.STEPS, cfg.SOLVER.GAMMA = "WarmupMultiStepLR", (3,), 0.1
    assert _learning_rates(cfg) == pytest.approx([0.02] * 3 + [0.002] * 3 + [0.005] * 4)
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cosine = [0.01 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert _learning_rates(cfg) == pytest.approx(cosine + [0.005] * 4)


@pytest.mark.parametrize("number", [4, 5])
def test_they_leave_steps_for_pseudo_labels(student_config, number):
    student_config.SELFTRAIN.REFINE_ITERS = number  # of 4 steps
    with pytest.raises(
        InputError, match=rf"REFINE_ITERS is {number}, which leaves nothing of SOLVER.MAX_ITER 4"
    ):
        check_training(student_config)


class _Record(HookBase):
    """What each step was trained on."""

    def __init__(self):
        self.images, self.rates, self.raw = [], [], []

    def before_train(self):
        model = self.trainer.model
        model.register_forward_pre_hook(lambda _, arguments: self.images.append(arguments[0]))

    def before_step(self):
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])

    def after_step(self):
        self.raw.append(dict(self.trainer.model.raw_losses))


def _trained(cfg, resume=False):
    torch.manual_seed(0)
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(resume)
    record = _Record()
    trainer.register_hooks([record])
    trainer.train()
    return trainer, record


def _human(batch):
    return [(x["file_name"], x["image"].sum().item()) for x in batch if x["label_source"] == "human"]


def test_student_and_control_have_the_same_last_steps(student_config, tmp_path):
    cfg = student_config
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    cfg.SELFTRAIN.REFINE_ITERS, cfg.SELFTRAIN.REFINE_LR_FACTOR = 2, 0.5
    trainer, student = _trained(cfg)
    assert [[x["label_source"] for x in batch] for batch in student.images] == [
        ["human", "human", "pseudo"], ["human", "human", "pseudo"], ["human", "human"], ["human", "human"],
    ]  # fmt: skip
    assert [raw["pseudo"] is None for raw in student.raw] == [False, False, True, True]
    # The whole loss of a last step is its human one: nothing is left to weigh it against.
    total = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert total[2:] == pytest.approx([raw["human"].item() for raw in student.raw[2:]], rel=1e-5)
    hooks = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["trainer"]["hooks"]
    assert hooks["LossNormalizer"]["steps"] == hooks["LossNormalizer"]["pseudo_count"] == 2

    # Going on from step 3, among the last ones, gives the same weights.
    final = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000002.pth")
    resumed, _ = _trained(cfg, resume=True)
    assert resumed.start_iter == 3
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, final[name]), name

    cfg.DATASETS.PSEUDO_TRAIN, cfg.SOLVER.PSEUDO_IMS_PER_BATCH = (), 0
    cfg.SELFTRAIN.STAGE, cfg.OUTPUT_DIR = 1, str(tmp_path / "control")
    _, control = _trained(cfg)
    assert control.rates == student.rates and control.rates[2:] == [0.005, 0.005]
    assert [_human(batch) for batch in control.images] == [_human(batch) for batch in student.images]
