"""The loop on masks, PNGs in a folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from selftrain_d2.data.datasets import list_images, load_images
from selftrain_d2.data.label_maps import VOID, read_label_map
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.pseudo_labels.mask_dataset import PseudoMaskDataset
from selftrain_d2.data.pseudo_labels.masks import read_mask
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.segmentation_datasets import load_segmentation_folder
from selftrain_d2.data.tar_archive import PREFIX as TAR_PREFIX
from selftrain_d2.engine.config_values import is_segmentor
from selftrain_d2.engine.launch import DatasetSpec, human_masks
from selftrain_d2.engine.loop.tasks.base import (
    CONTACT_SHEET,
    LABELED,
    LEAST_PRECISION,
    LEAST_RECALL,
    VALIDATION,
    Samples,
    Task,
    evaluations,
    fault,
    mean_of,
)
from selftrain_d2.errors import InputError
from selftrain_d2.inspection.mask_quality import (
    DEFAULT_THRESHOLDS,
    MaskQualityRow,
    markdown_table,
    mask_quality,
)
from selftrain_d2.inspection.mask_sheet import mask_contact_sheet
from selftrain_d2.modeling.checkpoint import file_sha256


@dataclass
class Segmentation(Task):
    """Masks: a folder of PNGs beside a folder of images, ``masks/a/b.png`` of ``images/a/b.jpg``."""

    labeled_masks: str = ""
    classes: Sequence[str] = ()
    validation_masks: str | None = None
    #: Withheld masks of the unlabeled images, if there are any: to judge pseudo masks by, and for an oracle.
    unlabeled_truth_masks: str | None = None

    name = "segmentation"
    results = "sem_seg"
    metrics = ("mIoU", "fwIoU", "pACC")
    truth_field = "unlabeled_truth_masks"

    def check(self, cfg: CfgNode) -> list[str]:
        classes = list(self.classes)
        if not is_segmentor(cfg):
            raise InputError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, which is no segmentor: leave "
                "--task segmentation out, or give a config like aerial_digits/segmentor_lite0_128.yaml."
            )
        labeled = load_segmentation_folder(self.labeled_images, self.labeled_masks, classes)
        if not any((read_label_map(d["sem_seg_file_name"]) != VOID).any() for d in labeled):
            raise InputError(
                f"The masks in {self.labeled_masks} ignore every pixel ({VOID}): the teacher needs labeled pixels."
            )
        if self.has_truth and self.collected.image_root.startswith(TAR_PREFIX):
            raise InputError(
                f"{self.truth_argument} goes with folders, lists and COCO files of unlabeled images, not with archives."
            )
        if (self.validation_masks is None) != (self.validation_images is None):
            raise InputError("--val-masks and --val-images belong together: give both or neither.")
        if self.validation_masks is not None:
            load_segmentation_folder(self.validation_images, self.validation_masks, classes)
        self._truth()
        self.unlabeled  # noqa: B018  (compared with the others now, told now if none is left)
        return classes

    def known_images(self) -> dict[str, list[str]]:
        folders = {"labeled": self.labeled_images, "of validation": self.validation_images}
        return {
            kind: [os.path.join(folder, name) for name in list_images(folder)]
            for kind, folder in folders.items()
            if folder is not None
        }

    def image_folders(self) -> list[str]:
        return [*super().image_folders(), self.labeled_images, *filter(None, [self.validation_images])]

    def datasets(self) -> list[DatasetSpec]:
        folders = [(LABELED, self.labeled_images, self.labeled_masks)]
        if self.validation_masks:
            folders.append((VALIDATION, self.validation_images, self.validation_masks))
        return [human_masks(*folder, self.classes) for folder in folders]

    def fingerprint(self) -> dict[str, str]:
        masks = load_segmentation_folder(self.labeled_images, self.labeled_masks, self.classes)
        return {"labeled_masks_sha256": self._hash({d["image_id"]: d["sem_seg_file_name"] for d in masks})}

    def truth_fingerprint(self) -> dict[str, str]:
        return {"unlabeled_truth_masks_sha256": self._hash(self._truth())}

    def _hash(self, masks: Mapping[str, str]) -> str:
        """Of the classes, and of mask files by image."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for image_id, file in masks.items():
            digest.update(f"\0{image_id}\0{file_sha256(file)}".encode())
        return digest.hexdigest()

    def truth_of(self, samples: Samples, masks: bool = False) -> list[dict[str, Any]]:
        truth = self._truth()
        return [
            {
                **{key: sample[key] for key in ("file_name", "image_id", "height", "width")},
                "sem_seg_file_name": truth[sample["image_id"]],
            }
            for sample in samples
        ]

    def labeled_names(self) -> list[str]:
        return list_images(self.labeled_images)

    def judge_on_labeled(self, folder: Path) -> float | None:
        masks = load_segmentation_folder(self.labeled_images, self.labeled_masks, self.classes)
        floor = read_manifest(folder)["score_floor"]
        true = {d["image_id"]: d["sem_seg_file_name"] for d in masks}
        (row,) = mask_quality(load_pseudo_labels(folder, floor), true, self.classes, [floor])
        return None if row.mean_iou is None else 100 * row.mean_iou

    def set_number_of_classes(self, cfg: CfgNode, number: int) -> None:
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = number

    def count(self, folder: Path, selection: Mapping[str, Any]) -> dict[str, Any]:
        masks = load_pseudo_labels(folder, **selection)
        pixels = masks.pixels_by_class
        if not pixels.any():
            return {}
        return {
            "images_with_pixels": int((masks.class_counts > 0).sum()),
            "labeled_pixels": int(pixels.sum()),
            "ignored_share": 1 - pixels.sum() / masks.pixels,
            "share_by_class": dict(zip(self.classes, (pixels / masks.pixels).tolist())),
        }

    def judge(self, output: Path, score_thresh: float) -> dict[str, Any]:
        truth = self._truth()
        if truth is None:
            return {}
        predictions = load_pseudo_labels(output / "pseudo_labels", score_thresh)
        thresholds = sorted({*DEFAULT_THRESHOLDS, score_thresh})
        rows = mask_quality(predictions, truth, self.classes, thresholds)
        return {"pseudo_mask_quality": [asdict(row) for row in rows]}

    def _truth(self) -> dict[str, str] | None:
        """Mask files by image, checked; of the images that can be read."""
        if self.unlabeled_truth_masks is None:
            return None
        root, names, _ = self.unlabeled
        readable = [d["image_id"] for d in load_images(root, names)[0]]
        truth = load_segmentation_folder(root, self.unlabeled_truth_masks, self.classes, names=readable)
        return {d["image_id"]: d["sem_seg_file_name"] for d in truth}

    @staticmethod
    def fault_of_labels(runs: Sequence[Mapping[str, Any]]) -> str | None:
        rows = [
            row
            for run in runs
            for row in run.get("pseudo_mask_quality", ())
            if row["threshold"] == run["score_thresh"]
        ]
        if rows:
            right = mean_of(row["pixel_accuracy"] for row in rows)
            kept = 1 - mean_of(row["ignored"] for row in rows)
            known = f", of which {right:.0%} are right (by the withheld truth)" if right is not None else ""
        else:
            right, known = None, ""
            kept = 1 - mean_of(run["stages"]["pseudo_labels"]["ignored_share"] for run in runs)
        return fault(
            f"The score threshold leaves {kept:.0%} of the pixels a class{known}",
            few=kept * (1 if right is None else right) < LEAST_RECALL,
            wrong=right is not None and right < LEAST_PRECISION,
        )

    @staticmethod
    def interesting(pseudo: PseudoMaskDataset) -> list[str]:
        several = [d["image_id"] for d, classes in zip(pseudo, pseudo.class_counts) if classes > 1]
        return several or [d["image_id"] for d in pseudo]

    def draw(self, output: Path, names: Sequence[str], pseudo: Samples, students: Samples) -> None:
        pseudo, student = ({d["image_id"]: d for d in samples} for samples in (pseudo, students))
        columns = [
            ("Pseudo mask, as trained on", [_read(pseudo[n]) for n in names]),
            ("Student mask", [_read(student[n]) for n in names]),
        ]
        truth = self._truth()
        if truth is not None:
            columns.insert(0, ("Human mask (withheld)", [read_label_map(truth[n]) for n in names]))
        mask_contact_sheet(
            output / CONTACT_SHEET, [pseudo[n]["file_name"] for n in names], columns, self.classes
        )

    @staticmethod
    def shown_threshold(score_thresh: float) -> float:
        return 0.0  # every pixel has a class

    @staticmethod
    def sentence(labels: dict[str, Any], selected: str) -> str:
        share = 1 - labels["ignored_share"]
        return f"{share:.1%} of the pixels of {labels['images']} images have {selected}"

    @staticmethod
    def further_lines(summary: dict[str, Any]) -> list[str]:
        trained = {
            called: results["sem_seg"]
            for called, _, results in evaluations(summary["stages"])
            if "sem_seg" in results
        }
        lines = []
        if trained:
            prefix = "IoU-"
            rows = [key[len(prefix) :] for key in next(iter(trained.values())) if key.startswith(prefix)]
            lines += [
                "IoU by class:",
                "",
                f"| class | {' | '.join(trained)} |",
                "|---" * (len(trained) + 1) + "|",
            ]
            for name in rows:
                values = [metrics.get(prefix + name) for metrics in trained.values()]
                lines.append(f"| {name} | {' | '.join('-' if v is None else f'{v:.1f}' for v in values)} |")
            lines.append("")
        if "pseudo_mask_quality" in summary:
            rows = [MaskQualityRow(**row) for row in summary["pseudo_mask_quality"]]
            lines += [
                "Pseudo masks of the teacher against the withheld truth, on the pixels that a threshold leaves:",
                "",
                markdown_table(rows),
                "",
            ]
        return lines


def _read(sample: dict[str, Any]) -> np.ndarray:
    """The mask of a dataset dict, (H, W); 255 where its score is too low."""
    return read_mask(sample["sem_seg_file_name"], sample["sem_seg_sha256"]).at(
        sample["sem_seg_least_percent"]
    )
