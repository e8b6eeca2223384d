"""Schedule, weight decay and precision: the paper's, by detectron2's own functions."""

import math

import pytest
import torch
from detectron2.modeling import build_model

from selftrain_d2 import InputError, SelfTrainingTrainer
from selftrain_d2.engine.config_checks import amp_precision


def _tf_rate(step, rate, warmup_rate, warmup_steps, total_steps):
    """[TF] modeling/learning_rates.py."""
    if step < warmup_steps:
        return warmup_rate + step / warmup_steps * (rate - warmup_rate)
    return rate * (math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)) + 1) / 2


def test_schedule_is_the_papers(small_config):
    small_config.SOLVER.BASE_LR, small_config.SOLVER.WARMUP_ITERS, small_config.SOLVER.MAX_ITER = (
        0.32,
        1000,
        45000,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.32)
    scheduler = SelfTrainingTrainer.build_lr_scheduler(small_config, optimizer)
    checked = {0, 1, 2, 500, 999, 1000, 1001, 1500, 10000, 22500, 44000, 44998, 44999}
    for step in range(45000):
        if step in checked:
            expected = _tf_rate(step, 0.32, 0.0032, 1000, 45000)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9, abs=1e-12), step
        scheduler.last_epoch += 1
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr()):
            group["lr"] = rate
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_warmup_longer_than_the_training_is_refused(small_config):
    small_config.SOLVER.WARMUP_ITERS, small_config.SOLVER.MAX_ITER = 1000, 500
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.32)
    with pytest.raises(InputError, match=r"SOLVER\.WARMUP_ITERS is 1000.*500"):
        SelfTrainingTrainer.build_lr_scheduler(small_config, optimizer)


def _decay_by_name(cfg):
    model = build_model(cfg)
    optimizer = SelfTrainingTrainer.build_optimizer(cfg, model)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    return {name: (p, decay[id(p)]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
@pytest.mark.parametrize(
    "backbone", ["build_retinanet_efficientnet_fpn_backbone", "build_retinanet_resnet_fpn_p5_backbone"]
)
def test_only_kernels_of_convolutions_decay(small_config, backbone, norm):
    small_config.MODEL.BACKBONE.NAME = backbone
    small_config.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    for keys in (small_config.MODEL.RESNETS, small_config.MODEL.EFFICIENTNET, small_config.MODEL.RETINANET):
        keys.NORM = norm
    decays = _decay_by_name(small_config)
    for name, (parameter, decay) in decays.items():
        assert decay == (1e-4 if parameter.dim() == 4 else 0.0), name
    assert any(name.startswith("head.cls_subnet.1.4.") for name in decays)  # the norm of a head's level


def test_every_parameter_can_decay(small_config):
    small_config.SOLVER.WEIGHT_DECAY_NORM, small_config.SOLVER.WEIGHT_DECAY_BIAS = 1e-4, None
    assert {decay for _, decay in _decay_by_name(small_config).values()} == {1e-4}


def test_precision_of_mixed_precision(small_config):
    with pytest.raises(InputError, match=r"needs a GPU.*SOLVER\.AMP\.PRECISION bfloat16"):
        amp_precision(small_config)
    small_config.MODEL.DEVICE = "cuda"
    assert amp_precision(small_config) is torch.float16
    small_config.SOLVER.AMP.PRECISION = "bfloat16"
    for small_config.MODEL.DEVICE in ("cuda", "cpu"):
        assert amp_precision(small_config) is torch.bfloat16
    small_config.SOLVER.AMP.PRECISION = "float32"
    with pytest.raises(InputError, match=r"SOLVER\.AMP\.PRECISION is 'float32'"):
        amp_precision(small_config)
