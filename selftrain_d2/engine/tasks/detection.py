"""The loop on boxes, with labels in COCO JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from selftrain_d2.data.datasets import check_same_classes, list_images, read_human_coco
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.pseudo_labels.selection import selection_from_config
from selftrain_d2.engine.config_values import is_segmentor
from selftrain_d2.engine.launch import DatasetSpec, human_labels, registered
from selftrain_d2.engine.tasks.base import CONTACT_SHEET, LABELED, VALIDATION, Samples, Task
from selftrain_d2.errors import InputError
from selftrain_d2.inspection.box_quality import (
    QualityRow,
    average_precision,
    markdown_table,
    precision_recall_by_threshold,
)
from selftrain_d2.inspection.box_quality_plot import precision_recall_plot
from selftrain_d2.inspection.box_sheet import contact_sheet
from selftrain_d2.modeling.checkpoint import file_sha256

PRECISION_RECALL = "precision_recall.png"


@dataclass
class Detection(Task):
    """Boxes, in COCO JSON."""

    labeled_json: str = ""
    validation_json: str | None = None
    #: Withheld labels of the unlabeled images, if there are any: pseudo labels are judged by them.
    unlabeled_truth_json: str | None = None

    name = "detection"
    results = "bbox"
    metrics = ("AP", "AP50", "AP75")

    def check(self, cfg: CfgNode) -> list[str]:
        if is_segmentor(cfg):
            raise InputError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, which makes no boxes: pass "
                "--task segmentation, or the config of a detector."
            )
        masks = cfg.MODEL.MASK_ON
        labeled = read_human_coco(self.labeled_json, self.labeled_images, masks=masks)
        labeled.check_objects()
        classes = labeled.class_names
        list_images(self.unlabeled_images)
        if (self.validation_json is None) != (self.validation_images is None):
            raise InputError("--val-json and --val-images belong together: give both or neither.")
        for json_file, images in (
            (self.validation_json, self.validation_images),
            (self.unlabeled_truth_json, self.unlabeled_images),
        ):
            if json_file is not None:
                names = read_human_coco(json_file, images, masks=masks).class_names
                check_same_classes(classes, names, json_file, self.labeled_json)
        return classes

    def datasets(self) -> list[DatasetSpec]:
        datasets = [human_labels(LABELED, self.labeled_json, self.labeled_images)]
        if self.validation_json:
            datasets.append(human_labels(VALIDATION, self.validation_json, self.validation_images))
        return datasets

    def fingerprint(self) -> dict[str, str]:
        return {"labeled_json_sha256": file_sha256(self.labeled_json)}

    def set_number_of_classes(self, cfg: CfgNode, number: int) -> None:
        cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = number

    def count(self, folder: Path, cfg: CfgNode) -> dict[str, Any]:
        manifest = read_manifest(folder)
        boxes = load_pseudo_labels(folder, **selection_from_config(cfg, manifest["thing_classes"])).box_counts
        if not boxes.any():
            return {}
        return {
            "images_with_boxes": int((boxes > 0).sum()),
            "boxes": int(boxes.sum()),
            "boxes_above_floor": manifest["boxes"],
        }

    def judge(self, output: Path, score_thresh: float) -> dict[str, Any]:
        truth = self._truth()
        if truth is None:
            return {}
        labels = output / "pseudo_labels"
        manifest = read_manifest(labels)
        predictions = load_pseudo_labels(labels, manifest["score_floor"])
        rows = precision_recall_by_threshold(predictions, truth, class_names=manifest["thing_classes"])
        precision_recall_plot(rows, output / PRECISION_RECALL, score_thresh=score_thresh)
        return {
            "pseudo_label_quality": [asdict(row) for row in rows],
            "pseudo_label_ap": average_precision(predictions, truth),
        }

    def _truth(self) -> list[dict[str, Any]] | None:
        if self.unlabeled_truth_json is None:
            return None
        name = "selftrain_unlabeled_truth"
        with registered([human_labels(name, self.unlabeled_truth_json, self.unlabeled_images)]):
            return DatasetCatalog.get(name)

    @staticmethod
    def interesting(pseudo: Samples) -> list[str]:
        return [d["image_id"] for d in pseudo if d["annotations"]]

    def draw(self, output: Path, names: Sequence[str], pseudo: Samples, students: Samples) -> None:
        pseudo, student = ({d["image_id"]: d for d in samples} for samples in (pseudo, students))
        truth = self._truth()
        true = {os.path.realpath(d["file_name"]): d["annotations"] for d in truth or []}
        contact_sheet(
            output / CONTACT_SHEET,
            [pseudo[n]["file_name"] for n in names],
            [
                ("Pseudo boxes, as trained on", [pseudo[n]["annotations"] for n in names]),
                ("Student boxes", [student[n]["annotations"] for n in names]),
            ],
            None
            if truth is None
            else [true.get(os.path.realpath(pseudo[n]["file_name"]), []) for n in names],
            truth_title="Human boxes (withheld)",
            class_names=read_manifest(output / "pseudo_labels")["thing_classes"],
        )

    @staticmethod
    def sentence(labels: dict[str, Any], selected: str) -> str:
        return (
            f"{labels['boxes']} boxes of {selected} on {labels['images_with_boxes']} of "
            f"{labels['images']} images"
        )

    @staticmethod
    def further_lines(summary: dict[str, Any]) -> list[str]:
        if "pseudo_label_quality" not in summary:
            return []
        rows = [QualityRow(**row) for row in summary["pseudo_label_quality"] if row["category"] is None]
        return [
            "Pseudo labels of the teacher against the withheld truth (IoU 0.5):",
            "",
            markdown_table(rows),
            "",
            f"![Precision and recall against the threshold]({PRECISION_RECALL})",
            "",
        ]
