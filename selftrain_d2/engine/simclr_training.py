"""The training run of SimCLR: its settings, its step, its log."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.engine import HookBase, create_ddp_model, default_writers, hooks
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils import comm
from fvcore.common.param_scheduler import CosineParamScheduler
from torch.utils.data import DataLoader

from selftrain_d2.data.contrastive_views import ContrastiveViews, EpochBatchSampler
from selftrain_d2.data.loader import MixedDataset, use_one_thread
from selftrain_d2.engine.config_checks import amp_precision
from selftrain_d2.engine.orderly_end import OrderlyEnd
from selftrain_d2.engine.resume import RunState
from selftrain_d2.engine.run_folder import drop_rows
from selftrain_d2.engine.step_trainer import NonFiniteLossError, StepTrainer
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint import (
    SafeDetectionCheckpointer,
    check_input_statistics,
    load_weights,
)
from selftrain_d2.modeling.simclr import SimCLR, build_bottom_up

logger = logging.getLogger(__name__)

MOMENTUM = 0.9  # [SimCLR] B.9 and its code
_CHECKPOINTS_TO_KEEP = 2  # the last may be damaged


@dataclasses.dataclass
class SimCLRSettings:
    """How to pre-train.

    Attributes:
        epochs: passes over the images; the schedule's length.
        batch_size: images a step, two views each, over all processes.
        learning_rate: of SGD, after the warm-up; a cosine takes it to zero.
        warmup_epochs: linear, from zero; may be a fraction.
        weight_decay: of convolutions and linear layers, not of batch norm and biases.
        temperature: of the loss.
        crop_size: side of the views in pixels.
        color_strength: of the colour jitter; the paper has 1 for ImageNet and 0.5 for CIFAR-10.
        gaussian_blur: probability of blur.
    """

    crop_size: int
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.06
    warmup_epochs: float = 1.0
    weight_decay: float = 1e-4
    temperature: float = 0.1
    color_strength: float = 0.5
    gaussian_blur: float = 0.5

    def check(self) -> None:
        """Raise InputError for a value out of its range."""
        for name, right, advice in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 2, "at least 2, since images are compared"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "at least 0 and less than --epochs"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("temperature", 1e-3 <= self.temperature < math.inf, "at least 0.001"),
            ("crop_size", self.crop_size >= 32, "at least 32 pixels"),
            ("color_strength", 0 <= self.color_strength <= 1, "in [0, 1]"),
            ("gaussian_blur", 0 <= self.gaussian_blur <= 1, "in [0, 1]"),
        ):
            if not right:
                value = getattr(self, name)
                raise InputError(f"--{name.replace('_', '-')} is {value}: it must be {advice}.")


class SimCLRTrainer(OrderlyEnd, StepTrainer):
    """The project's step (mixed precision, check of the loss in all processes) for the contrastive loss."""

    def _leave_out(self, batch, losses, buffers) -> None:
        raise NonFiniteLossError(
            f"The contrastive loss is not finite at step {self.iter}: lower --learning-rate, or raise "
            "--warmup-epochs or --temperature, and choose another --output."
        )


class EpochLog(HookBase):
    """One line an epoch: the means of loss and contrastive accuracy over its steps.

    Args:
        steps: of an epoch.
        epochs: in all.
        views: of a step in one process.
    """

    def __init__(self, steps: int, epochs: int, views: int):
        self.steps = steps
        self.epochs = epochs
        self.views = views

    def after_step(self) -> None:
        epoch, rest = divmod(self.trainer.iter + 1, self.steps)
        if rest:
            return
        # A run resumed within the epoch has only the rest of its steps.
        window = min(self.steps, self.trainer.iter + 1 - self.trainer.start_iter)
        history = self.trainer.storage.history
        if comm.is_main_process():
            logger.info(
                f"epoch {epoch}/{self.epochs}: loss {history('total_loss').avg(window):.3f}; "
                f"{100 * history('contrastive_accuracy').avg(window):.1f} % of the views find their image's other view "
                f"among {self.views - 1} (by chance {100 / (self.views - 1):.1f} %)"
            )


def train_simclr(
    cfg: CfgNode, model: SimCLR, paths: list[str], output: Path, settings: SimCLRSettings, seed: int
) -> None:
    """From the last checkpoint in ``output``, if there is one, to the end."""
    sampler = EpochBatchSampler(len(paths), settings.batch_size, seed)
    views = ContrastiveViews(
        size=settings.crop_size,
        color_strength=settings.color_strength,
        gaussian_blur=settings.gaussian_blur,
        image_format=cfg.INPUT.FORMAT,
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
    )
    loader = DataLoader(
        MixedDataset([DatasetFromList(paths, copy=False)], [views], seed),
        batch_sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
        worker_init_fn=use_one_thread,
        generator=torch.Generator().manual_seed(seed),
    )
    steps = sampler.batches_per_epoch
    optimizer = torch.optim.SGD(
        get_default_optimizer_params(model, weight_decay_norm=0.0, weight_decay_bias=0.0),
        lr=settings.learning_rate,
        momentum=MOMENTUM,
        weight_decay=settings.weight_decay,
    )
    schedule = WarmupParamScheduler(CosineParamScheduler(1, 0), 0.0, settings.warmup_epochs / settings.epochs)
    devices = {} if cfg.MODEL.DEVICE.startswith("cuda") else {"device_ids": None}
    trainer = SimCLRTrainer(
        create_ddp_model(model, broadcast_buffers=False, **devices),
        loader,
        optimizer,
        precision=amp_precision(cfg) if cfg.SOLVER.AMP.ENABLED else None,
    )
    max_iter = steps * settings.epochs
    checkpointer = SafeDetectionCheckpointer(model, str(output), trainer=trainer)
    main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, LRMultiplier(optimizer, schedule, max_iter)),
            EpochLog(steps, settings.epochs, 2 * settings.batch_size // comm.get_world_size()),
            hooks.PeriodicCheckpointer(checkpointer, steps, max_to_keep=_CHECKPOINTS_TO_KEEP)
            if main
            else None,
            RunState(seed),
            hooks.PeriodicWriter(default_writers(str(output), max_iter)) if main else None,
        ]
    )
    start = 0
    if checkpointer.has_checkpoint():
        checkpointer.resume_or_load("", resume=True)
        start = trainer.iter + 1
    logger.info(
        f"SimCLR on {len(paths)} images: {settings.epochs} epochs of {steps} steps"
        + (f", of which {start} steps are done." if start else ".")
    )
    if main:
        drop_rows(output / "metrics.json", start)
    if start < max_iter:
        sampler.first_batch = start
        trainer.train(start, max_iter)


def build_simclr(cfg: CfgNode, settings: SimCLRSettings, allow_unsafe: bool) -> SimCLR:
    backbone = build_bottom_up(cfg)
    if cfg.MODEL.WEIGHTS:
        check_input_statistics(load_weights(backbone, cfg.MODEL.WEIGHTS, allow_unsafe).input, cfg)
    model = SimCLR(backbone, settings.temperature).to(cfg.MODEL.DEVICE)
    if comm.get_world_size() > 1 and cfg.MODEL.DEVICE.startswith("cuda"):
        # Statistics of one process alone would give away which views share it.
        model.head = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.head)
    return model
