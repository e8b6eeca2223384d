"""The trainer of teachers and students."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, SemSegEvaluator
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch.utils.data import DataLoader

from selftrain_d2.data.classification import classification_classes
from selftrain_d2.data.coco_datasets import reading_coco
from selftrain_d2.data.datasets import class_names
from selftrain_d2.data.label_maps import read_label_map
from selftrain_d2.data.loader import build_selftrain_train_loader
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper
from selftrain_d2.data.random_state import stage_seed
from selftrain_d2.data.training_sets import check_classes, labeled_in_the_step
from selftrain_d2.engine.checkpoint_facts import CheckpointFacts, Classifiers, Stage
from selftrain_d2.engine.coco_evaluation import RepairedCOCOEvaluator, check_evaluation
from selftrain_d2.engine.config_checks import (
    amp_precision,
    check_accumulation_steps,
    check_best_metric,
    check_number_of_classes,
    check_reference_world_size,
    check_score_weights,
    check_test_sets,
)
from selftrain_d2.engine.config_values import one_line
from selftrain_d2.engine.hooks.gradient_check import GradientCheck
from selftrain_d2.engine.hooks.label_monitor import LabelMonitor
from selftrain_d2.engine.hooks.loss_normalizer import LossNormalizer, model_of
from selftrain_d2.engine.hooks.moving_teacher import build_moving_teacher
from selftrain_d2.engine.hooks.weight_average import WeightAverage
from selftrain_d2.engine.kept_checkpoints import BestCheckpoint, LastCheckpoints
from selftrain_d2.engine.orderly_end import OrderlyEnd
from selftrain_d2.engine.refine import refining_schedule
from selftrain_d2.engine.replay import save_batch
from selftrain_d2.engine.resume import RunState, optimizer_options, set_optimizer_options
from selftrain_d2.engine.run_folder import MOVING_TEACHER
from selftrain_d2.engine.stage import with_stage
from selftrain_d2.engine.step_trainer import StepTrainer
from selftrain_d2.engine.trackers import Tracker, build_trackers, check_trackers
from selftrain_d2.engine.validation_loss import ValidationLoss, add_to_results
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint import (
    WEIGHT_AVERAGE,
    SafeDetectionCheckpointer,
    anchor_sizes,
    check_input_statistics,
    other_anchors,
    require_complete,
    require_same_model,
)
from selftrain_d2.modeling.meta_arch import add_classification_head
from selftrain_d2.processes import on_main_process

logger = logging.getLogger(__name__)


class SelfTrainingTrainer(OrderlyEnd, DefaultTrainer):
    """detectron2's DefaultTrainer for a teacher (no DATASETS.PSEUDO_TRAIN) or a student.

    It differs in its loader (human and pseudo images), its :class:`LossNormalizer`, its step
    (:class:`StepTrainer`), its COCO evaluation, and in checkpoints that run no code. A resumed run goes on with
    the images that it would have seen. With DATASETS.CLASSIFICATION_TRAIN the model has a head for joint training.
    With SELFTRAIN.WEIGHT_EMA_DECAY the averaged weights are evaluated, and saved at the end as
    ``OUTPUT_DIR/weight_average/model_final.pth``. With SELFTRAIN.TEACHER "moving_average" pseudo-labeled images get
    their labels in each step (:class:`~selftrain_d2.engine.hooks.moving_teacher.MovingTeacher`), from weights that are
    saved at the end as ``OUTPUT_DIR/moving_teacher/model_final.pth``. With TEST.BEST_METRIC the best weights of all
    that were evaluated are in ``OUTPUT_DIR/best/model_best.pth``.
    """

    def __init__(self, cfg: CfgNode, *, allow_unsafe: bool = False):
        """
        Args:
            cfg: a teacher's or a student's config.
            allow_unsafe: load MODEL.WEIGHTS even if that is a pickle that can run code.
        """
        # DefaultTrainer.__init__ with our checkpointer, which its hooks must already meet.
        super(DefaultTrainer, self).__init__()
        check_reference_world_size(cfg)
        cfg = with_stage(cfg)
        model = self.build_model(cfg)
        check_score_weights(cfg, model)
        classes = classification_classes(cfg)
        if classes:  # here, not in build_model: only training needs the head
            add_classification_head(model, len(classes), cfg.SELFTRAIN.CLASSIFICATION_LOSS_WEIGHT)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        check_number_of_classes(cfg)
        check_best_metric(cfg, own_evaluation=self._evaluates_otherwise())
        check_trackers(cfg)
        if cfg.DATASETS.TEST:  # a mistake is told now, not after training
            check_test_sets(cfg)
            check_evaluation(cfg)
            check_classes(cfg.DATASETS.TRAIN[0], cfg.DATASETS.TEST, "evaluation")
        # The CPU's backend takes no device.
        devices = {} if cfg.MODEL.DEVICE.startswith("cuda") else {"device_ids": None}
        model = create_ddp_model(model, broadcast_buffers=False, **devices)
        self._trainer = StepTrainer(
            model,
            data_loader,
            optimizer,
            accumulation_steps=check_accumulation_steps(cfg),
            precision=amp_precision(cfg) if cfg.SOLVER.AMP.ENABLED else None,
            max_skipped_steps=cfg.SOLVER.MAX_SKIPPED_STEPS,
            save_batch=self._save_batch,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # A teacher knows what it detects, how its images were normalized, and what its boxes are relative to.
        self._facts = {
            "classes": CheckpointFacts({"thing_classes": list(class_names(cfg.DATASETS.TRAIN[0]) or [])}),
            "stage": Stage(cfg.SELFTRAIN.STAGE),
            "classification": CheckpointFacts({"classification_classes": classes}),
            "anchors": CheckpointFacts({"anchor_sizes": anchor_sizes(cfg)}),
            "input": CheckpointFacts(
                {
                    "format": cfg.INPUT.FORMAT,
                    "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
                    "pixel_std": list(cfg.MODEL.PIXEL_STD),
                }
            ),
        }
        self.checkpointer = SafeDetectionCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            allow_unsafe=allow_unsafe,
            **self._facts,  # first: an optimizer of another model would fail with less to go by
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.trackers: list[Tracker] = []
        self.best_checkpoint = self.validation_loss = None
        if cfg.TEST.BEST_METRIC:
            self.best_checkpoint = BestCheckpoint(cfg.TEST.BEST_METRIC, cfg.OUTPUT_DIR, self._facts)
        if cfg.TEST.VALIDATION_LOSS and cfg.DATASETS.TEST:
            self.validation_loss = ValidationLoss(cfg)
        self.register_hooks(self.build_hooks())
        if self.moving_teacher is not None:
            self._trainer.prepare_batch = self.moving_teacher.label

    def resume_or_load(self, resume: bool = True) -> None:
        """As in DefaultTrainer; a resumed run also skips the images already seen.

        The optimizer goes on with the config's SOLVER.BASE_LR, WEIGHT_DECAY and MOMENTUM, not with the checkpoint's.

        Raises:
            InputError: the checkpoint to resume from is of another model, or of a step after SOLVER.MAX_ITER; weights
                to start from are of other classes, see :class:`Classifiers`.
        """
        options = optimizer_options(self.optimizer)
        classifiers = Classifiers(self.cfg, self.checkpointer.model, self._facts)
        super().resume_or_load(resume)
        if self.start_iter > self.max_iter:
            raise InputError(
                f"The last checkpoint in {self.cfg.OUTPUT_DIR} has {self.start_iter} steps, more than SOLVER.MAX_ITER "
                f"{self.max_iter}: raise it, or choose another OUTPUT_DIR."
            )
        if self.start_iter:
            set_optimizer_options(self.optimizer, self.scheduler, options)
        if self.checkpointer.report is not None and not self.start_iter:
            check_input_statistics(self.checkpointer.report.input, self.cfg)
            if self.moving_teacher is not None:
                require_complete(self.checkpointer.report, self.cfg.MODEL.WEIGHTS)
            classifiers.compare(self.checkpointer.report)
            if problem := other_anchors(self.checkpointer.report, self.cfg):
                logger.warning(f"{problem}: its boxes are learned anew.")
        self.data_loader.batch_sampler.first_batch = self.start_iter
        if self.best_checkpoint is not None and comm.is_main_process():
            self.best_checkpoint.begin(self.start_iter)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a checkpoint to resume from, whose model was loaded just before."""
        require_same_model(self.checkpointer.report, self.cfg.OUTPUT_DIR)
        try:
            super().load_state_dict(state)
        except ValueError as error:  # torch: other groups of parameters
            raise InputError(
                f"The optimizer of the checkpoint in {self.cfg.OUTPUT_DIR} does not fit this config's "
                f"({one_line(error)}): give the SOLVER keys that the run was begun with, or another OUTPUT_DIR "
                "with that checkpoint as MODEL.WEIGHTS."
            ) from error

    def build_hooks(self) -> list[HookBase]:
        """DefaultTrainer's hooks between ours: each checkpoint must hold this step's averages.

        The writer is last, as in DefaultTrainer: what users ``insert(-1, hook)`` has its turn before it.
        """
        cfg = self.cfg
        first: list[HookBase] = [build_loss_normalizer(cfg)]
        if comm.get_world_size() > 1:
            first.append(GradientCheck())
        if cfg.DATASETS.PSEUDO_TRAIN:
            first.append(LabelMonitor(cfg.SELFTRAIN.MIN_NONEMPTY_SHARE, cfg.SELFTRAIN.MAX_BOXES_RATIO))
        self.weight_average = None
        if cfg.SELFTRAIN.WEIGHT_EMA_DECAY:
            self.weight_average = WeightAverage(cfg.SELFTRAIN.WEIGHT_EMA_DECAY)
            first.append(self.weight_average)
        self.moving_teacher = None
        if labeled_in_the_step(cfg):
            self.moving_teacher = build_moving_teacher(cfg, self.data_loader)
            first.append(self.moving_teacher)
        # detectron2's hooks, with the weights to evaluate and the checkpoints to keep.
        default = [self._hook_in_place_of(hook) for hook in super().build_hooks()]
        writers = [hook for hook in default if isinstance(hook, hooks.PeriodicWriter)]  # none but on rank 0
        others = [hook for hook in default if hook not in writers]
        return [*first, *others, RunState(stage_seed(cfg)), *writers]

    def build_writers(self) -> list[EventWriter]:
        """detectron2's, and the trackers of SELFTRAIN.TRACKERS. Called in the main process alone."""
        self.trackers = build_trackers(self.cfg)
        return [*super().build_writers(), *self.trackers]

    @classmethod
    def _evaluates_otherwise(cls) -> bool:
        """Whether a project's trainer has an evaluation of its own."""
        derived = cls.__mro__[: cls.__mro__.index(SelfTrainingTrainer)]
        return any(name in vars(kind) for kind in derived for name in ("build_evaluator", "test"))

    def _hook_in_place_of(self, hook: HookBase) -> HookBase:
        if isinstance(hook, hooks.EvalHook):
            return hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate)
        if isinstance(hook, hooks.PeriodicCheckpointer):
            keys = self.cfg.SOLVER
            return LastCheckpoints(self.checkpointer, keys.CHECKPOINT_PERIOD, keys.CHECKPOINTS_TO_KEEP)
        return hook

    def before_train(self) -> None:
        super().before_train()
        for tracker in self.trackers:
            tracker.begin(self.start_iter)
        period, done = self.cfg.TEST.EVAL_PERIOD, self.start_iter
        if self.best_checkpoint is not None and period and done % period == 0 and 0 < done < self.max_iter:
            self._evaluate(done)  # the run may have been killed between this checkpoint and its evaluation

    def after_train(self) -> None:
        for tracker in self.trackers:
            tracker.finished = self.finished
        super().after_train()
        averages = ((self.weight_average, WEIGHT_AVERAGE), (self.moving_teacher, MOVING_TEACHER))
        for average, file in averages:
            if not self.finished or average is None or not comm.is_main_process():
                continue
            folder, name = os.path.split(os.path.join(self.cfg.OUTPUT_DIR, file))
            os.makedirs(folder, exist_ok=True)
            # A checkpointer of its own: this file is not one to resume from.
            checkpointer = SafeDetectionCheckpointer(average.model, folder, **self._facts)
            checkpointer.save(os.path.splitext(name)[0])

    def _evaluate(self, steps: int | None = None) -> dict[str, Any]:
        average = self.weight_average
        with average.applied() if average is not None else contextlib.nullcontext():
            results = self.test(self.cfg, self.model)
            losses = None if self.validation_loss is None else self.validation_loss(model_of(self))
            if losses is not None and comm.is_main_process():
                add_to_results(results, losses)
            if self.best_checkpoint is not None:
                steps = steps or min(self.iter + 1, self.max_iter)
                on_main_process(lambda: self.best_checkpoint.update(results, steps, model_of(self)))
        self._last_eval_results = results
        return results

    def _save_batch(self, batch: list[dict], losses: dict[str, float]) -> str:
        try:
            return save_batch(self.cfg, model_of(self), self.iter, batch, losses)
        except InputError as error:  # a full disk must not hide that a loss is not finite
            return f"no file ({one_line(error)})"

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        return build_selftrain_train_loader(cfg)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        if cfg.SELFTRAIN.REFINE_ITERS:
            return refining_schedule(cfg, optimizer, cls.build_lr_scheduler)
        if cfg.SOLVER.RESCALE_INTERVAL and cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER:
            # detectron2 would divide by zero after the last step.
            raise InputError(
                f"SOLVER.WARMUP_ITERS is {cfg.SOLVER.WARMUP_ITERS}, which leaves nothing of SOLVER.MAX_ITER "
                f"{cfg.SOLVER.MAX_ITER} after the warm-up: make it smaller."
            )
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        with reading_coco([dataset_name]):
            return build_detection_test_loader(
                cfg, dataset_name, mapper=SelfTrainingDatasetMapper(cfg, is_train=False)
            )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:  # each would overwrite the predictions of the one before
            folder = os.path.join(folder, dataset_name)
        if MetadataCatalog.get(dataset_name).get("evaluator_type") == "sem_seg":
            # detectron2's own function to read masks fails with numpy 2
            return SemSegEvaluator(dataset_name, output_dir=folder, sem_seg_loading_fn=read_label_map)
        return RepairedCOCOEvaluator(
            dataset_name, folder, masks=cfg.MODEL.MASK_ON, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS
        )


def build_loss_normalizer(cfg: CfgNode) -> LossNormalizer:
    """The hook that a config describes (keys SELFTRAIN.*)."""
    keys = cfg.SELFTRAIN
    return LossNormalizer(
        keys.ALPHA, keys.EMA_DECAY, keys.NORMALIZE_LOSS, keys.ALPHA_WARMUP_ITERS, keys.MAX_LOSS_RATIO
    )
