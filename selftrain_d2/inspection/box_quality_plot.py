"""Quality of pseudo boxes against the score threshold, as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from selftrain_d2.errors import InputError
from selftrain_d2.inspection.box_quality import QualityRow
from selftrain_d2.inspection.style import GREY, THEMES, save_figure


def precision_recall_plot(
    rows: Sequence[QualityRow], path: str | os.PathLike, *, score_thresh: float = 0.5
) -> None:
    """Draw precision, recall and F1 of all classes together, and the number of boxes, against the threshold.

    Args:
        rows: from ``box_quality.precision_recall_by_threshold``; rows of single classes are left out.
        path: picture to write; its suffix gives the format.
        score_thresh: the threshold that training uses, drawn as a vertical line.

    Raises:
        InputError: no row is of all classes together.
    """
    rows = sorted((row for row in rows if row.category is None), key=lambda row: row.threshold)
    if not rows:
        raise InputError("There is nothing to plot: no row counts all classes together.")
    thresholds = [row.threshold for row in rows]
    with rc_context(THEMES["light"]):
        figure = Figure((6, 4), dpi=200, layout="constrained")
        ratios, counts = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))

        curves = {
            "Precision": ("o", [row.precision for row in rows]),
            "Recall": ("s", [row.recall for row in rows]),
            "F1": ("^", [row.f1 for row in rows]),
        }
        for name, (marker, values) in curves.items():
            known = [np.nan if value is None else value for value in values]
            ratios.plot(thresholds, known, marker=marker, markersize=3, linewidth=1.3, label=name)
        ratios.set(ylim=(-0.02, 1.02), ylabel="Precision, recall, F1")

        counts.plot(
            thresholds,
            [row.boxes for row in rows],
            color="#333333",
            marker="D",
            markersize=2.6,
            linewidth=1.3,
        )
        counts.axhline(rows[0].truth, color=GREY, linewidth=0.9, linestyle=(0, (4, 2)))
        counts.annotate(
            f"{rows[0].truth} human boxes",
            (1, rows[0].truth),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 2.5),
            textcoords="offset points",
            fontsize=6.5,
            color=GREY,
            ha="right",
            va="bottom",
        )
        highest = max(rows[0].truth, *(row.boxes for row in rows), 1)
        counts.set(ylim=(0, 1.18 * highest), ylabel="Boxes", xlabel="Score threshold")

        for axes in (ratios, counts):
            training = f"used for training: {score_thresh:g}"
            axes.axvline(
                score_thresh, color="black", linewidth=0.9, linestyle=(0, (1, 1.5)), label=training, zorder=0
            )
            axes.grid()
            axes.tick_params(labelsize=7)
        ratios.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=7.5, handlelength=2.5)
        figure.align_ylabels()
        save_figure(figure, path)
