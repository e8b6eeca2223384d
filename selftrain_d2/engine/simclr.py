"""SimCLR pre-training of a detector's backbone on images without labels."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.engine import HookBase, create_ddp_model, default_writers, hooks
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from fvcore.common.param_scheduler import CosineParamScheduler
from torch.utils.data import DataLoader

from selftrain_d2.data.contrastive_views import ContrastiveViews, EpochBatchSampler, ReadabilityCheck
from selftrain_d2.data.image_sources import check_distinct
from selftrain_d2.data.loader import MixedDataset, use_one_thread
from selftrain_d2.data.pseudo_labels.manifest import NameHash
from selftrain_d2.engine.logs import log_to_console, log_to_file
from selftrain_d2.engine.orderly_end import OrderlyEnd
from selftrain_d2.engine.resume import RunState
from selftrain_d2.engine.run_folder import drop_rows, held
from selftrain_d2.engine.step_trainer import NonFiniteLossError, StepTrainer
from selftrain_d2.engine.trainer import amp_precision
from selftrain_d2.errors import InputError
from selftrain_d2.files import NO_ROOM, check_unchanged, is_empty, read_json, write_json, writing
from selftrain_d2.modeling.checkpoint import (
    SafeDetectionCheckpointer,
    check_input_statistics,
    file_sha256,
    load_weights,
)
from selftrain_d2.modeling.checkpoint_file import save_weights
from selftrain_d2.modeling.simclr import SimCLR, build_bottom_up

logger = logging.getLogger(__name__)

#: In the output folder: what the run was begun with, and the images that could not be read.
RECORD = "simclr.json"
#: In the output folder: the pre-trained backbone, for MODEL.WEIGHTS; written last.
BACKBONE = "backbone.pth"

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


def pretrain_simclr(
    cfg: CfgNode,
    image_root: str,
    file_names: Sequence[str],
    output: str | os.PathLike,
    settings: SimCLRSettings,
    *,
    allow_unsafe: bool = False,
) -> Path:
    """Pre-train the backbone of a config and write it as ``backbone.pth``, for MODEL.WEIGHTS.

    Every parameter of the backbone trains, FREEZE_AT or not. MODEL.WEIGHTS, where set, is where it starts.
    Work that was stopped goes on when called again and ends, on a CPU, with the weights of work that was not.
    In several processes (detectron2's ``launch``) each takes its share of every batch.

    Args:
        cfg: a detector's; MODEL.DEVICE, DATALOADER.NUM_WORKERS, SOLVER.AMP and SEED count as in training.
        image_root, file_names: see :class:`~selftrain_d2.data.image_sources.ImageSource`. Images that cannot be
            read are left out and listed in ``output/simclr.json``.
        output: folder to write: checkpoints, ``metrics.json``, ``log.txt``.
        settings: how to train.
        allow_unsafe: load MODEL.WEIGHTS even if that is a pickle that can run code.

    Returns:
        The path of ``backbone.pth``.

    Raises:
        InputError: lightly is not installed; a setting is out of range; fewer readable images than a batch;
            ``output`` holds other work; see also :func:`~selftrain_d2.modeling.simclr.build_bottom_up`.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    _require_lightly()
    settings.check()
    _check_input(cfg)
    if cfg.SOLVER.AMP.ENABLED:
        amp_precision(cfg)
    _check_batch(settings.batch_size, len(file_names), 0)
    output = Path(output)
    check_distinct(file_names, "The list of images")
    identity = _identity(cfg, image_root, file_names, settings)
    record = _read_record(output, identity)
    if comm.all_gather((output / BACKBONE).exists())[0]:
        logger.info(f"{output} is finished already.")
        return output / BACKBONE
    if record is None:
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        record = {"settings": identity, "seed": seed, "skipped": None}
    seed_all_rng(record["seed"] + comm.get_rank())
    model = _build_model(cfg, settings, allow_unsafe)
    if record["skipped"] is None:
        record["skipped"] = _unreadable(cfg, image_root, file_names)
        _check_batch(settings.batch_size, len(file_names), len(record["skipped"]))
    skipped = record["skipped"]
    suffix = f".rank{comm.get_rank()}" if comm.get_rank() else ""
    # All mistakes have been found: the work begins.
    with held(output), writing(output, NO_ROOM), log_to_file(output / f"log.txt{suffix}"):
        if comm.is_main_process() and not (output / RECORD).exists():
            write_json(output / RECORD, record)
        if comm.get_world_size() > 1 and comm.is_main_process():  # a new process
            log_to_console()
        if skipped:
            name, reason = next(iter(skipped.items()))
            logger.warning(
                f"{len(skipped)} images cannot be read and are left out, e.g. {name} ({reason}); all are listed in "
                f"{output / RECORD}."
            )
        paths = [os.path.join(image_root, name) for name in file_names if name not in skipped]
        _train(cfg, model, paths, output, settings, record["seed"])
        if comm.is_main_process():
            _write_backbone(cfg, model, output / BACKBONE, identity)
            logger.info(f"Wrote {output / BACKBONE}: train a detector with MODEL.WEIGHTS {output / BACKBONE}")
    comm.synchronize()
    return output / BACKBONE


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


def _train(
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


def _build_model(cfg: CfgNode, settings: SimCLRSettings, allow_unsafe: bool) -> SimCLR:
    backbone = build_bottom_up(cfg)
    if cfg.MODEL.WEIGHTS:
        check_input_statistics(load_weights(backbone, cfg.MODEL.WEIGHTS, allow_unsafe).input, cfg)
    model = SimCLR(backbone, settings.temperature).to(cfg.MODEL.DEVICE)
    if comm.get_world_size() > 1 and cfg.MODEL.DEVICE.startswith("cuda"):
        # Statistics of one process alone would give away which views share it.
        model.head = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.head)
    return model


def _write_backbone(cfg: CfgNode, model: SimCLR, file: Path, identity: dict[str, Any]) -> None:
    """In the format of ``convert``."""
    content = {
        "model": {
            name: value.detach().cpu().contiguous() for name, value in model.backbone.state_dict().items()
        },
        "matching_heuristics": True,  # names lack the detector's prefix
        "input": {
            "format": cfg.INPUT.FORMAT,
            "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
            "pixel_std": list(cfg.MODEL.PIXEL_STD),
        },
        "source": {"format": "SimCLR pre-training", **identity},
    }
    save_weights(content, file)


def _require_lightly() -> None:
    try:
        import lightly.loss
        import lightly.transforms  # noqa: F401
    except ImportError as error:
        raise InputError(f"SimCLR needs the package lightly ({error}): pip install lightly.") from error


def _check_input(cfg: CfgNode) -> None:
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise InputError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}: SimCLR's colour augmentations need RGB or BGR."
        )
    if not len(cfg.MODEL.PIXEL_MEAN) == len(cfg.MODEL.PIXEL_STD) == 3:
        raise InputError("MODEL.PIXEL_MEAN and MODEL.PIXEL_STD need three values each, one a channel.")


def _check_batch(batch_size: int, images: int, skipped: int) -> None:
    readable, left_out = images - skipped, f" ({skipped} cannot be read)" if skipped else ""
    if readable < 2:
        raise InputError(f"SimCLR compares images, but there are only {readable}{left_out}: give it more.")
    if batch_size > readable:
        raise InputError(
            f"--batch-size is {batch_size}, more than the {readable} images{left_out}: make it at most {readable}."
        )
    if batch_size % comm.get_world_size():
        raise InputError(
            f"--batch-size {batch_size} does not divide by the {comm.get_world_size()} processes."
        )


def _identity(
    cfg: CfgNode, image_root: str, file_names: Sequence[str], settings: SimCLRSettings
) -> dict[str, Any]:
    """What the result depends on, as JSON reads it back."""
    return {
        **dataclasses.asdict(settings),
        "SEED": cfg.SEED,
        "INPUT.FORMAT": cfg.INPUT.FORMAT,
        "MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
        "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
        "SOLVER.AMP": cfg.SOLVER.AMP.dump(),
        "processes": comm.get_world_size(),
        "MODEL.BACKBONE.NAME": cfg.MODEL.BACKBONE.NAME,
        "MODEL.EFFICIENTNET": cfg.MODEL.EFFICIENTNET.dump(),
        "MODEL.RESNETS": cfg.MODEL.RESNETS.dump(),
        "MODEL.FPN.IN_FEATURES": list(cfg.MODEL.FPN.IN_FEATURES),
        "starting weights": file_sha256(cfg.MODEL.WEIGHTS)
        if os.path.isfile(cfg.MODEL.WEIGHTS)
        else cfg.MODEL.WEIGHTS,
        "image root": image_root,
        "images": len(file_names),
        "image names (sha256)": NameHash(file_names).hexdigest(),
    }


def _read_record(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What an unfinished run wrote down, the same in all processes; None if there is none.

    Raises:
        InputError: it had other settings, or the folder holds something else.
    """
    file = output / RECORD
    record = comm.all_gather(read_json(file) if file.exists() else None)[0]
    if record is not None:
        check_unchanged(output, record["settings"], identity)
    elif not is_empty(output, RECORD):
        raise InputError(f"{output} is not empty and has no {RECORD}: choose another output folder.")
    return record


def _unreadable(cfg: CfgNode, image_root: str, file_names: Sequence[str]) -> dict[str, str]:
    """Names of images that cannot be read, with the reason. Each process reads its share."""
    share = file_names[comm.get_rank() :: comm.get_world_size()]
    logger.info(f"Reading {len(file_names)} images once, to leave out what cannot be read.")
    reasons = DataLoader(
        ReadabilityCheck(image_root),
        sampler=share,
        batch_size=None,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        worker_init_fn=use_one_thread,
        generator=torch.Generator(),
    )
    found = {name: reason for name, reason in zip(share, reasons) if reason}
    return {name: reason for part in comm.all_gather(found) for name, reason in part.items()}
