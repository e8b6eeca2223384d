"""The course of a training run as a picture, from its ``metrics.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from selftrain_d2.errors import InputError
from selftrain_d2.files import writing

METRICS = "metrics.json"

#: Panels: title, label of the y axis, whether it is logarithmic, and scalar -> label of its line.
PANELS = (
    ("Raw losses", "loss", True, {"human_loss": "human", "pseudo_loss": "pseudo"}),
    (
        "Moving averages",
        "loss",
        True,
        {"human_loss_average": "human", "pseudo_loss_average": "pseudo"},
    ),
    (
        "Weighted losses",
        "loss",
        True,
        {"weighted_human_loss": "human", "weighted_pseudo_loss": "pseudo", "total_loss": "total"},
    ),
    (
        "Weights",
        "weight",
        False,
        {
            "human_loss_weight": "of the human loss",
            "pseudo_loss_weight": "of the pseudo loss",
            "loss_ratio": "avg(L_h) / avg(L_p)",
            "alpha": "alpha",
        },
    ),
    (
        "Labels of the augmented images",
        "boxes per image",
        False,
        {
            "human_boxes_per_image": "human",
            "pseudo_boxes_per_image": "pseudo",
            "human_ignored_boxes_per_image": "human, ignored",
            "pseudo_ignored_boxes_per_image": "pseudo, ignored",
        },
    ),
    (
        "Images without boxes",
        "share",
        False,
        {"human_empty_share": "human", "pseudo_empty_share": "pseudo"},
    ),
    (
        "Masks of the augmented images",
        "share",
        False,
        {
            "human_valid_pixel_share": "pixels not ignored, human",
            "pseudo_valid_pixel_share": "pixels not ignored, pseudo",
            "human_all_ignored_share": "images all ignored, human",
            "pseudo_all_ignored_share": "images all ignored, pseudo",
        },
    ),
    ("Learning rate", "", False, {"lr": "learning rate"}),
    ("Speed", "images per second", False, {"images_per_second": "images per second"}),
    (
        "Evaluation",
        "AP or IoU",
        False,
        {"bbox/AP": "box AP", "bbox/AP50": "box AP50", "segm/AP": "mask AP", "sem_seg/mIoU": "mIoU"},
    ),
)


def plot_metrics(folders: Sequence[str | os.PathLike], output: str | os.PathLike) -> None:
    """Draw losses, weights, labels, speed and evaluation of training runs against the step.

    Args:
        folders: OUTPUT_DIRs of one or more runs; each has its own line style. Panels that no run has data for
            are left out.
        output: a PNG, SVG or PDF file.

    Raises:
        InputError: a folder has no metrics.json, or that is damaged; there is nothing to draw; the file cannot be
            written.
    """
    runs = [(Path(folder), read_metrics(folder)) for folder in folders]
    names = sorted({name for _, scalars in runs for name in scalars})
    panels = [(*p[:3], lines) for p in PANELS if (lines := _lines(p[3], names))]
    if not panels:
        raise InputError(f"{', '.join(map(str, folders))}: the {METRICS} have nothing that is drawn here.")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.4 * rows), squeeze=False)
    for axis, (title, unit, logarithmic, lines) in zip(axes.flat, panels):
        for (folder, scalars), style in zip(runs, _styles()):
            for name, (label, colour) in lines.items():
                if name in scalars:
                    steps, values = zip(*sorted(scalars[name].items()))
                    label = label if len(runs) == 1 else f"{label}, {folder.name}"
                    marker = "." if len(steps) < 30 else None
                    axis.plot(steps, values, style, color=colour, marker=marker, label=label)
        axis.set(title=title, xlabel="step", ylabel=unit)
        if logarithmic:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    try:
        with writing(output):
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(output, dpi=110)
    finally:
        plt.close(figure)


def _lines(wanted: Mapping[str, str], names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Label and colour by scalar. Of several datasets in DATASETS.TEST each has its own: "city/bbox/AP"."""
    found = {}
    for number, (ending, label) in enumerate(wanted.items()):
        of_sets = [name for name in names if name.endswith(f"/{ending}")]
        for position, name in enumerate([ending] * (ending in names) + of_sets):
            data = name[: -len(ending) - 1]
            found[name] = (f"{label}, {data}" if data else label, f"C{number + position * len(wanted)}")
    return found


def read_metrics(folder: str | os.PathLike) -> dict[str, dict[int, float]]:
    """Values by scalar and step of a run. Of a step that was trained twice (resumed) the later counts.

    Raises:
        InputError: no metrics.json is there, it holds nothing, or a line other than the last is damaged (the
            last may have been cut short when the run was killed).
    """
    file = Path(folder) / METRICS
    if not file.is_file():
        raise InputError(f"{folder} holds no training run: it has no {METRICS}.")
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    scalars: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry: dict[str, Any] = json.loads(line)
            step = int(entry.pop("iteration"))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(f"{file}, line {number} is not a line of metrics: {error}.") from error
        for name, value in entry.items():
            if isinstance(value, (int, float)):
                scalars.setdefault(name, {})[step] = value
    if not scalars:
        raise InputError(f"{file} holds no metrics yet: training writes them every 20 steps.")
    return scalars


def _styles() -> list[str]:
    return ["-", "--", ":", "-."] * 8
