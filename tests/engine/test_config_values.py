"""A user's config values: KEY VALUE pairs, and values that cannot be."""

import re

import pytest
import torch
from detectron2.solver import build_lr_scheduler

from selftrain_d2.engine.config_values import LR_SCHEDULERS, RULES, check_values, merge_options
from selftrain_d2.errors import InputError

# Key -> values that are refused, and values at the edge of what is allowed.
VALUES = {
    "MODEL.META_ARCHITECTURE": (["RetinaNett", ""], ["RetinaNet", "SelfTrainingSegmentor"]),
    "MODEL.BACKBONE.NAME": (["resnet"], ["build_nas_fpn_backbone"]),
    "MODEL.DEVICE": (["gpu", "", "cuda:x", "cpu:one", "meta"], ["cpu", "cuda"]),
    "MODEL.RETINANET.ACTIVATION": (["Relu", "gelu"], ["relu", "swish"]),
    "MODEL.RETINANET.CONV_DIM": ([-1], [0, 128]),
    "MODEL.SPINENET.NAME": (["spinenet-50", ""], ["spinenet-49s", "spinenet-190"]),
    "MODEL.SPINENET.ACTIVATION": (["Relu", ""], ["relu", "swish"]),
    "MODEL.SPINENET.DROP_CONNECT_RATE": ([-0.1, 1.0, float("nan")], [0.0, 0.99]),
    "MODEL.SPINENET.OUT_CHANNELS": ([-1], [0, 128]),
    "MODEL.SPINENET.RESAMPLING": (["max", ""], ["pool", "repeated_pool", "conv"]),
    "MODEL.BIFPN.ATTENTION": (["softmax", ""], ["fast", "sum"]),
    "MODEL.BIFPN.REPEATS": ([0], [1]),
    "DATALOADER.NUM_WORKERS": ([-1], [0]),
    "SOLVER.BASE_LR": ([-0.1, float("nan")], [0.0]),
    "SOLVER.CHECKPOINT_PERIOD": ([0, -5], [1]),
    "SOLVER.CHECKPOINTS_TO_KEEP": ([-1], [0, 2]),
    "SOLVER.LR_SCHEDULER_NAME": (["Cosine", "warmupcosinelr"], LR_SCHEDULERS),
    "SOLVER.MAX_ITER": ([0, -1], [1]),
    "SOLVER.MAX_SKIPPED_STEPS": ([-1], [0]),
    "SOLVER.WARMUP_METHOD": (["exponential"], ["constant", "linear"]),
    "DATALOADER.SAMPLER_TRAIN": (["Foo"], ["TrainingSampler", "RepeatFactorTrainingSampler"]),
    "DATALOADER.PSEUDO_SAMPLER_TRAIN": (["Foo"], ["TrainingSampler"]),
    "SOLVER.IMS_PER_BATCH": ([0, -2], [1]),
    "SOLVER.PSEUDO_IMS_PER_BATCH": ([-1], [0, 2]),
    "SOLVER.CLASSIFICATION_IMS_PER_BATCH": ([-1], [0]),
    "INPUT.CLASSIFICATION_IMAGE_SIZE": ([-1], [0, 32]),
    "SELFTRAIN.CLASSIFICATION_LOSS_WEIGHT": ([-0.1, float("nan")], [0.0, 0.5]),
    "SELFTRAIN.IGNORE_SCORE_THRESH": ([-0.1, 1.1, float("nan")], [0.0, 1.0]),
    "SELFTRAIN.LOCALIZATION_THRESH": ([-0.1, 1.1, float("nan")], [0.0, 1.0]),
    "SELFTRAIN.IGNORE_OVERLAP": (["IoU", ""], ["iou", "covered"]),
    "SELFTRAIN.IGNORE_OVERLAP_THRESH": ([0.0, 1.1, float("nan")], [0.01, 1.0]),
    "SELFTRAIN.MAX_BOXES_RATIO": ([0.0, -1.0, float("nan")], [0.1, float("inf")]),
    "SELFTRAIN.MAX_LOSS_RATIO": ([0.0, -1.0, float("nan")], [0.1, float("inf")]),
    "SELFTRAIN.STAGE": ([-2], [-1, 0, 3]),
    "SELFTRAIN.TTA.SCORES": (["max", ""], ["best", "mean"]),
    "SELFTRAIN.TTA.BOX_VOTING": ([1.1, -0.1, float("nan")], [0.0, 0.6, 1.0]),
    "SELFTRAIN.TEACHER_CHECKPOINT": (["first", ""], ["last", "best"]),
    "SELFTRAIN.TRACKERS": ([("tensorboard",), ("wandb", "wandb")], [(), ("wandb", "mlflow")]),
    "SELFTRAIN.MIN_NONEMPTY_SHARE": ([1.1, -0.1, float("nan")], [0.0, 1.0]),
    "SELFTRAIN.TAKE_OVER_SECONDS": ([0.0, -1.0, float("nan")], [0.5, float("inf")]),
    "SELFTRAIN.TEACHER": (["moving-average", ""], ["labels", "moving_average"]),
    "SELFTRAIN.TEACHER_EMA_DECAY": ([0.0, 1.0, float("nan")], [0.5, 0.9996]),
    "SELFTRAIN.TEACHER_CHECK_PERIOD": ([-1], [0, 100]),
    "SELFTRAIN.THRESHOLDS": (["count", ""], ["fixed", "counts"]),
    "SELFTRAIN.IGNORE_COUNT_RATIO": ([0.9, float("nan"), float("inf")], [1.0, 3.0]),
    "SELFTRAIN.REFINE_ITERS": ([-1], [0, 10]),
    "SELFTRAIN.REFINE_LR_FACTOR": ([0.0, -0.1, float("nan"), float("inf")], [0.01, 1.0]),
}


def test_every_rule_is_tested():
    assert VALUES.keys() == RULES.keys()


@pytest.mark.parametrize(("key", "value"), [(key, v) for key, (wrong, _) in VALUES.items() for v in wrong])
def test_values_that_cannot_be(small_config, key, value):
    small_config.merge_from_list([key, value])
    with pytest.raises(InputError, match=rf"^{key} is {re.escape(repr(value))}: it must be .*\.$"):
        check_values(small_config)


@pytest.mark.parametrize(("key", "value"), [(key, v) for key, (_, right) in VALUES.items() for v in right])
def test_values_at_the_edge(small_config, key, value):
    small_config.merge_from_list([key, value])
    check_values(small_config)


def test_what_there_is_is_listed(small_config):
    small_config.SOLVER.LR_SCHEDULER_NAME = "Cosine"
    with pytest.raises(InputError, match="WarmupMultiStepLR, WarmupCosineLR, WarmupStepWithFixedGammaLR"):
        check_values(small_config)


def test_detectron2_knows_the_schedulers(small_config):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for name in LR_SCHEDULERS:
        small_config.SOLVER.LR_SCHEDULER_NAME = name
        build_lr_scheduler(small_config, optimizer)
    small_config.SOLVER.LR_SCHEDULER_NAME = "Cosine"
    with pytest.raises(ValueError, match="Unknown LR scheduler"):
        build_lr_scheduler(small_config, optimizer)


@pytest.mark.parametrize(
    ("gpus", "device", "allowed"), [(2, "cuda:1", True), (2, "cuda:2", False), (0, "cuda:2", True)]
)
def test_gpus_are_counted(small_config, monkeypatch, gpus, device, allowed):
    """Without any GPU training falls back to the CPU, so any is allowed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    small_config.MODEL.DEVICE = device
    if allowed:
        check_values(small_config)
    else:
        with pytest.raises(InputError, match=r"MODEL\.DEVICE is 'cuda:2'"):
            check_values(small_config)


# ---- KEY VALUE pairs ----
@pytest.mark.parametrize(
    ("text", "value"), [("1", 1.0), ("+2", 2.0), ("0.25", 0.25), ("1e-3", 0.001), ("-3", -3.0)]
)
def test_whole_numbers_fit_keys_with_a_fraction(small_config, text, value):
    merge_options(small_config, ["SELFTRAIN.ALPHA", text])
    alpha = small_config.SELFTRAIN.ALPHA
    assert isinstance(alpha, float) and alpha == value


def test_other_types_stay_strict(small_config):
    merge_options(small_config, ["SOLVER.MAX_ITER", "7", "MODEL.WEIGHTS", "7.pth"])
    assert small_config.SOLVER.MAX_ITER == 7 and small_config.MODEL.WEIGHTS == "7.pth"
    for key, text in (("SOLVER.MAX_ITER", "7.5"), ("SELFTRAIN.ALPHA", "much"), ("SELFTRAIN.ALPHA.MORE", "1")):
        with pytest.raises(InputError, match=key):
            merge_options(small_config, [key, text])


def test_pairs_of_a_config_file_have_types(small_config):
    """SELFTRAIN.STUDENT holds numbers as well as words."""
    merge_options(small_config, ("SOLVER.MAX_ITER", 7, "SOLVER.BASE_LR", 1, "MODEL.WEIGHTS", "a.pth"))
    assert (small_config.SOLVER.MAX_ITER, small_config.SOLVER.BASE_LR) == (7, 1.0)
