"""The trainer of teachers and students."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, SemSegEvaluator
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from selftrain_d2.data.classification import classification_classes
from selftrain_d2.data.coco_datasets import reading_coco
from selftrain_d2.data.datasets import check_same_classes, class_names, difference_of_classes
from selftrain_d2.data.label_maps import read_label_map
from selftrain_d2.data.loader import build_selftrain_train_loader, check_classes, check_registered
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper
from selftrain_d2.data.random_state import stage_seed
from selftrain_d2.engine.coco_evaluation import RepairedCOCOEvaluator, check_evaluation
from selftrain_d2.engine.config_values import is_segmentor, one_line
from selftrain_d2.engine.gradient_check import GradientCheck
from selftrain_d2.engine.label_monitor import LabelMonitor
from selftrain_d2.engine.loss_normalizer import LossNormalizer, model_of
from selftrain_d2.engine.orderly_end import OrderlyEnd
from selftrain_d2.engine.replay import save_batch
from selftrain_d2.engine.resume import RunState, optimizer_options, set_optimizer_options
from selftrain_d2.engine.run_folder import WEIGHT_AVERAGE_FOLDER
from selftrain_d2.engine.stage import with_stage
from selftrain_d2.engine.step_trainer import StepTrainer
from selftrain_d2.engine.weight_average import WeightAverage
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint import (
    LoadReport,
    SafeDetectionCheckpointer,
    check_input_statistics,
    require_same_model,
)
from selftrain_d2.modeling.classes import number_of_classes, tensors_of_classes, tensors_of_image_classes
from selftrain_d2.modeling.meta_arch import add_classification_head

logger = logging.getLogger(__name__)

#: Below OUTPUT_DIR: the averaged weights at the end of training, where SELFTRAIN.WEIGHT_EMA_DECAY is set.
WEIGHT_AVERAGE = os.path.join(WEIGHT_AVERAGE_FOLDER, "model_final.pth")


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


class Stage(CheckpointFacts):
    """SELFTRAIN.STAGE; see :func:`~selftrain_d2.engine.stage.with_stage`. A resumed run need not share it."""

    def __init__(self, stage: int):
        super().__init__({"stage": stage})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Classifiers:
    """The parts of a model that depend on classes, before weights to start from are loaded.

    Tensors of as many other classes fit, and would be taken for those of this run's classes.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, facts: Mapping[str, CheckpointFacts]):
        """
        Args:
            cfg: SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES is looked at.
            model: as it was built.
            facts: of the run, which its checkpoints carry.
        """
        self.cfg, self.model = cfg, model
        self.known = {
            "classes": facts["classes"].facts["thing_classes"],
            "image_classes": facts["classification"].facts["classification_classes"],
        }
        self.initial: dict[str, dict[str, torch.Tensor]] = {}
        if cfg.SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES:
            state = model.state_dict()
            for kind, names in (
                ("classes", tensors_of_classes(cfg, model)),
                ("image_classes", tensors_of_image_classes(model)),
            ):
                self.initial[kind] = {name: state[name].clone() for name in names}

    def compare(self, report: LoadReport) -> None:
        """Compare the classes of the weights that were loaded; where they are others, start these parts anew.

        Raises:
            InputError: as many other classes, or the same in another order, without
                SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES.
        """
        for kind, expected in self.known.items():
            found = getattr(report, kind)
            difference = difference_of_classes(expected, found) if expected and found else None
            if difference is None:
                continue
            weights, what = self.cfg.MODEL.WEIGHTS, kind.replace("_", " ")
            sentence = f"Weights {weights} know other {what} than the data: {difference}"
            # Those of another number of classes were not taken: their shapes differ.
            if len(found) == len(expected) and not self.initial:
                raise InputError(
                    f"{sentence}; order the data's as the weights', or set SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES True to "
                    "start what depends on classes anew."
                )
            self.model.load_state_dict(self.initial.get(kind, {}), strict=False)
            logger.info(f"{sentence}; what depends on them starts anew.")


class SelfTrainingTrainer(OrderlyEnd, DefaultTrainer):
    """detectron2's DefaultTrainer for a teacher (no DATASETS.PSEUDO_TRAIN) or a student.

    It differs in its loader (human and pseudo images), its :class:`LossNormalizer`, its step
    (:class:`StepTrainer`), its COCO evaluation, and in checkpoints that run no code. A resumed run goes on with
    the images that it would have seen. With DATASETS.CLASSIFICATION_TRAIN the model has a head for joint training.
    With SELFTRAIN.WEIGHT_EMA_DECAY the averaged weights are evaluated, and saved at the end as
    ``OUTPUT_DIR/weight_average/model_final.pth``.
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
        classes = classification_classes(cfg)
        if classes:  # here, not in build_model: only training needs the head
            add_classification_head(model, len(classes), cfg.SELFTRAIN.CLASSIFICATION_LOSS_WEIGHT)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        check_number_of_classes(cfg)
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
        # A teacher knows what it detects, and how its images were normalized.
        self._facts = {
            "classes": CheckpointFacts({"thing_classes": list(class_names(cfg.DATASETS.TRAIN[0]) or [])}),
            "stage": Stage(cfg.SELFTRAIN.STAGE),
            "classification": CheckpointFacts({"classification_classes": classes}),
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
        self.register_hooks(self.build_hooks())

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
            classifiers.compare(self.checkpointer.report)
        self.data_loader.batch_sampler.first_batch = self.start_iter

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a checkpoint to resume from, whose model was loaded just before."""
        require_same_model(self.checkpointer.report, self.cfg.OUTPUT_DIR)
        try:
            super().load_state_dict(state)
        except ValueError as error:  # torch: other groups of parameters
            raise InputError(
                f"The optimizer of the checkpoint in {self.cfg.OUTPUT_DIR} does not fit this config's "
                f"({one_line(error)}): give the SOLVER keys that the run was begun with, or another OUTPUT_DIR."
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
        # detectron2's EvalHook, with the weights to evaluate.
        default = [
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate) if isinstance(hook, hooks.EvalHook) else hook
            for hook in super().build_hooks()
        ]
        writers = [hook for hook in default if isinstance(hook, hooks.PeriodicWriter)]  # none but on rank 0
        others = [hook for hook in default if hook not in writers]
        return [*first, *others, RunState(stage_seed(cfg)), *writers]

    def after_train(self) -> None:
        super().after_train()
        if self.finished and self.weight_average is not None and comm.is_main_process():
            folder, name = os.path.split(os.path.join(self.cfg.OUTPUT_DIR, WEIGHT_AVERAGE))
            os.makedirs(folder, exist_ok=True)
            # A checkpointer of its own: this file is not one to resume from.
            checkpointer = SafeDetectionCheckpointer(self.weight_average.model, folder, **self._facts)
            checkpointer.save(os.path.splitext(name)[0])

    def _evaluate(self) -> dict[str, Any]:
        average = self.weight_average
        with average.applied() if average is not None else contextlib.nullcontext():
            self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

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


def amp_precision(cfg: CfgNode) -> torch.dtype:
    """The data type that SOLVER.AMP.PRECISION names.

    Raises:
        InputError: neither float16 nor bfloat16, or float16 on a CPU.
    """
    if cfg.SOLVER.AMP.PRECISION not in ("float16", "bfloat16"):
        raise InputError(
            f"SOLVER.AMP.PRECISION is {cfg.SOLVER.AMP.PRECISION!r}: it must be float16 or bfloat16."
        )
    if cfg.SOLVER.AMP.PRECISION == "float16" and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise InputError(
            f"Mixed precision in float16 needs a GPU, MODEL.DEVICE is {cfg.MODEL.DEVICE}: set "
            "SOLVER.AMP.PRECISION bfloat16, or SOLVER.AMP.ENABLED False."
        )
    return getattr(torch, cfg.SOLVER.AMP.PRECISION)


def check_accumulation_steps(cfg: CfgNode, processes: int | None = None) -> int:
    """SOLVER.ACCUMULATION_STEPS.

    Args:
        processes: of the run; by default those that run now.

    Raises:
        InputError: it is not positive, or the images of a step do not divide by it.
    """
    steps, processes = cfg.SOLVER.ACCUMULATION_STEPS, processes or comm.get_world_size()
    if steps < 1:
        raise InputError(f"SOLVER.ACCUMULATION_STEPS must be at least 1, not {steps}.")
    for key in ("IMS_PER_BATCH", "PSEUDO_IMS_PER_BATCH", "CLASSIFICATION_IMS_PER_BATCH"):
        images = cfg.SOLVER[key]
        if images % (steps * processes):
            raise InputError(
                f"SOLVER.{key} = {images} does not divide by SOLVER.ACCUMULATION_STEPS {steps} "
                f"x {processes} processes."
            )
    return steps


def check_reference_world_size(cfg: CfgNode, processes: int | None = None) -> None:
    """Refuse detectron2's scaling to another number of processes, which knows nothing of this plugin's keys.

    Args:
        processes: of the run; by default those that run now.

    Raises:
        InputError: SOLVER.REFERENCE_WORLD_SIZE is another number than theirs, and not 0.
    """
    reference, processes = cfg.SOLVER.REFERENCE_WORLD_SIZE, processes or comm.get_world_size()
    if reference not in (0, processes):
        raise InputError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, but the processes are {processes}: it would scale "
            "SOLVER.IMS_PER_BATCH and the schedule, but neither the pseudo-labeled images nor what SELFTRAIN.* counts "
            f"in steps; set it to 0, and these keys to their values for {processes}."
        )


def check_test_sets(cfg: CfgNode) -> None:
    """Raise InputError unless DATASETS.TEST has names, registered ones, that results can be told apart by."""
    names = cfg.DATASETS.TEST
    check_registered("DATASETS.TEST", names)
    if len(set(names)) < len(names):
        raise InputError(f"DATASETS.TEST is {tuple(names)}: name each dataset once.")
    if len(names) > 1 and cfg.TEST.EXPECTED_RESULTS:
        raise InputError(
            "TEST.EXPECTED_RESULTS is about one dataset: leave one in DATASETS.TEST, or no expectation."
        )


def check_evaluated_classes(cfg: CfgNode, known: Sequence[str] | None) -> None:
    """Compare the classes of a trained model with those of DATASETS.TEST.

    Args:
        known: the model's, by id; None if its weights do not say. Then only their number is compared.

    Raises:
        InputError: they differ, or stand in another order.
    """
    for name in cfg.DATASETS.TEST:
        if class_names(name) is None:
            DatasetCatalog.get(name)  # register_coco_instances tells the classes when it reads them
        check_number_of_classes(cfg, name)
        if known and (found := class_names(name)):
            check_same_classes(
                known, found, f"The evaluation dataset {name!r}", f"the weights {cfg.MODEL.WEIGHTS}"
            )


def check_number_of_classes(cfg: CfgNode, name: str | None = None) -> None:
    """Raise InputError unless the model has as many classes as the data, of boxes or of pixels as it learns.

    Args:
        name: of the dataset; by default the first of DATASETS.TRAIN.
    """
    name, architecture = name or cfg.DATASETS.TRAIN[0], cfg.MODEL.META_ARCHITECTURE
    if class_names(name) is None:
        return
    of_pixels = is_segmentor(cfg)
    classes = MetadataCatalog.get(name).get("stuff_classes" if of_pixels else "thing_classes")
    if not classes:
        learned, there = ("masks of pixels", "boxes") if of_pixels else ("boxes", "masks of pixels")
        raise InputError(
            f"{architecture} learns {learned}, but {name!r} has {there}: choose another MODEL.META_ARCHITECTURE or "
            "dataset."
        )
    key, number = number_of_classes(cfg) or ("", len(classes))
    if number != len(classes):
        raise InputError(f"{key} is {number}, but {name!r} has {len(classes)} classes: {classes}.")
