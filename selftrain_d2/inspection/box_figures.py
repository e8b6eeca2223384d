"""The diagrams of a report. Each is a function of numbers that draws into the theme in force (``style.THEMES``).

Letters in shapes: C classes, T thresholds (rising), S sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from selftrain_d2.inspection.box_quality import ReliabilityBin, expected_calibration_error
from selftrain_d2.inspection.box_reach import MOST_MISSED, BoxReach
from selftrain_d2.inspection.box_statistics import COCO_SIZES, SIZE_EDGES, LabelStatistics
from selftrain_d2.inspection.style import shortened
from selftrain_d2.inspection.thresholds import f1_scores

# Narrow, so that the words stay legible on a phone.
SIZE, DPI = (4.6, 3.1), 200
SCORE_BIN = 0.05
CLASSES_SHOWN = 20  # of those with the most boxes, where classes are drawn one by one
CURVES_SHOWN = 4  # of one picture, in the colours of a theme
FEW_BOXES = 20  # under this many, a share says little: drawn pale
_ROW_HEIGHT, _COLUMNS = 1.05, 3


def score_histogram(statistics: LabelStatistics) -> Figure:
    """Boxes by score, those that reach the threshold in colour; logarithmic."""
    figure, axes = _figure()
    _score_bars(axes, statistics, statistics.boxes_at.sum(0))
    axes.set(xlabel="Score", ylabel="Boxes")
    _mark(axes, statistics.score_thresh, "threshold {:g}")
    _legend(figure)
    return figure


def score_histograms_by_class(statistics: LabelStatistics, class_names: Sequence[str]) -> Figure:
    """As ``score_histogram``, for each class of the most frequent ones."""
    shown = np.argsort(-statistics.boxes_at[:, 0], kind="stable")[:CLASSES_SHOWN]
    figure, grid = _grid(len(shown))
    for axes, i in zip(grid, shown):
        _score_bars(axes, statistics, statistics.boxes_at[i])
        _name(axes, class_names[i], f"{statistics.boxes_by_class[i]:,}")
    figure.supxlabel("Score", size=8)
    figure.supylabel("Boxes", size=8)
    return figure


def _score_bars(axes: Axes, statistics: LabelStatistics, boxes_at: np.ndarray) -> None:
    """Bars of ``SCORE_BIN``, made of the finer counts; boxes_at: (T,)."""
    counts = boxes_at - np.append(boxes_at[1:], 0)  # between each threshold and the next
    edges = np.arange(round(1 / SCORE_BIN) + 1) * SCORE_BIN
    # A tiny shift keeps 0.15, as float32, in the bin that starts there.
    bins = np.clip(np.searchsorted(edges, statistics.thresholds + 1e-6, side="right") - 1, 0, len(edges) - 2)
    reach = statistics.thresholds >= np.float32(statistics.score_thresh)
    below = np.bincount(bins, counts * ~reach, len(edges) - 1)
    above = np.bincount(bins, counts * reach, len(edges) - 1)
    centers = edges[:-1] + SCORE_BIN / 2
    axes.set_yscale("symlog", linthresh=1)
    axes.bar(centers, below, 0.86 * SCORE_BIN, color="C3")
    axes.bar(centers, above, 0.86 * SCORE_BIN, bottom=below, color="C0")
    axes.set(xlim=(0, 1), ylim=(0, 3 * max(1, counts.max(), (below + above).max())))
    axes.yaxis.set_major_formatter(_thousands())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")


def boxes_against_threshold(
    statistics: LabelStatistics, human: LabelStatistics | None, recommended: float
) -> Figure:
    """Boxes per image that each threshold would leave, and how many the human labels have."""
    figure, axes = _figure()
    per_image = statistics.boxes_at.sum(0) / max(statistics.images, 1)
    shown = per_image > 0
    axes.plot(
        statistics.thresholds[shown], per_image[shown], color="C0", linewidth=1.6, label="pseudo labels"
    )
    if human is not None and human.boxes:
        level = human.per_image(human.boxes)
        label = f"human labels: {level:.2f}"
        axes.axhline(level, color="C1", linewidth=1.3, linestyle=(0, (4, 2)), label=label)
    axes.set(xlim=(0, 1), xlabel="Score threshold", ylabel="Boxes per image")
    if any(np.max(line.get_ydata(), initial=0) > 0 for line in axes.lines):  # else there is no logarithm
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_thousands())
    axes.yaxis.set_minor_formatter(NullFormatter())
    _mark(axes, statistics.score_thresh, "threshold {:g}")
    if recommended != statistics.score_thresh:
        _mark(axes, recommended, "recommended {:g}", line=(0, (5, 2)))
    axes.grid()
    _legend(figure)
    return figure


def box_sizes(statistics: LabelStatistics, human: LabelStatistics | None) -> Figure:
    """Share of boxes by sqrt(area), in pixels of the original images."""
    figure, axes = _figure()
    both = [statistics.sizes] if human is None else [statistics.sizes, human.sizes]
    filled = np.flatnonzero(sum(both))
    low, high = (max(filled[0] - 4, 0), filled[-1] + 5) if len(filled) else (16, 80)
    # Bins of half an octave where there are few boxes: finer ones would show noise.
    width = 4 if statistics.sizes.sum() < 2000 else 2
    low -= low % width
    axes.stairs(*_shares(statistics.sizes, width), fill=True, color="C0", alpha=0.8, label="pseudo labels")
    if human is not None:
        axes.stairs(*_shares(human.sizes, width), color="C1", linewidth=1.6, label="human labels")
    axes.set(xscale="log", xlim=(SIZE_EDGES[low], SIZE_EDGES[min(high, len(SIZE_EDGES) - 1)]))
    axes.set(xlabel="Box size: square root of the area, pixels", ylabel="Share of boxes")
    axes.set_ylim(0, 1.15 * max(axes.get_ylim()[1], 1e-3))
    axes.xaxis.set_major_locator(_PowersOfTwo())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")
    for limit in COCO_SIZES:
        axes.axvline(limit, color=_text_color(), linewidth=0.8, linestyle=(0, (1, 1.5)))
    limits = (SIZE_EDGES[low], *COCO_SIZES, SIZE_EDGES[min(high, len(SIZE_EDGES) - 1)])
    for name, left, right in zip(("small", "medium", "large"), limits, limits[1:]):
        if right > 1.3 * left and right > limits[0] and left < limits[-1]:
            center = np.sqrt(max(left, limits[0]) * min(right, limits[-1]))
            axes.text(
                *(center, 0.985, name),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=7,
            )
    _legend(figure)
    return figure


class _PowersOfTwo(MaxNLocator):
    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        return 2.0 ** np.arange(np.floor(np.log2(max(vmin, 1))), np.ceil(np.log2(max(vmax, 2))) + 1)


def _shares(sizes: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(S / width,) shares and their edges, in bins ``width`` times as wide."""
    merged = sizes.reshape(-1, width).sum(1)
    return merged / max(merged.sum(), 1), SIZE_EDGES[::width]


def boxes_per_image(statistics: LabelStatistics, human: LabelStatistics | None) -> Figure:
    """Share of images by their number of boxes."""
    figure, axes = _figure()
    sets = (
        {"pseudo labels": statistics}
        if human is None
        else {"pseudo labels": statistics, "human labels": human}
    )
    most = max((n for s in sets.values() for n in s.boxes_per_image), default=0)
    step = max(1, -(-(most + 1) // 30))
    edges = np.arange(0, most + step + 1, step) - 0.5
    for i, (label, one) in enumerate(sets.items()):
        numbers, images = list(one.boxes_per_image), list(one.boxes_per_image.values())
        shares = np.histogram(numbers, edges, weights=images)[0] / max(one.images, 1)
        style = {"fill": True, "alpha": 0.8} if i == 0 else {"linewidth": 1.6}
        axes.stairs(shares, edges, color=f"C{i}", label=label, **style)
    axes.set(xlabel="Boxes in an image", ylabel="Share of images", xlim=(edges[0], edges[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")
    _legend(figure)
    return figure


def reach_by_size(reach: BoxReach) -> Figure:
    """Share of the human boxes of the worst classes that the detector reaches, by image size."""
    figure, axes = _figure()
    for i in reach.worst[:CURVES_SHOWN]:
        label = shortened(reach.class_names[i])
        axes.plot(reach.image_sizes, 1 - reach.missed_by_size[:, i], linewidth=1.5, label=label)
    axes.axhline(1 - MOST_MISSED, color=_text_color(), linewidth=0.9, linestyle=(0, (5, 2)))
    _mark(axes, reach.image_size, "IMAGE_SIZE {:g}")
    axes.set(xscale="log", xlim=(reach.image_sizes[0], reach.image_sizes[-1]), ylim=(0, 1.02))
    axes.set(xlabel="Image size, pixels", ylabel="Human boxes within reach")
    axes.xaxis.set_major_locator(_PowersOfTwo())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid()
    _legend(figure)
    return figure


def precision_recall(
    thresholds: np.ndarray,
    boxes: np.ndarray,
    correct: np.ndarray,
    truth: int,
    score_thresh: float,
    best: float,
) -> Figure:
    """Precision, recall and F1 of all classes together, against the threshold; boxes, correct: (T,)."""
    figure, axes = _figure()
    _quality_curves(axes, thresholds, boxes, correct, truth)
    axes.set(xlabel="Score threshold", ylabel="Precision, recall, F1")
    _mark(axes, score_thresh, "threshold {:g}")
    if best != score_thresh:
        _mark(axes, best, "recommended {:g}", line=(0, (5, 2)))
    _legend(figure)
    return figure


def precision_recall_by_class(
    thresholds: np.ndarray,
    boxes: np.ndarray,
    correct: np.ndarray,
    truth: np.ndarray,
    recommended: Sequence[float],
    class_names: Sequence[str],
) -> Figure:
    """As ``precision_recall``, for each of the classes with the most true boxes; boxes, correct: (C, T)."""
    shown = np.argsort(-truth, kind="stable")[:CLASSES_SHOWN]
    figure, grid = _grid(len(shown))
    for axes, i in zip(grid, shown):
        _quality_curves(axes, thresholds, boxes[i], correct[i], int(truth[i]))
        _name(axes, class_names[i], f"{truth[i]:,} true")
        axes.axvline(recommended[i], color=_text_color(), linewidth=0.9, linestyle=(0, (5, 2)))
    figure.supxlabel("Score threshold (dashed: recommended)", size=8)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=7.5)
    return figure


def _quality_curves(
    axes: Axes, thresholds: np.ndarray, boxes: np.ndarray, correct: np.ndarray, truth: int
) -> None:
    some = np.where(boxes > 0, boxes, np.nan)
    axes.plot(thresholds, correct / some, color="C0", linewidth=1.3, label="precision")
    axes.plot(thresholds, correct / (truth or np.nan), color="C1", linewidth=1.3, label="recall")
    axes.plot(thresholds, f1_scores(boxes, correct, truth), color="C2", linewidth=1.6, label="F1")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.grid()


def reliability_diagram(rows: Sequence[ReliabilityBin]) -> Figure:
    """Share of correct boxes by score, beside what a calibrated score would have, and the boxes of each bin."""
    figure = Figure((SIZE[0], SIZE[1] * 1.15), dpi=DPI, layout="constrained")
    shares, counts = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    shares.plot([0, 1], [0, 1], color=_text_color(), linewidth=0.9, linestyle=(0, (4, 2)), label="calibrated")
    for row in rows:
        center, width = (row.low + row.high) / 2, 0.86 * (row.high - row.low)
        counts.bar(center, row.boxes, width, color="C3")
        if row.boxes:
            pale = 0.35 if row.boxes < FEW_BOXES else 1.0
            shares.bar(center, row.correct, width, color="C0", alpha=pale)
            shares.plot(row.mean_score, row.correct, ".", color="C1", markersize=5)
            counts.text(center, row.boxes, f"{row.boxes:,}", ha="center", va="bottom", fontsize=6)
    error = expected_calibration_error(rows)
    if error is not None:
        shares.plot([], [], ".", color="C1", markersize=5, label="mean score of the bin")
        shares.text(
            0.02, 0.96, f"calibration error {error:.3f}", transform=shares.transAxes, va="top", fontsize=8
        )
    shares.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="Share correct (IoU ≥ 0.5)")
    counts.set_yscale("symlog", linthresh=1)
    counts.set(ylim=(0, 12 * max(1, *(row.boxes for row in rows))), xlabel="Score", ylabel="Boxes")
    counts.yaxis.set_major_formatter(_thousands())
    counts.yaxis.set_major_locator(_EveryOther())
    counts.yaxis.set_minor_formatter(NullFormatter())
    shares.grid(axis="y")
    _legend(figure)
    figure.align_ylabels()
    return figure


class _EveryOther(MaxNLocator):
    """1, 100, 10000, ..."""

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        return 100.0 ** np.arange(0, max(np.ceil(np.log(max(vmax, 2)) / np.log(100)), 1) + 1)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(SIZE, dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def _grid(number: int) -> tuple[Figure, list[Axes]]:
    rows = max(1, -(-number // _COLUMNS))
    figure = Figure((SIZE[0], max(SIZE[1], _ROW_HEIGHT * rows + 0.5)), dpi=DPI, layout="constrained")
    grid = list(figure.subplots(rows, _COLUMNS, squeeze=False, sharex=True).flat)
    for axes in grid[number:]:
        axes.set_axis_off()
    for axes in grid:
        axes.tick_params(labelsize=6)
    return figure, grid[:number]


def _name(axes: Axes, name: str, number: str) -> None:
    axes.set_title(f"{shortened(name)}  {number}", size=6.5, loc="left", pad=2)


def _mark(axes: Axes, threshold: float, label: str, line: tuple = (0, (1, 1.5))) -> None:
    axes.axvline(threshold, color=_text_color(), linewidth=1.1, linestyle=line, label=label.format(threshold))


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=7.5, handlelength=2.2)


def _thousands() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def _text_color() -> str:
    return rcParams["text.color"]
