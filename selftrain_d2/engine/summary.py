"""What a run of the loop found: ``summary.json``, ``summary.md`` and two pictures."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from selftrain_d2.data.pseudo_label_store import load_pseudo_labels, read_manifest
from selftrain_d2.engine.launch import human_labels, registered
from selftrain_d2.files import write_json, write_text
from selftrain_d2.labeling.generate import generate_pseudo_labels
from selftrain_d2.labeling.quality import (
    QualityRow,
    average_precision,
    markdown_table,
    precision_recall_by_threshold,
)
from selftrain_d2.labeling.visualize import contact_sheet, precision_recall_plot

logger = logging.getLogger(__name__)

SUMMARY, SUMMARY_MARKDOWN = "summary.json", "summary.md"
CONTACT_SHEET, PRECISION_RECALL = "contact_sheet.png", "precision_recall.png"
CONTACT_SHEET_ROWS = 3


def write_summary(output: Path, summary: dict[str, Any], student: CfgNode, data: Any) -> dict[str, Any]:
    """Judge the pseudo labels where truth is known, draw the pictures, write ``summary.json`` last.

    Args:
        output: the loop's output folder.
        summary: seed, threshold and stages of the loop.
        student: config of the (first) student, with its weights.
        data: the loop's ``SelfTrainingData``.

    Returns:
        The summary with all that was added.
    """
    labels = output / "pseudo_labels"
    floor = read_manifest(labels)["score_floor"]
    truth = None
    if data.unlabeled_truth_json is not None:
        name = "selftrain_unlabeled_truth"
        with registered([human_labels(name, data.unlabeled_truth_json, data.unlabeled_images)]):
            truth = DatasetCatalog.get(name)
        predictions = load_pseudo_labels(labels, floor)
        rows = precision_recall_by_threshold(
            predictions, truth, class_names=read_manifest(labels)["thing_classes"]
        )
        precision_recall_plot(rows, output / PRECISION_RECALL, score_thresh=summary["score_thresh"])
        summary["pseudo_label_quality"] = [asdict(row) for row in rows]
        summary["pseudo_label_ap"] = average_precision(predictions, truth)
    _draw_contact_sheet(output, summary["score_thresh"], student, data.unlabeled_images, truth)
    summary["versions"] = {"torch": torch.__version__, "detectron2": detectron2.__version__}
    write_text(output / SUMMARY_MARKDOWN, to_markdown(summary))
    write_json(output / SUMMARY, summary)
    logger.info(f"Results: {output / SUMMARY_MARKDOWN}")
    return summary


def to_markdown(summary: dict[str, Any]) -> str:
    """The summary as a page: one table of detectors, one of pseudo labels, and the pictures."""
    stages = summary["stages"]
    lines = [
        "# Self-training summary",
        "",
        "| stage | AP | AP50 | AP75 | steps | images a step (human + pseudo) | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stage in stages.items():
        if "metrics" not in stage:
            continue
        metrics = stage["metrics"].get("bbox", {})
        values = [metrics.get(key) for key in ("AP", "AP50", "AP75")]
        lines.append(
            f"| {name} | "
            + " | ".join("-" if value is None else f"{value:.1f}" for value in values)
            + f" | {stage['steps']} | {stage['human_images_per_step']} + {stage['pseudo_images_per_step']}"
            + f" | {stage['seconds'] / 60:.1f} |"
        )
    for name, stage in stages.items():
        if "boxes" in stage:
            lines += [
                "",
                f"`{name}`: {stage['boxes']} boxes of score {summary['score_thresh']} or more on "
                f"{stage['images_with_boxes']} of {stage['images']} images ({stage['skipped']} unreadable); "
                f"labeled in {stage['seconds'] / 60:.1f} minutes.",
            ]
    if "pseudo_label_quality" in summary:
        rows = [QualityRow(**row) for row in summary["pseudo_label_quality"] if row["category"] is None]
        lines += [
            "",
            "Pseudo labels of the teacher against the withheld truth (IoU 0.5):",
            "",
            markdown_table(rows),
            "",
            f"![Precision and recall against the threshold]({PRECISION_RECALL})",
        ]
    lines += [
        "",
        f"![Contact sheet]({CONTACT_SHEET})",
        "",
        f"Seed {summary['seed']}. Each stage's exact config is its `config.yaml`. "
        f"torch {summary['versions']['torch']}, detectron2 {summary['versions']['detectron2']}.",
    ]
    return "\n".join(lines) + "\n"


def _draw_contact_sheet(
    output: Path, score_thresh: float, student: CfgNode, images: str, truth: list[dict] | None
) -> None:
    """Some of the unlabeled images that got boxes, evenly spread over the list: not chosen by what they show."""
    pseudo = {d["image_id"]: d for d in load_pseudo_labels(output / "pseudo_labels", score_thresh)}
    names = sorted(name for name, d in pseudo.items() if d["annotations"])
    shown = names[:: max(1, len(names) // CONTACT_SHEET_ROWS)][:CONTACT_SHEET_ROWS]
    with tempfile.TemporaryDirectory() as folder:
        floor = min(0.05, score_thresh)
        generate_pseudo_labels(student, images, shown, os.path.join(folder, "labels"), score_floor=floor)
        labels = load_pseudo_labels(os.path.join(folder, "labels"), score_thresh)
    detected = {d["image_id"]: d for d in labels}
    true = {os.path.realpath(d["file_name"]): d["annotations"] for d in truth or []}
    contact_sheet(
        output / CONTACT_SHEET,
        [pseudo[n]["file_name"] for n in shown],
        [
            (f"Pseudo boxes, score {score_thresh} or more", [pseudo[n]["annotations"] for n in shown]),
            ("Student boxes", [detected[n]["annotations"] for n in shown]),
        ],
        None if truth is None else [true.get(os.path.realpath(pseudo[n]["file_name"]), []) for n in shown],
        truth_title="Human boxes (withheld)",
        class_names=read_manifest(output / "pseudo_labels")["thing_classes"],
    )
