"""What a run of the loop found: ``summary.json``, ``summary.md`` and pictures."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode

from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.pseudo_labels.selection import fully_selected, selection_in_words
from selftrain_d2.engine.loop.findings import in_words
from selftrain_d2.engine.loop.tasks import TASKS, Task
from selftrain_d2.engine.loop.tasks.base import CONTACT_SHEET, evaluations
from selftrain_d2.files import write_json, write_text
from selftrain_d2.labeling.generate import generate_pseudo_labels
from selftrain_d2.labeling.views import see_once

logger = logging.getLogger(__name__)

SUMMARY, SUMMARY_MARKDOWN = "summary.json", "summary.md"
CONTACT_SHEET_ROWS = 3


def write_summary(output: Path, summary: dict[str, Any], student: CfgNode, task: Task) -> dict[str, Any]:
    """Judge the pseudo labels where truth is known, draw the pictures, write ``summary.json`` last.

    Args:
        output: the loop's output folder.
        summary: task, seed, threshold and stages of the loop.
        student: config of the (first) student, with its weights.
        task: the loop's data.

    Returns:
        The summary with all that was added.
    """
    summary["selected"] = selection_in_words(student)
    summary |= task.judge(output, summary["score_thresh"])
    summary |= task.facts_of_labels(output, summary["stages"]["pseudo_labels"]["selection"])
    _draw_contact_sheet(output, summary, student, task)
    summary["versions"] = {"torch": torch.__version__, "detectron2": detectron2.__version__}
    summary = {"in_words": in_words([summary]), **summary}
    write_text(output / SUMMARY_MARKDOWN, to_markdown(summary))
    write_json(output / SUMMARY, summary)
    logger.info(f"Results: {output / SUMMARY_MARKDOWN}")
    return summary


def to_markdown(summary: dict[str, Any]) -> str:
    """The summary as a page: one table of trained models, one of pseudo labels, and the pictures."""
    stages, task = summary["stages"], TASKS[summary["task"]]
    lines = [
        "# Self-training summary",
        "",
        " ".join(summary["in_words"]),
        "",
        f"| stage | {' | '.join(task.metrics)} | steps | images a step (human + pseudo) | minutes |",
        "|---" * (len(task.metrics) + 4) + "|",
    ]
    for called, name, results in evaluations(stages):
        stage, metrics = stages[name], results.get(task.results, {})
        values = [metrics.get(key) for key in task.metrics]
        lines.append(
            f"| {called} | "
            + " | ".join("-" if value is None else f"{value:.1f}" for value in values)
            + f" | {stage['steps']}{_refined(stage)}"
            + f" | {stage['human_images_per_step']} + {stage['pseudo_images_per_step']} | {stage['seconds'] / 60:.1f} |"
        )
    for name, stage in stages.items():
        if "best" in stage:
            lines += ["", f"`{name}`: {_best(stage)}."]
        if "metrics" not in stage:
            lines += [
                "",
                f"`{name}`: {task.sentence(stage, summary['selected'])} "
                f"({stage['skipped']} unreadable{_left_out(stage)}); "
                f"labeled in {stage['seconds'] / 60:.1f} minutes.",
                *_moving_teacher(summary),
                *_thresholds(stage),
            ]
    lines += [
        "",
        *_rounds(summary),
        *task.further_lines(summary),
        f"![Contact sheet]({CONTACT_SHEET})",
        "",
        f"Seed {summary['seed']}. Each stage's exact config is its `config.yaml`. "
        f"torch {summary['versions']['torch']}, detectron2 {summary['versions']['detectron2']}.",
    ]
    return "\n".join(lines) + "\n"


def _moving_teacher(summary: dict[str, Any]) -> list[str]:
    """Whose labels these are, where the student learned from others in every step."""
    if summary.get("teacher", "labels") == "labels":  # summaries of versions before do not say
        return []
    return [
        "They are what the student's teacher, a moving average of its weights, finds at the end of training; the "
        "student learned from what it found in each step.",
    ]


def _rounds(summary: dict[str, Any]) -> list[str]:
    """How each round's teacher labels the labeled images."""
    judged = summary.get("labels_of_labeled")
    if judged is None:
        return []
    values = (
        f"round {number} {'-' if value is None else f'{value:.1f}'}"
        for number, value in enumerate(judged["by_round"], 1)
    )
    return [
        f"{judged['metric']} of each round's teacher on the labeled images, which it was trained on: "
        f"{', '.join(values)}.",
        "",
    ]


def _thresholds(stage: dict[str, Any]) -> list[str]:
    """A table of the thresholds of a labeling stage that people's counts chose."""
    counts = stage.get("thresholds_by_counts")
    if counts is None:
        return []
    lines = [
        "",
        f"Thresholds by people's counts on {counts['human_images']} labeled images, for {counts['pseudo_images']} "
        "pseudo-labeled ones:",
        "",
        "| class | human boxes | an image | threshold | ignored from | pseudo boxes | an image | |",
        "|---" * 8 + "|",
    ]
    for row in [*counts["classes"], counts["all_classes"]]:
        human, pseudo, ignored = row["human_boxes"], row["boxes"], row["ignore_score_thresh"]
        lines.append(
            f"| {row['category'] or 'all together'} | {human} | {human / max(counts['human_images'], 1):.2f} "
            f"| {row['score_thresh']:.3g} | {'-' if ignored is None else f'{ignored:.3g}'} "
            f"| {pseudo} | {pseudo / max(counts['pseudo_images'], 1):.2f} | {row['reason']} |"
        )
    return lines


def _refined(stage: dict[str, Any]) -> str:
    steps = stage.get("refine_steps", 0)  # stages of versions before have none
    return f" (the last {steps} on human labels alone)" if steps else ""


def _best(stage: dict[str, Any]) -> str:
    """How good the best weights of a training stage are."""
    best = stage["best"]
    value = "-" if best["value"] is None else f"{best['value']:.4g}"
    return f"the best weights by {best['metric']} ({value}) are of step {best['steps']} of {stage['steps']}"


def _left_out(stage: dict[str, Any]) -> str:
    """Unlabeled images that were not labeled because people had labeled them."""
    return "".join(f", {number} left out as {kind}" for kind, number in stage.get("left_out", {}).items())


def _draw_contact_sheet(output: Path, summary: dict[str, Any], student: CfgNode, task: Task) -> None:
    """Some of the unlabeled images that got labels, evenly spread over the list: not chosen by what they show."""
    folder, score_thresh = output / "pseudo_labels", summary["score_thresh"]
    selection = summary["stages"]["pseudo_labels"]["selection"]
    # Drawn are the objects that count fully, not what is ignored or weighed.
    pseudo = load_pseudo_labels(folder, **fully_selected(selection))
    names = sorted(task.interesting(pseudo))
    shown = names[:: max(1, len(names) // CONTACT_SHEET_ROWS)][:CONTACT_SHEET_ROWS]
    see_once(student)
    with tempfile.TemporaryDirectory() as folder:
        labels = os.path.join(folder, "labels")
        generate_pseudo_labels(
            student,
            task.unlabeled.image_root,
            shown,
            labels,
            score_floor=min(0.05, task.shown_threshold(score_thresh)),
            alone=True,
        )
        students = load_pseudo_labels(labels, task.shown_threshold(score_thresh))
        task.draw(output, shown, pseudo, students)
