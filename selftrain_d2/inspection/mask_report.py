"""The report on a folder of pseudo masks: what of them a threshold leaves, and some to look at.

Layout of the output folder::

    report.md          the page
    report.json        every number of it
    confidences.png    pixels by confidence and class
    images.png         some images and their masks

Letters in shapes: C classes.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from selftrain_d2.data.image_files import UNREADABLE, read_image
from selftrain_d2.data.pseudo_labels.manifest import read_manifest, shard_files
from selftrain_d2.data.pseudo_labels.mask_dataset import PseudoMaskDataset
from selftrain_d2.data.pseudo_labels.masks import PERCENTS, least_percents, read_mask
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.pseudo_labels.shards import flat_values, read_shards
from selftrain_d2.data.segmentation_datasets import load_segmentation_folder
from selftrain_d2.files import write_json, write_text, writing
from selftrain_d2.inspection.mask_quality import (
    DEFAULT_THRESHOLDS,
    MaskQualityRow,
    markdown_table,
    mask_quality,
    ratio,
)
from selftrain_d2.inspection.mask_sheet import CLASSES_SHOWN, class_colours, mask_contact_sheet
from selftrain_d2.inspection.style import GREY, save_figure, shortened

logger = logging.getLogger(__name__)

REPORT, NUMBERS, CONFIDENCES, IMAGES = "report.md", "report.json", "confidences.png", "images.png"
IMAGES_SHOWN = 8


def write_mask_report(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    *,
    score_thresh: float = 0.5,
    image_root: str | os.PathLike | None = None,
    truth_masks: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Write the report. Without truth it reads the shards, and only the PNGs that it shows.

    Args:
        folder: a finished folder of pseudo masks.
        output: folder, made if it is not there. Files of an earlier report in it are replaced.
        score_thresh: pixels with at least this score count as labeled.
        image_root: where the images are, if not where they were when labeled.
        truth_masks: folder of true masks (see ``load_segmentation_folder``) of all labeled images, to judge by.

    Returns:
        What ``report.json`` holds. Shares are in [0, 1], None where undefined (0 / 0).

    Raises:
        InputError: see ``load_pseudo_labels`` and ``load_segmentation_folder``; or the output cannot be written.
    """
    manifest = read_manifest(folder)
    classes = manifest["stuff_classes"]
    masks = load_pseudo_labels(folder, score_thresh, image_root=image_root)
    pixels = pixel_histogram(folder, manifest)
    known = [threshold for threshold in DEFAULT_THRESHOLDS if threshold >= manifest["score_floor"]]
    numbers: dict[str, Any] = {
        "score_thresh": score_thresh,
        "images": {
            "listed": manifest["listed"],
            "labeled": len(masks),
            "skipped": len(manifest["skipped"]),
            "all_ignored": int((masks.class_counts == 0).sum()),
        },
        "pixels": masks.pixels,
        "ignored": ratio(masks.pixels - int(masks.pixels_by_class.sum()), masks.pixels),
        "by_class": {
            name: {
                "share": ratio(kept, masks.pixels),
                "mean_confidence": ratio(int(of_class @ np.arange(PERCENTS)) / 100, int(of_class.sum())),
            }
            for name, kept, of_class in zip(classes, masks.pixels_by_class.tolist(), pixels)
        },
        "ignored_by_threshold": {
            str(threshold): ratio(masks.pixels - int(pixels[:, least:].sum()), masks.pixels)
            for threshold, least in zip(known, least_percents(known))
        },
    }
    if truth_masks is not None:
        truth = load_segmentation_folder(
            masks.image_root, truth_masks, classes, names=[d["image_id"] for d in masks]
        )
        files = {d["image_id"]: d["sem_seg_file_name"] for d in truth}
        thresholds = sorted({*known, score_thresh})
        numbers["quality"] = [asdict(row) for row in mask_quality(masks, files, classes, thresholds)]
    output = Path(output)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        for picture in (CONFIDENCES, IMAGES):  # of an earlier report
            (output / picture).unlink(missing_ok=True)
        if pixels.any():
            save_figure(_confidences(pixels, classes, score_thresh), output / CONFIDENCES)
        _draw_images(masks, classes, score_thresh, output / IMAGES)
        write_json(output / NUMBERS, numbers)
        pictures = [name for name in (CONFIDENCES, IMAGES) if (output / name).exists()]
        write_text(output / REPORT, _page(numbers, pictures))
    return numbers


def pixel_histogram(folder: str | os.PathLike, manifest: dict[str, Any]) -> np.ndarray:
    """(C, 101) int64: pixels of all images by class and confidence in percent, of a folder and its manifest."""
    bins = PERCENTS * len(manifest["stuff_classes"])
    counts = np.zeros(bins, np.int64)
    for table in read_shards(shard_files(folder, manifest), ["bins", "pixels"]):
        of_shard = np.bincount(flat_values(table, "bins"), flat_values(table, "pixels"), minlength=bins)
        counts += of_shard.astype(np.int64)
    return counts.reshape(-1, PERCENTS)


def _confidences(pixels: np.ndarray, classes: Sequence[str], score_thresh: float) -> Figure:
    figure = Figure((8, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    # The most frequent at the bottom; the legend names as many as it can hold.
    order = np.argsort(-pixels.sum(axis=1), kind="stable")
    colours = class_colours(classes) / 255
    colours[(colours == 0).all(axis=1)] = to_rgb(GREY)  # the background is black, as the threshold's line
    labels = [shortened(classes[i]) if n < CLASSES_SHOWN else "" for n, i in enumerate(order)]
    axes.stackplot(
        np.arange(PERCENTS) / 100,
        pixels[order] / pixels.sum(),
        labels=labels,
        colors=colours[order],
        step="mid",
    )
    axes.axvline(score_thresh, color="black", linewidth=1, linestyle="--", label="threshold")
    axes.set(xlabel="confidence", ylabel="share of the pixels, by whole percents", xlim=(0, 1))
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return figure


def _draw_images(
    masks: PseudoMaskDataset, classes: Sequence[str], score_thresh: float, picture: Path
) -> None:
    """Draw some images, those that show most classes among 8 times as many drawn at random (always the same)."""
    drawn = random.Random(0).sample(range(len(masks)), min(8 * IMAGES_SHOWN, len(masks)))
    counts = masks.class_counts
    chosen = [masks[i] for i in sorted(drawn, key=lambda i: (-counts[i], i))[:IMAGES_SHOWN]]
    shown = [d for d in chosen if _is_readable(d["file_name"])]
    if len(shown) < len(chosen):
        lost = next(d["file_name"] for d in chosen if d not in shown)
        logger.warning(
            f"{len(chosen) - len(shown)} of the {len(chosen)} images to show are not there as they were labeled, e.g. "
            f"{lost}: say with --image-root where the images are now."
        )
    if shown:
        labels = [
            read_mask(d["sem_seg_file_name"], d["sem_seg_sha256"]).at(d["sem_seg_least_percent"])
            for d in shown
        ]
        columns = [(f"Pseudo mask (score ≥ {score_thresh:g})", labels)]
        mask_contact_sheet(picture, [d["file_name"] for d in shown], columns, classes)


def _is_readable(file: str) -> bool:
    try:
        read_image(file, "RGB")
    except UNREADABLE:
        return False
    return True


def _page(numbers: dict[str, Any], pictures: Sequence[str]) -> str:
    images = numbers["images"]
    lines = [
        "# Pseudo masks",
        "",
        "{listed:,} images listed = {labeled:,} labeled + {skipped:,} skipped.".format(**images)
        + f" At the threshold {numbers['score_thresh']:g}, {_percent(numbers['ignored'])} of the pixels are ignored, "
        f"and of {images['all_ignored']:,} images every pixel.",
        "",
        "| class | share of the pixels | mean confidence (all scores) |",
        "|---|---|---|",
        *(
            f"| {_cell(name)} | {_percent(row['share'])} | {_percent(row['mean_confidence'])} |"
            for name, row in numbers["by_class"].items()
        ),
        "",
    ]
    if "quality" in numbers:
        rows = [MaskQualityRow(**row) for row in numbers["quality"]]
        lines += ["Against the truth, on the pixels that a threshold leaves:", "", markdown_table(rows), ""]
    else:
        lines += [
            "| score at least | pixels ignored |",
            "|---|---|",
            *(f"| {threshold} | {_percent(s)} |" for threshold, s in numbers["ignored_by_threshold"].items()),
            "",
        ]
    for picture in pictures:
        lines += [f"![{Path(picture).stem}]({picture})", ""]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _cell(name: str) -> str:
    return name.replace("|", "\\|")
