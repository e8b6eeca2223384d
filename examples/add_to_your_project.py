"""Add self-training to a detectron2 project: the project's own trainer, plus two pieces.

The lines between the marks are the recipe. Around them stands a project as many have it: detectron2's
SimpleTrainer with a model, an optimizer and hooks of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer


def train_student(config_file: str, pseudo_label_folder: str, options: Sequence[str] = ()) -> SimpleTrainer:
    """Train RetinaNet on DATASETS.TRAIN and on pseudo labels.

    Args:
        config_file: a RetinaNet config of detectron2, any backbone.
        pseudo_label_folder: what ``selftrain-d2 label`` wrote.
        options: KEY, VALUE, ... to change in the config.
    """
    # ---- the recipe -----------------------------------------------------------------------------
    from selftrain_d2 import (
        LossNormalizer,
        add_selftrain_config,
        build_selftrain_train_loader,
        register_pseudo_labels,
    )

    register_pseudo_labels("my_pseudo_labels", pseudo_label_folder, score_thresh=0.5)
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.merge_from_file(config_file)
    cfg.MODEL.META_ARCHITECTURE = "SelfTrainingRetinaNet"
    cfg.DATASETS.PSEUDO_TRAIN = ("my_pseudo_labels",)
    cfg.SOLVER.PSEUDO_IMS_PER_BATCH = cfg.SOLVER.IMS_PER_BATCH
    cfg.merge_from_list(list(options))
    loader = build_selftrain_train_loader(cfg)
    normalizer = LossNormalizer(cfg.SELFTRAIN.ALPHA, cfg.SELFTRAIN.EMA_DECAY, cfg.SELFTRAIN.NORMALIZE_LOSS)
    # ---------------------------------------------------------------------------------------------
    return _train(cfg, loader, [normalizer])


def _train(cfg: CfgNode, loader, first_hooks: list[HookBase]) -> SimpleTrainer:
    """The project as it was."""
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    trainer = SimpleTrainer(model, loader, optimizer)
    scheduler = build_lr_scheduler(cfg, optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=trainer)
    saving = hooks.PeriodicCheckpointer(checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
    trainer.register_hooks([*first_hooks, hooks.LRScheduler(optimizer, scheduler), saving])
    trainer.train(0, cfg.SOLVER.MAX_ITER)
    return trainer
