"""The trainer of teachers and students."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, create_ddp_model
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from torch.utils.data import DataLoader

from selftrain_d2.data.loader import build_selftrain_train_loader
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper
from selftrain_d2.engine.loss_normalizer import LossNormalizer
from selftrain_d2.engine.resume import RunState
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint import SafeDetectionCheckpointer, check_input_statistics


class CheckpointFacts:
    """Facts about a run that every checkpoint carries, and a resumed run must share."""

    def __init__(self, facts: dict[str, Any]):
        self.facts = facts

    def state_dict(self) -> dict[str, Any]:
        return self.facts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in self.facts.items():
            if state.get(key) != value:
                raise InputError(
                    f"The checkpoint to resume from has {key} {state.get(key)}, this run has {value}: "
                    "choose another OUTPUT_DIR."
                )


class SelfTrainingTrainer(DefaultTrainer):
    """detectron2's DefaultTrainer for a teacher (no DATASETS.PSEUDO_TRAIN) or a student.

    It differs in its loader (human and pseudo images), its :class:`LossNormalizer`, its COCO evaluation,
    and in checkpoints that run no code. A resumed run goes on with the images that it would have seen.
    """

    def __init__(self, cfg: CfgNode, *, allow_unsafe: bool = False):
        """
        Args:
            cfg: a teacher's or a student's config.
            allow_unsafe: load MODEL.WEIGHTS even if that is a pickle that can run code.
        """
        # DefaultTrainer.__init__ with our checkpointer, which its hooks must already meet.
        super(DefaultTrainer, self).__init__()
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        check_number_of_classes(cfg)
        model = create_ddp_model(model, broadcast_buffers=False)
        self._trainer = (
            AMPTrainer(model, data_loader, optimizer, precision=amp_precision(cfg))
            if cfg.SOLVER.AMP.ENABLED
            else SimpleTrainer(model, data_loader, optimizer)
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeDetectionCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            allow_unsafe=allow_unsafe,
            trainer=weakref.proxy(self),
            # A teacher knows what it detects, and how its images were normalized.
            classes=CheckpointFacts(
                {"thing_classes": list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", []))}
            ),
            input=CheckpointFacts(
                {
                    "format": cfg.INPUT.FORMAT,
                    "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
                    "pixel_std": list(cfg.MODEL.PIXEL_STD),
                }
            ),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As in DefaultTrainer; a resumed run also skips the images already seen."""
        super().resume_or_load(resume)
        if self.checkpointer.report is not None and not self.start_iter:
            check_input_statistics(self.checkpointer.report.input, self.cfg)
        self.data_loader.batch_sampler.first_batch = self.start_iter

    def build_hooks(self) -> list[HookBase]:
        """DefaultTrainer's hooks between ours: each checkpoint must hold this step's averages."""
        return [build_loss_normalizer(self.cfg), *super().build_hooks(), RunState()]

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        return build_selftrain_train_loader(cfg)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        if cfg.SOLVER.RESCALE_INTERVAL and cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER:
            # detectron2 would divide by zero after the last step.
            raise InputError(
                f"SOLVER.WARMUP_ITERS is {cfg.SOLVER.WARMUP_ITERS}, which leaves nothing of SOLVER.MAX_ITER "
                f"{cfg.SOLVER.MAX_ITER} after the warm-up: make it smaller."
            )
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_detection_test_loader(
            cfg, dataset_name, mapper=SelfTrainingDatasetMapper(cfg, is_train=False)
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators=None) -> dict[str, Any]:
        """As DefaultTrainer's, leaving random states alone: training does not depend on TEST.EVAL_PERIOD."""
        with torch.random.fork_rng():
            return super().test(cfg, model, evaluators)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


def build_loss_normalizer(cfg: CfgNode) -> LossNormalizer:
    """The hook that a config describes (keys SELFTRAIN.*)."""
    return LossNormalizer(cfg.SELFTRAIN.ALPHA, cfg.SELFTRAIN.EMA_DECAY, cfg.SELFTRAIN.NORMALIZE_LOSS)


def amp_precision(cfg: CfgNode) -> torch.dtype:
    """The data type that SOLVER.AMP.PRECISION names.

    Raises:
        InputError: neither float16 nor bfloat16, or no GPU to use it.
    """
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        raise InputError(
            f"Mixed precision needs a GPU, MODEL.DEVICE is {cfg.MODEL.DEVICE}: set SOLVER.AMP.ENABLED False."
        )
    if cfg.SOLVER.AMP.PRECISION not in ("float16", "bfloat16"):
        raise InputError(
            f"SOLVER.AMP.PRECISION is {cfg.SOLVER.AMP.PRECISION!r}: it must be float16 or bfloat16."
        )
    return getattr(torch, cfg.SOLVER.AMP.PRECISION)


def check_number_of_classes(cfg: CfgNode) -> None:
    """Raise InputError unless the detector has as many classes as the data."""
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    if classes is None:
        return
    if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        key, number = "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    else:
        key, number = "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if number != len(classes):
        raise InputError(
            f"{key} is {number}, but {cfg.DATASETS.TRAIN[0]!r} has {len(classes)} classes: {classes}."
        )
