"""The checks of a training run that need neither images, nor weights, nor a GPU."""

from __future__ import annotations

from collections.abc import Collection

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from selftrain_d2.data.classification import classification_classes
from selftrain_d2.data.training_sets import check_classes, check_sources, labeled_in_the_step
from selftrain_d2.engine.config_checks import (
    amp_precision,
    check_accumulation_steps,
    check_best_metric,
    check_number_of_classes,
    check_reference_world_size,
    check_score_weights,
    check_test_sets,
)
from selftrain_d2.engine.hooks.loss_normalizer import check_keeps_losses_apart
from selftrain_d2.engine.hooks.moving_teacher import step_selection
from selftrain_d2.engine.hooks.weight_average import WeightAverage
from selftrain_d2.engine.trackers import check_trackers
from selftrain_d2.engine.trainer import SelfTrainingTrainer, build_loss_normalizer
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.meta_arch.classification import add_classification_head


def check_training(cfg: CfgNode, processes: int = 1, unread: Collection[str] = ()) -> nn.Module:
    """Make the checks of :class:`SelfTrainingTrainer` on a config, without its data.

    Args:
        cfg: a teacher's or a student's config; its datasets are registered.
        processes: in how many it will run.
        unread: datasets of which nothing but the name is known: their classes are not checked.

    Returns:
        The model, on the meta device (see :func:`build_without_memory`).

    Raises:
        InputError: as the trainer.
    """
    check_sources(cfg)
    if cfg.DATASETS.TEST:
        check_test_sets(cfg)
    human = cfg.DATASETS.TRAIN[0]
    if human not in unread:
        for names, kind in (
            (cfg.DATASETS.TRAIN[1:], "human-labeled"),
            (cfg.DATASETS.PSEUDO_TRAIN, "pseudo-labeled"),
            (cfg.DATASETS.TEST, "evaluation"),
        ):
            check_classes(human, [name for name in names if name not in unread], kind)
        check_number_of_classes(cfg)
    check_best_metric(cfg)
    check_trackers(cfg)
    check_reference_world_size(cfg, processes)
    check_accumulation_steps(cfg, processes)
    if cfg.SOLVER.AMP.ENABLED:
        amp_precision(cfg)
    build_loss_normalizer(cfg)
    if cfg.SELFTRAIN.WEIGHT_EMA_DECAY:
        WeightAverage(cfg.SELFTRAIN.WEIGHT_EMA_DECAY)
    if labeled_in_the_step(cfg) and human not in unread:
        step_selection(cfg)
    model = build_without_memory(cfg)
    check_keeps_losses_apart(model)
    check_score_weights(cfg, model)
    if not set(cfg.DATASETS.CLASSIFICATION_TRAIN) & set(unread) and (classes := classification_classes(cfg)):
        add_classification_head(model, len(classes), cfg.SELFTRAIN.CLASSIFICATION_LOSS_WEIGHT)
    SelfTrainingTrainer.build_lr_scheduler(cfg, SelfTrainingTrainer.build_optimizer(cfg, model))
    return model


def build_without_memory(cfg: CfgNode) -> nn.Module:
    """A config's model on the meta device: layers and shapes, but no values."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def check_pseudo_masks(teacher: CfgNode, student: CfgNode) -> None:
    """Check that a student that learns masks of objects can learn its teacher's.

    Raises:
        InputError: the teacher makes none, or the student reads polygons alone.
    """
    if not teacher.MODEL.MASK_ON:
        raise InputError(
            "The student learns masks (MODEL.MASK_ON), but its teacher makes none: set it for both or for neither."
        )
    if student.INPUT.MASK_FORMAT != "bitmask":
        raise InputError(
            f"INPUT.MASK_FORMAT of the student is {student.INPUT.MASK_FORMAT}, but pseudo masks are bitmasks: set "
            "SELFTRAIN.STUDENT \"('INPUT.MASK_FORMAT', 'bitmask')\", which takes polygons of people as well."
        )
