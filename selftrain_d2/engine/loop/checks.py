"""The checks of the loop: what can be told of all stages before any work."""

from __future__ import annotations

import functools
import logging
import os

from detectron2.config import CfgNode
from torch import nn

from selftrain_d2.data.datasets import load_images, register_dataset
from selftrain_d2.data.image_headers import check_images
from selftrain_d2.data.image_sources import check_outside
from selftrain_d2.data.pseudo_labels.selection import (
    check_counts,
    resolve_thresholds,
    selection_from_config,
)
from selftrain_d2.engine.checks import check_pseudo_masks, check_training
from selftrain_d2.engine.config_values import is_segmentor
from selftrain_d2.engine.launch import registered
from selftrain_d2.engine.loop.options import LoopOptions
from selftrain_d2.engine.loop.stages import PSEUDO, Stages
from selftrain_d2.engine.loop.tasks import Task
from selftrain_d2.engine.process_group import check_processes, number_of_processes
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.generate import check_labeling
from selftrain_d2.labeling.views import views
from selftrain_d2.modeling.checkpoint import require_same_backbone, run_weights

logger = logging.getLogger(__name__)

#: Of the loop with one seed, below the output folder of several: this and the seed.
SEED_FOLDER = "seed_"


def checked_stages(cfg: CfgNode, task: Task, output: str | os.PathLike, options: LoopOptions) -> Stages:
    """The stages of :func:`~selftrain_d2.engine.loop.pipeline.self_train`, checked before anything is written.

    Raises:
        InputError: see there.
    """
    if options.processes.num_machines > 1:
        raise InputError(
            "self-train runs on several machines under torchrun, as docs/training.md shows: leave out --num-machines."
        )
    check_processes(options.processes, cfg.MODEL.DEVICE)
    for folder in task.image_folders():
        check_outside(output, folder)
    classes = task.check(cfg)
    if options.rounds < 1:
        raise InputError(f"--rounds must be at least 1, not {options.rounds}.")
    if options.oracle and not task.has_truth:
        raise InputError(
            f"--oracle trains on the truth of the unlabeled images: give {task.truth_argument}, or leave --oracle out."
        )
    stages = Stages(cfg, task, output, classes, options)
    if list(stages.output.glob(f"{SEED_FOLDER}*")):
        raise InputError(
            f"{output} holds runs of several seeds: give --seeds to go on with them, or choose another output folder."
        )
    if options.rounds > 1 and stages.moving_teacher:
        raise InputError(
            "--rounds goes with a teacher that labels once; SELFTRAIN.TEACHER moving_average (--teacher "
            "moving-average) makes labels anew in every step: leave --rounds out."
        )
    check_stages(stages)
    if options.fit_anchors:
        stages.fit_anchors()
    return stages


def check_stages(stages: Stages) -> None:
    """Tell before any work what can be known of all stages: at the cost of the images' headers, and of no weights.

    Raises:
        InputError: see :func:`~selftrain_d2.engine.loop.pipeline.self_train`.
    """
    teacher = stages.teacher_config()
    weights = run_weights(teacher)
    student = stages.student_config({"weights": os.path.join("teacher", weights)}, 1)
    start = stages.cfg.SELFTRAIN.STUDENT_WEIGHTS
    given = {"MODEL.WEIGHTS": teacher.MODEL.WEIGHTS}
    if start not in ("teacher", "random"):
        given["SELFTRAIN.STUDENT_WEIGHTS"] = start
    for key, file in given.items():
        if (
            file and "://" not in file and not os.path.isfile(file)
        ):  # names are looked up when they are needed
            raise InputError(f"{key}: {file} does not exist; give the path of a file.")
    labeling = teacher.clone()
    labeling.MODEL.WEIGHTS = weights
    check_labeling(labeling, stages.options.score_floor, batch_size=1)
    kind = "stuff_classes" if is_segmentor(teacher) else "thing_classes"
    labels = {
        kind: stages.classes,
        "score_floor": stages.options.score_floor,
        "views": len(views(stages.cfg)),
    }
    if stages.cfg.SELFTRAIN.THRESHOLDS == "counts":
        check_counts(stages.cfg, labels)
    else:
        resolve_thresholds(labels, **selection_from_config(stages.cfg, stages.classes))
    if student.MODEL.MASK_ON and not is_segmentor(student):
        check_pseudo_masks(teacher, student)
    # Of the pseudo labels only the name is known.
    to_come = (PSEUDO, functools.partial(register_dataset, load=list), ())
    with registered([*stages.task.datasets(), to_come]):
        models = [_model_of(cfg, number_of_processes(stages.options.processes)) for cfg in (teacher, student)]
        check_images((*teacher.DATASETS.TRAIN, *teacher.DATASETS.TEST))
    if start == "teacher" and None not in models:
        require_same_backbone(*models, student.MODEL.WEIGHTS)
    if stages.options.oracle:
        root, names, _ = stages.task.unlabeled
        stages.task.truth_of(load_images(root, names)[0], student.MODEL.MASK_ON)


def _model_of(cfg: CfgNode, processes: int) -> nn.Module | None:
    """A stage's model without values, after the checks of its config; None if it cannot be built without values.

    Raises:
        InputError: see :func:`~selftrain_d2.engine.checks.check_training`.
    """
    try:
        return check_training(cfg, processes, unread=(PSEUDO,))
    except (NotImplementedError, RuntimeError) as error:  # a project's own model may need values
        logger.info(f"{cfg.MODEL.META_ARCHITECTURE} cannot be checked before it is trained: {error}")
        return None
