"""The whole loop on one's own data: teacher, pseudo labels, student."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from selftrain_d2.data.datasets import load_images, register_dataset
from selftrain_d2.data.image_headers import check_images
from selftrain_d2.data.image_sources import check_outside
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.pseudo_labels.selection import (
    check_counts,
    resolve_thresholds,
    selection_from_config,
)
from selftrain_d2.engine.anchor_fitting import with_fitted_anchors
from selftrain_d2.engine.checks import check_pseudo_masks, check_training
from selftrain_d2.engine.config_values import check_values, is_segmentor, merge_options, value_of
from selftrain_d2.engine.kept_checkpoints import best_of
from selftrain_d2.engine.launch import (
    RESULTS,
    DatasetSpec,
    registered,
    select,
    selected_labels,
    train,
    unlabeled_images,
)
from selftrain_d2.engine.loop.oracle import ORACLE, true_labels
from selftrain_d2.engine.loop.stage_record import PLACE, STARTING_WEIGHTS, run_stage, stage_settings
from selftrain_d2.engine.loop.summary import write_summary
from selftrain_d2.engine.loop.tasks import Task
from selftrain_d2.engine.loop.tasks.base import LABELED, VALIDATION
from selftrain_d2.engine.process_group import (
    Processes,
    check_processes,
    number_of_processes,
    run_in_processes,
)
from selftrain_d2.engine.run_folder import MOVING_TEACHER
from selftrain_d2.engine.stage import with_stage
from selftrain_d2.errors import InputError
from selftrain_d2.files import read_json, writing
from selftrain_d2.folder_lock import FolderLock
from selftrain_d2.labeling.generate import check_labeling, generate_pseudo_labels
from selftrain_d2.labeling.views import views
from selftrain_d2.modeling.checkpoint import file_sha256, require_same_backbone, run_weights

logger = logging.getLogger(__name__)

PSEUDO = "selftrain_pseudo"
#: Of the loop with one seed, below the output folder of several: this and the seed.
SEED_FOLDER = "seed_"


def self_train(
    cfg: CfgNode,
    task: Task,
    output: str | os.PathLike,
    *,
    rounds: int = 1,
    control: bool = False,
    oracle: bool = False,
    keep_going: bool = False,
    score_floor: float = 0.05,
    fit_anchors: bool = False,
    allow_unsafe: bool = False,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Train a teacher, label the unlabeled images with it, train a student on both kinds of labels.

    With SELFTRAIN.TEACHER "moving_average" the student comes before the pseudo labels, which are those of its teacher
    at the end: to be looked at, not trained on.

    The stages are folders under ``output``: ``teacher/``, ``pseudo_labels/``, ``student/``, and
    ``control/`` and ``oracle/`` if asked for. Called again, finished stages are not redone and the one that was stopped
    goes on: with the settings it was begun with, or corrected ones if it had no checkpoint yet or a mistake had stopped
    it. ``summary.json`` and ``summary.md`` come last; paths in them are relative to ``output``.

    Args:
        cfg: config of the teacher. The student has the same but for SELFTRAIN.STUDENT, starts from
            SELFTRAIN.STUDENT_WEIGHTS (the teacher's in the paper, Section 3 and Table 10), and sees
            SOLVER.PSEUDO_IMS_PER_BATCH pseudo images a step; where that is 0, as many as human ones (the
            paper's half and half).
        task: the images and labels.
        rounds: with N > 1 the student becomes the next teacher, N - 1 times; those stages are in
            ``round_2/``, ... Each round's teacher is judged by its labels of the labeled images (in
            ``labels_of_labeled/``, ``round_2/labels_of_labeled/``, ...); one that is worse than the teacher before it
            ends the rounds.
        control: also train, from the weights that the student started from, for its steps on human labels
            alone. What the student gains over this control is what the unlabeled images gave.
        oracle: also train, from those weights and for those steps, on the withheld truth of the unlabeled images in
            place of their pseudo labels: no labels of these images can give more. No other stage sees that truth.
        keep_going: make all rounds, also after one whose teacher is worse.
        score_floor: pseudo boxes, or pixels, of a lower score are not even written.
        fit_anchors: see :func:`~selftrain_d2.engine.box_reach.fit_anchors`; all stages have the fitted anchors.
        allow_unsafe: load MODEL.WEIGHTS even if that is a pickle that can run code.
        processes: of training and labeling; one by default. Under torchrun its processes, of several machines too;
            only the main one calls this, in :func:`~selftrain_d2.engine.process_group.main_process_leads`.

    Returns:
        The summary.

    Raises:
        InputError: the data has a fault, a config is refused, ``output`` lies in a folder of images, a stage under
            ``output`` was made with other settings, another loop is writing to it, or several machines were asked for
            without torchrun.
    """
    loop = checked_loop(
        cfg,
        task,
        output,
        rounds=rounds,
        oracle=oracle,
        score_floor=score_floor,
        fit_anchors=fit_anchors,
        allow_unsafe=allow_unsafe,
        processes=processes,
    )
    with writing(output):
        loop.output.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(output)
    with contextlib.closing(lock):
        return loop.run(rounds, control, oracle, keep_going)


def checked_loop(
    cfg: CfgNode,
    task: Task,
    output: str | os.PathLike,
    *,
    rounds: int = 1,
    oracle: bool = False,
    score_floor: float = 0.05,
    fit_anchors: bool = False,
    allow_unsafe: bool = False,
    processes: Processes | None = None,
) -> _Loop:
    """The checks of :func:`self_train`, before anything is written.

    Raises:
        InputError: see there.
    """
    processes = processes or Processes()
    if processes.num_machines > 1:
        raise InputError(
            "self-train runs on several machines under torchrun, as docs/training.md shows: leave out --num-machines."
        )
    check_processes(processes, cfg.MODEL.DEVICE)
    for folder in task.image_folders():
        check_outside(output, folder)
    classes = task.check(cfg)
    if rounds < 1:
        raise InputError(f"--rounds must be at least 1, not {rounds}.")
    if oracle and not task.has_truth:
        raise InputError(
            f"--oracle trains on the truth of the unlabeled images: give {task.truth_argument}, or leave --oracle out."
        )
    loop = _Loop(cfg, task, Path(output), classes, score_floor, allow_unsafe, processes)
    if list(loop.output.glob(f"{SEED_FOLDER}*")):
        raise InputError(
            f"{output} holds runs of several seeds: give --seeds to go on with them, or choose another output folder."
        )
    if rounds > 1 and loop.moving_teacher:
        raise InputError(
            "--rounds goes with a teacher that labels once; SELFTRAIN.TEACHER moving_average (--teacher "
            "moving-average) makes labels anew in every step: leave --rounds out."
        )
    loop.check(oracle)
    if fit_anchors:
        loop.fit_anchors()
    return loop


class _Loop:
    """The stages of one output folder."""

    def __init__(
        self,
        cfg: CfgNode,
        task: Task,
        output: Path,
        classes: list[str],
        score_floor: float,
        allow_unsafe: bool,
        processes: Processes,
    ):
        self.cfg = with_stage(cfg)
        self.task = task
        self.output = output
        self.classes = classes
        self.score_floor = score_floor
        self.allow_unsafe = allow_unsafe
        self.processes = processes

    def check(self, oracle: bool) -> None:
        """Tell before any work what can be known of all stages: at the cost of the images' headers, and of no weights.

        Raises:
            InputError: see :func:`self_train`.
        """
        teacher = self.teacher_config()
        weights = run_weights(teacher)
        student = self.student_config({"weights": os.path.join("teacher", weights)}, 1)
        start = self.cfg.SELFTRAIN.STUDENT_WEIGHTS
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
        check_labeling(labeling, self.score_floor, batch_size=1)
        kind = "stuff_classes" if is_segmentor(teacher) else "thing_classes"
        labels = {kind: self.classes, "score_floor": self.score_floor, "views": len(views(self.cfg))}
        if self.cfg.SELFTRAIN.THRESHOLDS == "counts":
            check_counts(self.cfg, labels)
        else:
            resolve_thresholds(labels, **selection_from_config(self.cfg, self.classes))
        if student.MODEL.MASK_ON and not is_segmentor(student):
            check_pseudo_masks(teacher, student)
        # Of the pseudo labels only the name is known.
        to_come = (PSEUDO, functools.partial(register_dataset, load=list), ())
        with registered([*self.task.datasets(), to_come]):
            models = [_model_of(cfg, number_of_processes(self.processes)) for cfg in (teacher, student)]
            check_images((*teacher.DATASETS.TRAIN, *teacher.DATASETS.TEST))
        if start == "teacher" and None not in models:
            require_same_backbone(*models, student.MODEL.WEIGHTS)
        if oracle:
            root, names, _ = self.task.unlabeled
            self.task.truth_of(load_images(root, names)[0], student.MODEL.MASK_ON)

    @property
    def moving_teacher(self) -> bool:
        """Whether the unlabeled images get their labels while the student is trained."""
        return self.cfg.SELFTRAIN.TEACHER == "moving_average"

    @property
    def unlabeled(self) -> DatasetSpec:
        """The unlabeled images without labels, for :func:`registered`."""
        root, names, _ = self.task.unlabeled
        return unlabeled_images(PSEUDO, root, names)

    def fit_anchors(self) -> None:
        """Take anchors that fit the labeled boxes, in every stage."""
        fitted = with_fitted_anchors(self.teacher_config(), self.task.datasets())
        self.cfg = self.cfg.clone()
        self.cfg.defrost()
        self.cfg.MODEL.ANCHOR_GENERATOR.SIZES = fitted.MODEL.ANCHOR_GENERATOR.SIZES

    def run(self, rounds: int, control: bool, oracle: bool, keep_going: bool) -> dict[str, Any]:
        """All stages and the summary."""
        start = time.perf_counter()
        teacher = self.train("teacher", self.teacher_config())
        stages, judged = {"teacher": teacher}, []
        stopped = None
        for number in range(1, rounds + 1):
            prefix = "" if number == 1 else f"round_{number}/"
            if rounds > 1:
                judged.append(self.judge(f"{prefix}labels_of_labeled", teacher))
                worse = self.worse_than_before(judged)
                if worse and not keep_going:
                    stopped = f"{worse} The rounds end here; --keep-going goes on."
                    logger.warning(stopped)
                    break
                if worse:
                    logger.warning(worse)
            if self.moving_teacher:
                stages["student"] = self.train(
                    "student", self.student_config(teacher, number), self.unlabeled
                )
                # What it had at the end is what can be looked at, judged and counted.
                stages["pseudo_labels"] = self.label("pseudo_labels", stages["student"], MOVING_TEACHER)
                break
            stages[f"{prefix}pseudo_labels"] = labels = self.label(f"{prefix}pseudo_labels", teacher)
            student = self.train(
                f"{prefix}student",
                self.student_config(teacher, number),
                selected_labels(
                    PSEUDO,
                    self.output / labels["folder"],
                    labels["selection"],
                    labels.get("thresholds_by_counts"),
                ),
            )
            stages[f"{prefix}student"] = teacher = student
        if control:
            stages["control"] = self.train("control", self.control_config(stages["teacher"]))
        if oracle:
            cfg, folder = self.oracle_config(stages["teacher"]), self.output / "pseudo_labels"
            stages["oracle"] = self.train(
                "oracle",
                cfg,
                true_labels(self.task, folder, cfg.MODEL.MASK_ON),
                further_settings=self.task.truth_fingerprint(),
            )
        summary = {
            "task": self.task.name,
            "teacher": self.cfg.SELFTRAIN.TEACHER,
            "seed": self.cfg.SEED,
            "score_thresh": stages["pseudo_labels"]["score_thresh"],
            "seconds_of_last_run": round(time.perf_counter() - start, 1),
            "stages": stages,
        }
        if judged:
            summary["labels_of_labeled"] = {"metric": self.task.metrics[0], "by_round": judged}
        if stopped:
            summary["stopped"] = stopped
        return write_summary(self.output, summary, self.config_of(stages["student"]), self.task)

    def teacher_config(self) -> CfgNode:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TRAIN = (LABELED,)
        cfg.DATASETS.PSEUDO_TRAIN = ()
        cfg.DATASETS.TEST = (VALIDATION,) if self.task.validation_images else ()
        cfg.SOLVER.PSEUDO_IMS_PER_BATCH = 0
        cfg.SELFTRAIN.REFINE_ITERS = 0
        self.task.set_number_of_classes(cfg, len(self.classes))
        return cfg

    def student_config(self, teacher: dict[str, Any], number: int) -> CfgNode:
        """Of round ``number``, from 1."""
        cfg = self.control_config(teacher)
        cfg.SELFTRAIN.STAGE = self.cfg.SELFTRAIN.STAGE + number
        cfg.DATASETS.PSEUDO_TRAIN = (PSEUDO,)
        cfg.SOLVER.PSEUDO_IMS_PER_BATCH = self.cfg.SOLVER.PSEUDO_IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH
        return cfg

    def oracle_config(self, teacher: dict[str, Any]) -> CfgNode:
        """The first student's, but for whose labels the unlabeled images have."""
        cfg = self.student_config(teacher, 1)
        cfg.DATASETS.PSEUDO_TRAIN = (ORACLE,)
        cfg.SELFTRAIN.TEACHER = "labels"
        return cfg

    def control_config(self, teacher: dict[str, Any]) -> CfgNode:
        """The student's schedule without pseudo labels."""
        cfg = self.teacher_config()
        cfg.SELFTRAIN.REFINE_ITERS = self.cfg.SELFTRAIN.REFINE_ITERS
        try:
            merge_options(cfg, cfg.SELFTRAIN.STUDENT)
            check_values(cfg)
        except InputError as error:
            raise InputError(f"SELFTRAIN.STUDENT: {error}") from error
        cfg.SELFTRAIN.STAGE = self.cfg.SELFTRAIN.STAGE + 1  # the student's human images, in their order
        start = cfg.SELFTRAIN.STUDENT_WEIGHTS
        cfg.MODEL.WEIGHTS = {"teacher": str(self.output / teacher["weights"]), "random": ""}.get(start, start)
        return cfg

    def config_of(self, stage: Mapping[str, Any]) -> CfgNode:
        """The config that a finished training stage was run with, and the weights it made."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.merge_from_file(str(self.output / stage["config"]))
        cfg.MODEL.WEIGHTS = str(self.output / stage["weights"])
        # How and where to label is not settled by what was trained before.
        cfg.SELFTRAIN = self.cfg.SELFTRAIN.clone()
        cfg.merge_from_list([word for key in PLACE for word in (key, value_of(self.cfg, key))])
        return cfg

    def train(
        self,
        stage: str,
        cfg: CfgNode,
        *datasets: DatasetSpec,
        further_settings: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Train one stage, or take what it made before.

        Args:
            datasets: beside the labeled images and those of validation.
            further_settings: what else its result depends on.
        """
        cfg.OUTPUT_DIR = str(self.output / stage)
        settings = {
            **stage_settings(cfg),
            STARTING_WEIGHTS: file_sha256(PathManager.get_local_path(cfg.MODEL.WEIGHTS))
            if cfg.MODEL.WEIGHTS
            else None,
            **self.task.fingerprint(),
            **(further_settings or {}),
        }

        def work() -> dict[str, Any]:
            logger.info(f"Training {stage}: {cfg.SOLVER.MAX_ITER} steps ({cfg.OUTPUT_DIR}/log.txt)")
            train(
                cfg,
                [*self.task.datasets(), *datasets],
                resume=True,
                allow_unsafe=self.allow_unsafe,
                processes=self.processes,
            )
            best = best_of(cfg.OUTPUT_DIR)
            return {
                "stage": stage,
                **({} if best is None else {"best": best}),
                "steps": cfg.SOLVER.MAX_ITER,
                "refine_steps": cfg.SELFTRAIN.REFINE_ITERS,
                "human_images_per_step": cfg.SOLVER.IMS_PER_BATCH,
                "pseudo_images_per_step": cfg.SOLVER.PSEUDO_IMS_PER_BATCH,
                "metrics": read_json(self.output / stage / RESULTS),
            }

        return {
            **run_stage(self.output / stage, settings, work),
            # Not from the stage's record: relative to a folder that may be moved.
            "weights": f"{stage}/{run_weights(cfg)}",
            "config": f"{stage}/config.yaml",
        }

    def label(self, stage: str, teacher: dict[str, Any], weights: str | None = None) -> dict[str, Any]:
        """Label the unlabeled images. The pseudo-label folder itself knows what it was made with.

        Args:
            weights: below the teacher's folder; by default those that its run leaves to label with.
        """
        root, names, left_out = self.task.unlabeled
        folder = self.label_images(stage, teacher, root, names, weights)
        selection, thresholds = select(folder, self.teacher_config(), self.task.datasets())
        counts = self.task.count(folder, selection)
        if not counts:
            least, key = self.cfg.SELFTRAIN.SCORE_THRESH, "SELFTRAIN.SCORE_THRESH"
            if thresholds is not None:
                least, key = self.score_floor, "--score-floor"
            if weights is not None:
                raise InputError(
                    f"The moving average labels nothing any more at the end of {teacher['stage']} ({folder}, {key} "
                    f"{least}): see teacher_agreement in {teacher['stage']}/metrics.json, and lower {key} or the "
                    "student's SOLVER.BASE_LR, in another output folder."
                )
            raise InputError(
                f"No pseudo label of {folder} has a score of {least} or more, so the student would learn nothing from "
                f"them: train the teacher longer, or lower {key}."
            )
        manifest = read_manifest(folder)
        labels = {
            "folder": stage,
            "images": manifest["listed"],
            "skipped": len(manifest["skipped"]),
            "left_out": left_out,
            **counts,
            "selection": selection,
            "score_thresh": self.cfg.SELFTRAIN.SCORE_THRESH,
            "seconds": manifest["seconds_of_last_run"],
        }
        if thresholds is not None:
            labels["score_thresh"] = thresholds["all_classes"]["score_thresh"]
            labels["thresholds_by_counts"] = thresholds
        return labels

    def label_images(
        self,
        stage: str,
        teacher: dict[str, Any],
        images: str,
        names: Sequence[str],
        weights: str | None = None,
    ) -> Path:
        """Label images below a root, or take what was labeled before."""
        folder = self.output / stage
        cfg = self.config_of(teacher)
        if weights is not None:
            cfg.MODEL.WEIGHTS = str(self.output / teacher["stage"] / weights)
        logger.info(f"Labeling {images} with {cfg.MODEL.WEIGHTS}")
        arguments = cfg, images, names, str(folder), self.score_floor
        run_in_processes(_label, self.processes, arguments, cfg.MODEL.DEVICE)
        return folder

    def judge(self, stage: str, teacher: dict[str, Any]) -> float | None:
        """How well a round's teacher labels the labeled images, which it was trained on: in percent, as it labels."""
        folder = self.label_images(stage, teacher, self.task.labeled_images, self.task.labeled_names())
        return self.task.judge_on_labeled(folder)

    def worse_than_before(self, judged: Sequence[float | None]) -> str | None:
        """A sentence if the last round's teacher labels the labeled images worse than the one before it."""
        before, now = (0.0 if value is None else value for value in [None, *judged][-2:])
        if len(judged) < 2 or now >= before:
            return None
        metric = self.task.metrics[0]
        return (
            f"The teacher of round {len(judged)} labels the labeled images worse than that of round {len(judged) - 1} "
            f"({metric} {now:.1f} after {before:.1f}), so that its pseudo labels are likely to be worse as well."
        )


def _label(cfg: CfgNode, images: str, names: list[str], folder: str, score_floor: float) -> None:
    generate_pseudo_labels(cfg, images, names, folder, score_floor=score_floor)


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
