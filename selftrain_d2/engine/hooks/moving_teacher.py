"""A teacher that keeps learning: a moving average of the student labels the pseudo-labeled images in each step.

(Tarvainen and Valpola, arXiv:1703.01780; for detectors Liu et al., arXiv:2102.09480.)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import DataLoader

from selftrain_d2.data.augmentation import AutoAugment
from selftrain_d2.data.datasets import class_names
from selftrain_d2.data.unlabeled_mapper import UnlabeledImageMapper
from selftrain_d2.engine.hooks.teacher_check import PATIENCE, WORSE, TeacherCheck
from selftrain_d2.engine.hooks.weight_average import WeightAverage
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.step_labels import (
    StepSelection,
    StepTeacher,
    boxes_to_count,
    set_score_floor,
)
from selftrain_d2.labeling.views import views
from selftrain_d2.modeling.classes import is_segmentor

logger = logging.getLogger(__name__)

# The teacher begins trained. With 0 its decay would be 0.1 after the first step: the teacher would be the student.
STEPS_BEFORE = 100


class MovingTeacher(WeightAverage):
    """Labels the pseudo-labeled images of each batch by averaged weights; see :meth:`label`.

    The average begins as the weights that training begins with, which must be a trained teacher's. Its decay of step n
    is ``min(decay, (101 + n) / (110 + n))``: 0.92 in the first step, 0.98 after 400, so that in a run of some hundred
    steps, too, the teacher learns. Batch-norm statistics are averaged as weights are, and used (evaluation mode). Its
    labels come before the step's update: with weights that stood still they would be those of the paper.

    After the first step and every SELFTRAIN.TEACHER_CHECK_PERIOD steps it is judged (:class:`TeacherCheck`). Where it
    was worse PATIENCE times in a row, the last average that was not becomes the teacher, and stays it: as in the paper,
    from there on. Several processes go by what the first one finds.

    Args:
        cfg: a student's.
        mapper: of the pseudo-labeled images.
        check: of the first process; None in others, and where TEACHER_CHECK_PERIOD is 0.
    """

    def __init__(self, cfg: CfgNode, mapper: UnlabeledImageMapper, check: TeacherCheck | None):
        keys = cfg.SELFTRAIN
        super().__init__(keys.TEACHER_EMA_DECAY, STEPS_BEFORE)
        self.cfg = cfg
        self.mapper = mapper
        self.check = check
        self.selection = step_selection(cfg)
        #: images of a forward pass: as many pseudo images as the student sees in one
        self.batch_size = max(
            cfg.SOLVER.PSEUDO_IMS_PER_BATCH // comm.get_world_size() // cfg.SOLVER.ACCUMULATION_STEPS, 1
        )
        self.best: float | None = None
        self.worse = 0
        self.stopped = False
        self._good: list[Tensor] = []
        self._state: dict[str, Any] | None = None

    def before_train(self) -> None:
        super().before_train()
        self.teacher = StepTeacher(self.cfg, self.model)
        seen = len(views(self.cfg))
        if seen > 1 and comm.is_main_process():
            logger.info(f"The teacher sees each image in {seen} views a step (SELFTRAIN.TTA).")
        if not self.teacher.masks and self.selection.floor is not None:
            # With several views, boxes that are not trained on have a say in the place of those that are.
            set_score_floor(self.model, self.selection.floor, only_lower=seen > 1)
        if self._state is not None:
            self._restore(self._state)
            self._state = None
        elif any(isinstance(augmentation, AutoAugment) for augmentation in self.mapper.augmentations.augs):
            logger.info(
                "AutoAugment's operations inside boxes do nothing on pseudo-labeled images, whose boxes are not known "
                "when the operations are drawn."
            )

    def label(self, batch: list[dict]) -> list[dict]:
        """A batch whose pseudo-labeled images have labels, in the view of the student; others stay as they are."""
        places = [i for i, sample in enumerate(batch) if "transforms" in sample]
        if not places:
            return batch
        samples = [batch[i] for i in places]
        found = self.teacher(samples, self.batch_size)
        if self.teacher.masks:
            labels: Sequence[Any] = [self.selection.classes(one) for one in found]
        else:
            if self.selection.counts is not None:
                self.selection.seen(comm.all_gather(boxes_to_count(found)))
            labels = self.selection.annotations(found)
        ignoring = self.selection.ignored_from is not None
        batch = list(batch)
        for i, sample, one in zip(places, samples, labels):
            batch[i] = self.mapper.label(sample, one, ignore_crowd=ignoring)
        return batch

    def after_step(self) -> None:
        if self.stopped:
            return
        super().after_step()
        period = self.cfg.SELFTRAIN.TEACHER_CHECK_PERIOD
        if period and (self.best is None or (self.trainer.iter + 1) % period == 0):
            self._judge(period)

    def _judge(self, period: int) -> None:
        agreement = self.check and self.check.agreement(self.teacher, self.selection, self.batch_size)
        agreement = comm.all_gather(agreement)[0]  # the first process has the check
        self.trainer.storage.put_scalar("teacher_agreement", agreement, smoothing_hint=False)
        before = self.best
        self.best = agreement if before is None else max(agreement, before)
        if agreement >= WORSE * self.best:
            self.worse, self._good = 0, self._values()
            return
        self.worse += 1
        if self.worse < PATIENCE:
            return
        with torch.no_grad():
            for value, good in zip(self._tensors(), self._good):
                value.copy_(good)
        self.stopped = True
        if comm.is_main_process():
            steps = PATIENCE * period
            logger.warning(
                f"Step {self.trainer.iter}: the teacher's labels of {len(self.check.dicts)} labeled images became "
                f"worse (agreement with people {agreement:.2f}, {before:.2f} at its best). Its weights of {steps} "
                "steps ago label from here on, and are averaged no more: a higher SELFTRAIN.TEACHER_EMA_DECAY, a "
                "smaller SOLVER.BASE_LR or a higher SELFTRAIN.SCORE_THRESH may help."
            )

    def _tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def _values(self) -> list[Tensor]:
        return [value.detach().clone() for value in self._tensors()]

    def state_dict(self) -> dict[str, Any]:
        if self._average is None:
            return {}
        state = {
            "average": super().state_dict(),
            "best": self.best,
            "worse": self.worse,
            "stopped": self.stopped,
            "good": [] if self.stopped else list(self._good),
        }
        if self.selection.counts is not None:
            state["counts"] = self.selection.counts.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["average"])
        self._state = state

    def _restore(self, state: dict[str, Any]) -> None:
        self.best, self.worse, self.stopped = state["best"], state["worse"], state["stopped"]
        device = next(self.model.parameters()).device
        self._good = [value.to(device) for value in state["good"]]
        if self.selection.counts is not None:
            self.selection.counts.load_state_dict(state["counts"])
            self.selection.update()


def step_selection(cfg: CfgNode) -> StepSelection:
    """Which labels a student whose teacher is a moving average learns from.

    Raises:
        InputError: the config's keys do not go with that.
    """
    if not cfg.MODEL.WEIGHTS:
        raise InputError(
            "SELFTRAIN.TEACHER moving_average begins as a trained teacher: give one as MODEL.WEIGHTS (self-train: "
            "leave SELFTRAIN.STUDENT_WEIGHTS at 'teacher')."
        )
    if cfg.MODEL.MASK_ON and not is_segmentor(cfg) and cfg.INPUT.MASK_FORMAT != "bitmask":
        raise InputError(
            f"INPUT.MASK_FORMAT of the student is {cfg.INPUT.MASK_FORMAT}, but pseudo masks are bitmasks: set it to "
            "bitmask, which takes polygons of people as well."
        )
    return StepSelection(cfg, class_names(cfg.DATASETS.TRAIN[0]) or [], masks=is_segmentor(cfg))


def build_moving_teacher(cfg: CfgNode, data_loader: DataLoader) -> MovingTeacher:
    """The hook that a student's config describes.

    Args:
        data_loader: of ``build_selftrain_train_loader``.
    """
    dataset = data_loader.dataset
    mapper = dataset.mappers[1]
    check = None
    if cfg.SELFTRAIN.TEACHER_CHECK_PERIOD and comm.is_main_process():
        check = TeacherCheck(dataset.sources[0], mapper)
    return MovingTeacher(cfg, mapper, check)
