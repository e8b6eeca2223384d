"""The loop on boxes, with labels in COCO JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from selftrain_d2.data.coco_datasets import reading_coco
from selftrain_d2.data.coco_file import CocoFile, read_coco_images
from selftrain_d2.data.datasets import check_same_classes, read_human_coco
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.pseudo_labels.selection import fully_selected
from selftrain_d2.engine.config_values import is_segmentor
from selftrain_d2.engine.launch import DatasetSpec, human_labels, registered
from selftrain_d2.engine.loop.tasks.base import (
    CONTACT_SHEET,
    LABELED,
    LEAST_PRECISION,
    LEAST_RECALL,
    VALIDATION,
    Samples,
    Task,
    fault,
    mean_of,
)
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
from selftrain_d2.storage import join

PRECISION_RECALL = "precision_recall.png"
#: Rules of thumb, where there is no truth: pseudo boxes an image over those of people from which they are said to be
#: too few, or too many, of which some must be wrong.
LEAST_BOXES_RATIO, MOST_BOXES_RATIO = 0.5, 1.5


@dataclass
class Detection(Task):
    """Boxes, in COCO JSON."""

    labeled_json: str = ""
    validation_json: str | None = None
    #: Withheld labels of the unlabeled images, if there are any: to judge pseudo labels by, and for an oracle.
    unlabeled_truth_json: str | None = None

    name = "detection"
    results = "bbox"
    metrics = ("AP", "AP50", "AP75")
    truth_field = "unlabeled_truth_json"

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
        unlabeled_root = self.collected.image_root
        if (self.validation_json is None) != (self.validation_images is None):
            raise InputError("--val-json and --val-images belong together: give both or neither.")
        for json_file, images in (
            (self.validation_json, self.validation_images),
            (self.unlabeled_truth_json, unlabeled_root),
        ):
            if json_file is not None:
                names = read_human_coco(json_file, images, masks=masks).class_names
                check_same_classes(classes, names, json_file, self.labeled_json)
        self.unlabeled  # noqa: B018  (compared with the others now, told now if none is left)
        return classes

    def known_images(self) -> dict[str, list[str]]:
        labels = {"labeled": (self.labeled_json, self.labeled_images)}
        if self.validation_json is not None:
            labels["of validation"] = (self.validation_json, self.validation_images)
        return {
            kind: [join(images, image["file_name"]) for image in read_coco_images(json_file)]
            for kind, (json_file, images) in labels.items()
        }

    def datasets(self) -> list[DatasetSpec]:
        datasets = [human_labels(LABELED, self.labeled_json, self.labeled_images)]
        if self.validation_json:
            datasets.append(human_labels(VALIDATION, self.validation_json, self.validation_images))
        return datasets

    def fingerprint(self) -> dict[str, str]:
        return {"labeled_json_sha256": file_sha256(self.labeled_json)}

    def truth_fingerprint(self) -> dict[str, str]:
        return {"unlabeled_truth_json_sha256": file_sha256(self.unlabeled_truth_json)}

    def truth_of(self, samples: Samples, masks: bool = False) -> list[dict[str, Any]]:
        truth = {os.path.realpath(d["file_name"]): d for d in self._truth(masks)}
        labeled = []
        for sample in samples:
            true = truth.get(os.path.realpath(sample["file_name"]))
            if true is None:
                raise InputError(
                    f"{self.unlabeled_truth_json} has no entry of the unlabeled image {sample['file_name']}, but "
                    "--oracle trains on the truth of all: add it (without annotations if it shows no object), or leave "
                    "--oracle out."
                )
            for key in ("height", "width"):
                if true[key] != sample[key]:
                    raise InputError(
                        f"{self.unlabeled_truth_json} says that {sample['file_name']} has the {key} {true[key]}, but "
                        f"it has {sample[key]}: correct it there."
                    )
            image = {key: sample[key] for key in ("file_name", "image_id", "height", "width")}
            labeled.append({**image, "annotations": true["annotations"]})
        if not any(not a["iscrowd"] for d in labeled for a in d["annotations"]):
            raise InputError(f"{self.unlabeled_truth_json} has no object for --oracle to learn from.")
        return labeled

    def labeled_names(self) -> list[str]:
        return [image["file_name"] for image in self._labeled().content["images"]]

    def judge_on_labeled(self, folder: Path) -> float | None:
        labels = load_pseudo_labels(folder, read_manifest(folder)["score_floor"])
        with registered([human_labels(LABELED, self.labeled_json, self.labeled_images)]):
            return average_precision(labels, DatasetCatalog.get(LABELED))[self.metrics[0]]

    def _labeled(self) -> CocoFile:
        return read_human_coco(self.labeled_json, self.labeled_images)

    def set_number_of_classes(self, cfg: CfgNode, number: int) -> None:
        cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = number

    def count(self, folder: Path, selection: Mapping[str, Any]) -> dict[str, Any]:
        manifest = read_manifest(folder)
        labels = load_pseudo_labels(folder, **selection)
        boxes = labels.box_counts
        if not boxes.any():
            return {}
        weighed = int((labels.weights < 1).sum())
        counts = {
            "images_with_boxes": int((boxes > 0).sum()),
            "boxes": int(boxes.sum()) - weighed,
            "boxes_above_floor": manifest["boxes"],
        }
        if selection["ignore_score_thresh"] is not None:
            counts["ignored_boxes"] = int(labels.ignored_counts.sum())
        if selection.get("score_weighted"):
            counts["weighted_boxes"] = weighed
        return counts

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

    def facts_of_labels(self, output: Path, selection: Mapping[str, Any]) -> dict[str, Any]:
        labeled = self._labeled()
        people = sum(not annotation["iscrowd"] for annotation in labeled.annotations)
        facts: dict[str, Any] = {"human_boxes_per_image": people / len(labeled.content["images"])}
        truth = self._truth()
        if truth is not None:
            selected = load_pseudo_labels(output / "pseudo_labels", **fully_selected(selection))
            everything = precision_recall_by_threshold(selected, truth, thresholds=[0.0])[0]
            facts["selected_quality"] = {"precision": everything.precision, "recall": everything.recall}
        return facts

    @staticmethod
    def fault_of_labels(runs: Sequence[Mapping[str, Any]]) -> str | None:
        quality = [run["selected_quality"] for run in runs if "selected_quality" in run]
        precision, recall = (mean_of(row[key] for row in quality) for key in ("precision", "recall"))
        if precision is not None and recall is not None:
            return fault(
                f"Of the pseudo boxes {precision:.0%} are right, and of the objects {recall:.0%} have one (by the "
                "withheld truth)",
                few=recall < LEAST_RECALL,
                wrong=precision < LEAST_PRECISION,
            )
        labels = [run["stages"]["pseudo_labels"] for run in runs]
        pseudo = mean_of(stage["boxes"] / (stage["images"] - stage["skipped"]) for stage in labels)
        human = mean_of(run.get("human_boxes_per_image") for run in runs)
        if not human or pseudo is None:
            return None
        return fault(
            f"The pseudo labels have {pseudo:.1f} boxes an image, people drew {human:.1f} in the labeled ones",
            few=pseudo < LEAST_BOXES_RATIO * human,
            wrong=pseudo > MOST_BOXES_RATIO * human,
        )

    def _truth(self, masks: bool = False) -> list[dict[str, Any]] | None:
        if self.unlabeled_truth_json is None:
            return None
        name = "selftrain_unlabeled_truth"
        with (
            registered([human_labels(name, self.unlabeled_truth_json, self.collected.image_root)]),
            reading_coco([name], masks=masks),
        ):
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
