"""The whole loop on one's own data: teacher, pseudo labels, student."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from selftrain_d2.engine.launch import selected_labels
from selftrain_d2.engine.loop.checks import checked_stages
from selftrain_d2.engine.loop.options import LoopOptions
from selftrain_d2.engine.loop.oracle import true_labels
from selftrain_d2.engine.loop.stages import PSEUDO, Stages
from selftrain_d2.engine.loop.summary import write_summary
from selftrain_d2.engine.loop.tasks import Task
from selftrain_d2.engine.run_folder import MOVING_TEACHER, made_and_locked

logger = logging.getLogger(__name__)


def self_train(
    cfg: CfgNode,
    task: Task,
    output: str | os.PathLike,
    options: LoopOptions | None = None,
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
        options: rounds, what to compare the student with, and more; by default one round alone.

    Returns:
        The summary.

    Raises:
        InputError: the data has a fault, a config is refused, ``output`` lies in a folder of images, a stage under
            ``output`` was made with other settings, another loop is writing to it, or several machines were asked for
            without torchrun.
    """
    stages = checked_stages(cfg, task, output, options or LoopOptions())
    with contextlib.closing(made_and_locked(output)):
        return _run(stages)


def _run(stages: Stages) -> dict[str, Any]:
    """All stages and the summary."""
    options, start = stages.options, time.perf_counter()
    teacher = stages.train("teacher", stages.teacher_config())
    made, judged = {"teacher": teacher}, []
    stopped = None
    for number in range(1, options.rounds + 1):
        prefix = "" if number == 1 else f"round_{number}/"
        if options.rounds > 1:
            judged.append(stages.judge(f"{prefix}labels_of_labeled", teacher))
            worse = _worse_than_before(judged, stages.task.metrics[0])
            if worse and not options.keep_going:
                stopped = f"{worse} The rounds end here; --keep-going goes on."
                logger.warning(stopped)
                break
            if worse:
                logger.warning(worse)
        if stages.moving_teacher:
            made["student"] = stages.train(
                "student", stages.student_config(teacher, number), stages.unlabeled
            )
            # What it had at the end is what can be looked at, judged and counted.
            made["pseudo_labels"] = stages.label("pseudo_labels", made["student"], MOVING_TEACHER)
            break
        made[f"{prefix}pseudo_labels"] = labels = stages.label(f"{prefix}pseudo_labels", teacher)
        student = stages.train(
            f"{prefix}student",
            stages.student_config(teacher, number),
            selected_labels(
                PSEUDO,
                stages.output / labels["folder"],
                labels["selection"],
                labels.get("thresholds_by_counts"),
            ),
        )
        made[f"{prefix}student"] = teacher = student
    if options.control:
        made["control"] = stages.train("control", stages.control_config(made["teacher"]))
    if options.oracle:
        cfg, folder = stages.oracle_config(made["teacher"]), stages.output / "pseudo_labels"
        made["oracle"] = stages.train(
            "oracle",
            cfg,
            true_labels(stages.task, folder, cfg.MODEL.MASK_ON),
            further_settings=stages.task.truth_fingerprint(),
        )
    summary = {
        "task": stages.task.name,
        "teacher": stages.cfg.SELFTRAIN.TEACHER,
        "seed": stages.cfg.SEED,
        "score_thresh": made["pseudo_labels"]["score_thresh"],
        "seconds_of_last_run": round(time.perf_counter() - start, 1),
        "stages": made,
    }
    if judged:
        summary["labels_of_labeled"] = {"metric": stages.task.metrics[0], "by_round": judged}
    if stopped:
        summary["stopped"] = stopped
    return write_summary(stages.output, summary, stages.config_of(made["student"]), stages.task)


def _worse_than_before(judged: Sequence[float | None], metric: str) -> str | None:
    """A sentence if the last round's teacher labels the labeled images worse than the one before it."""
    before, now = (0.0 if value is None else value for value in [None, *judged][-2:])
    if len(judged) < 2 or now >= before:
        return None
    return (
        f"The teacher of round {len(judged)} labels the labeled images worse than that of round {len(judged) - 1} "
        f"({metric} {now:.1f} after {before:.1f}), so that its pseudo labels are likely to be worse as well."
    )
