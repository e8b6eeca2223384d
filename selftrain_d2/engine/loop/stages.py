"""The stages of the loop: the config of each, and its work."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.engine.anchor_fitting import with_fitted_anchors
from selftrain_d2.engine.config_values import check_values, merge_options, value_of
from selftrain_d2.engine.kept_checkpoints import best_of
from selftrain_d2.engine.launch import RESULTS, DatasetSpec, select, train, unlabeled_images
from selftrain_d2.engine.loop.options import LoopOptions
from selftrain_d2.engine.loop.oracle import ORACLE
from selftrain_d2.engine.loop.stage_record import PLACE, STARTING_WEIGHTS, run_stage, stage_settings
from selftrain_d2.engine.loop.tasks import Task
from selftrain_d2.engine.loop.tasks.base import LABELED, VALIDATION
from selftrain_d2.engine.process_group import run_in_processes
from selftrain_d2.engine.stage import with_stage
from selftrain_d2.errors import InputError
from selftrain_d2.files import read_json
from selftrain_d2.labeling.generate import generate_pseudo_labels
from selftrain_d2.modeling.checkpoint import file_sha256, run_weights

logger = logging.getLogger(__name__)

#: Name of the registered pseudo labels.
PSEUDO = "selftrain_pseudo"


class Stages:
    """The stages of one output folder.

    Args:
        cfg: config of the teacher.
        classes: names, as the task's check gives them.
    """

    def __init__(
        self,
        cfg: CfgNode,
        task: Task,
        output: str | os.PathLike,
        classes: Sequence[str],
        options: LoopOptions,
    ):
        self.cfg = with_stage(cfg)
        self.task = task
        self.output = Path(output)
        self.classes = classes
        self.options = options

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
                allow_unsafe=self.options.allow_unsafe,
                processes=self.options.processes,
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
                least, key = self.options.score_floor, "--score-floor"
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
        arguments = cfg, images, names, str(folder), self.options.score_floor
        run_in_processes(_label, self.options.processes, arguments, cfg.MODEL.DEVICE)
        return folder

    def judge(self, stage: str, teacher: dict[str, Any]) -> float | None:
        """How well a round's teacher labels the labeled images, which it was trained on: in percent, as it labels."""
        folder = self.label_images(stage, teacher, self.task.labeled_images, self.task.labeled_names())
        return self.task.judge_on_labeled(folder)


def _label(cfg: CfgNode, images: str, names: list[str], folder: str, score_floor: float) -> None:
    generate_pseudo_labels(cfg, images, names, folder, score_floor=score_floor)
