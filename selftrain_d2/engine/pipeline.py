"""The whole loop on one's own data: teacher, pseudo labels, student."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.data.datasets import list_images
from selftrain_d2.data.image_sources import check_outside
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.engine.config_values import check_values, merge_options
from selftrain_d2.engine.launch import (
    RESULTS,
    DatasetSpec,
    Processes,
    in_torchrun,
    pseudo_labels,
    run_in_processes,
    train,
)
from selftrain_d2.engine.stage import with_stage
from selftrain_d2.engine.summary import write_summary
from selftrain_d2.engine.tasks import Task
from selftrain_d2.engine.tasks.base import LABELED, VALIDATION
from selftrain_d2.engine.trainer import WEIGHT_AVERAGE
from selftrain_d2.errors import InputError
from selftrain_d2.files import check_unchanged, read_json, write_json
from selftrain_d2.labeling.generate import generate_pseudo_labels
from selftrain_d2.modeling.checkpoint import file_sha256

logger = logging.getLogger(__name__)

PSEUDO = "selftrain_pseudo"
STAGE = "stage.json"

# Where and how fast a stage runs, and how often it saves, does not change what it makes.
_KEYS_WITHOUT_EFFECT = (
    "OUTPUT_DIR",
    "DATALOADER.NUM_WORKERS",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",  # by its hash instead
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "SELFTRAIN.MIN_NONEMPTY_SHARE",
    "SELFTRAIN.MAX_BOXES_RATIO",
    "SELFTRAIN.STUDENT_WEIGHTS",  # by their hash as well
    "SELFTRAIN.STAGE",  # the loop's own
    "VERSION",
)


def self_train(
    cfg: CfgNode,
    task: Task,
    output: str | os.PathLike,
    *,
    rounds: int = 1,
    control: bool = False,
    score_floor: float = 0.05,
    allow_unsafe: bool = False,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Train a teacher, label the unlabeled images with it, train a student on both kinds of labels.

    The stages are folders under ``output``: ``teacher/``, ``pseudo_labels/``, ``student/``, and
    ``control/`` if asked for. Called again, finished stages are not redone and the one that was stopped
    goes on. ``summary.json`` and ``summary.md`` come last.

    Args:
        cfg: config of the teacher. The student has the same but for SELFTRAIN.STUDENT, starts from
            SELFTRAIN.STUDENT_WEIGHTS (the teacher's in the paper, Section 3 and Table 10), and sees
            SOLVER.PSEUDO_IMS_PER_BATCH pseudo images a step; where that is 0, as many as human ones (the
            paper's half and half).
        task: the images and labels.
        rounds: with N > 1 the student becomes the next teacher, N - 1 times; those stages are in
            ``round_2/``, ...
        control: also train, from the weights that the student started from, for its steps on human labels
            alone. What the student gains over this control is what the unlabeled images gave.
        score_floor: pseudo boxes, or pixels, of a lower score are not even written.
        allow_unsafe: load MODEL.WEIGHTS even if that is a pickle that can run code.
        processes: of training and labeling; one by default.

    Returns:
        The summary.

    Raises:
        InputError: the data has a fault, ``output`` lies in a folder of images, a stage under ``output`` was made
            with other settings, or several machines were asked for.
    """
    if in_torchrun() or (processes is not None and processes.num_machines > 1):
        raise InputError(
            "self-train runs on one machine and starts its own processes: use --num-gpus without torchrun, or run "
            "its stages (train, label, train) on several machines, as docs/training.md shows."
        )
    for folder in task.image_folders():
        check_outside(output, folder)
    classes = task.check(cfg)
    if rounds < 1:
        raise InputError(f"--rounds must be at least 1, not {rounds}.")
    loop = _Loop(cfg, task, Path(output), classes, score_floor, allow_unsafe, processes or Processes())
    loop.control_config({"weights": ""})  # a mistake in SELFTRAIN.STUDENT is told now, not after the teacher
    start = time.perf_counter()
    teacher = loop.train("teacher", loop.teacher_config())
    stages = {"teacher": teacher}
    for number in range(1, rounds + 1):
        prefix = "" if number == 1 else f"round_{number}/"
        stages[f"{prefix}pseudo_labels"] = labels = loop.label(f"{prefix}pseudo_labels", teacher)
        student = loop.train(
            f"{prefix}student",
            loop.student_config(teacher, number),
            pseudo_labels(PSEUDO, labels["folder"], cfg),
        )
        stages[f"{prefix}student"] = teacher = student
    if control:
        stages["control"] = loop.train("control", loop.control_config(stages["teacher"]))
    summary = {
        "task": task.name,
        "seed": cfg.SEED,
        "score_thresh": cfg.SELFTRAIN.SCORE_THRESH,
        "seconds_of_last_run": round(time.perf_counter() - start, 1),
        "stages": stages,
    }
    return write_summary(Path(output), summary, loop.config_of("student"), task)


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

    def teacher_config(self) -> CfgNode:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TRAIN = (LABELED,)
        cfg.DATASETS.PSEUDO_TRAIN = ()
        cfg.DATASETS.TEST = (VALIDATION,) if self.task.validation_images else ()
        cfg.SOLVER.PSEUDO_IMS_PER_BATCH = 0
        self.task.set_number_of_classes(cfg, len(self.classes))
        return cfg

    def student_config(self, teacher: dict[str, Any], number: int) -> CfgNode:
        """Of round ``number``, from 1."""
        cfg = self.control_config(teacher)
        cfg.SELFTRAIN.STAGE = self.cfg.SELFTRAIN.STAGE + number
        cfg.DATASETS.PSEUDO_TRAIN = (PSEUDO,)
        cfg.SOLVER.PSEUDO_IMS_PER_BATCH = self.cfg.SOLVER.PSEUDO_IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH
        return cfg

    def control_config(self, teacher: dict[str, Any]) -> CfgNode:
        """The student's schedule without pseudo labels."""
        cfg = self.teacher_config()
        try:
            merge_options(cfg, cfg.SELFTRAIN.STUDENT)
            check_values(cfg)
        except InputError as error:
            raise InputError(f"SELFTRAIN.STUDENT: {error}") from error
        cfg.SELFTRAIN.STAGE = self.cfg.SELFTRAIN.STAGE + 1  # the student's human images, in their order
        start = cfg.SELFTRAIN.STUDENT_WEIGHTS
        cfg.MODEL.WEIGHTS = {"teacher": teacher["weights"], "random": ""}.get(start, start)
        return cfg

    def config_of(self, stage: str) -> CfgNode:
        """The config that a finished training stage was run with, and the weights it made."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.merge_from_file(str(self.output / stage / "config.yaml"))
        cfg.MODEL.WEIGHTS = str(self.output / stage / _final_weights(cfg))
        cfg.SELFTRAIN = self.cfg.SELFTRAIN.clone()  # how to label is not settled by what was trained before
        return cfg

    def train(self, stage: str, cfg: CfgNode, *datasets: DatasetSpec) -> dict[str, Any]:
        """Train one stage, or take what it made before."""
        cfg.OUTPUT_DIR = str(self.output / stage)
        settings = {
            **_settings(cfg),
            "weights_sha256": file_sha256(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else None,
            **self.task.fingerprint(),
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
            return {
                "stage": stage,
                "weights": str(self.output / stage / _final_weights(cfg)),
                "steps": cfg.SOLVER.MAX_ITER,
                "human_images_per_step": cfg.SOLVER.IMS_PER_BATCH,
                "pseudo_images_per_step": cfg.SOLVER.PSEUDO_IMS_PER_BATCH,
                "config": str(self.output / stage / "config.yaml"),
                "metrics": read_json(self.output / stage / RESULTS),
            }

        return _run_stage(self.output / stage, settings, work)

    def label(self, stage: str, teacher: dict[str, Any]) -> dict[str, Any]:
        """Label the unlabeled images. The pseudo-label folder itself knows what it was made with."""
        folder = self.output / stage
        cfg = self.config_of(teacher["stage"])
        images = self.task.unlabeled_images
        logger.info(f"Labeling {images} with {teacher['weights']}")
        run_in_processes(
            _label, self.processes, (cfg, images, list_images(images), str(folder), self.score_floor)
        )
        counts = self.task.count(folder, self.cfg)
        if not counts:
            raise InputError(
                f"No pseudo label of {folder} has a score of {self.cfg.SELFTRAIN.SCORE_THRESH} or more, so the student "
                "would learn nothing from them: train the teacher longer, or lower SELFTRAIN.SCORE_THRESH."
            )
        manifest = read_manifest(folder)
        return {
            "folder": str(folder),
            "images": manifest["listed"],
            "skipped": len(manifest["skipped"]),
            **counts,
            "seconds": manifest["seconds_of_last_run"],
        }


def _final_weights(cfg: CfgNode) -> str:
    """What a training run leaves to label with, below its OUTPUT_DIR."""
    return WEIGHT_AVERAGE if cfg.SELFTRAIN.WEIGHT_EMA_DECAY else "model_final.pth"


def _label(cfg: CfgNode, images: str, names: list[str], folder: str, score_floor: float) -> None:
    generate_pseudo_labels(cfg, images, names, folder, score_floor=score_floor)


def _run_stage(folder: Path, settings: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do a stage's work once: a finished one is taken as it is, one of other settings is refused."""
    file = folder / STAGE
    record: dict[str, Any] = {"settings": settings, "seconds": 0.0, "result": None}
    if file.exists():
        record = read_json(file)
        # Work begun before a config key existed was done as the key's default has it.
        check_unchanged(folder, {**_defaults(), **record["settings"]}, settings)
        if record["result"] is not None:
            logger.info(f"{folder} is finished already.")
            return {**record["result"], "seconds": record["seconds"]}
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and has no {STAGE}: choose another output folder.")
    folder.mkdir(parents=True, exist_ok=True)
    begun_now = not file.exists()
    write_json(file, record)
    start = time.perf_counter()
    try:
        record["result"] = work()
    except InputError:
        if begun_now:  # the user corrects the mistake and calls again, with other settings
            shutil.rmtree(folder)
        raise
    finally:  # the time of a run that was stopped counts as well
        record["seconds"] = round(record["seconds"] + time.perf_counter() - start, 1)
        if folder.exists():
            write_json(file, record)
    return {**record["result"], "seconds": record["seconds"]}


def _settings(cfg: CfgNode) -> dict[str, Any]:
    """Every config key that a training run's result depends on, flat, as JSON reads it back."""
    flat = {key: value for key, value in _flat(cfg).items() if key not in _KEYS_WITHOUT_EFFECT}
    if not cfg.DATASETS.PSEUDO_TRAIN:  # of the keys of self-training, supervised training knows one
        flat = {
            key: value
            for key, value in flat.items()
            if not key.startswith("SELFTRAIN.") or key == "SELFTRAIN.WEIGHT_EMA_DECAY"
        }
    return json.loads(json.dumps(flat))


def _defaults() -> dict[str, Any]:
    """The default of every config key, as :func:`_settings` has them."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    return json.loads(json.dumps(_flat(cfg)))


def _flat(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        key = f"{prefix}{key}"
        if isinstance(value, CfgNode):
            flat.update(_flat(value, f"{key}."))
        else:
            flat[key] = value
    return flat
