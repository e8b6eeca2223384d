"""Figures of a report: a metric against an axis, with intervals, single runs, and failed cells."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from selftrain_d2.experiments.grid.definition import Scalar
from selftrain_d2.experiments.report.figure_spec import Figure, is_number
from selftrain_d2.experiments.report.series import Line
from selftrain_d2.inspection.style import BLUE, GREEN, GREY, ORANGE, SKY_BLUE, THEMES

_COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", SKY_BLUE, "#000000")
_SHAPES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # line and marker
_LEVEL_STYLES = ("--", ":", "-.")
#: Entries of a legend inside the axes.
_MOST_INSIDE = 6
_INCHES = (6.0, 3.8)
_INCHES_OF_ENTRY = 0.18  # of a legend below the axes
# As shares of the distance of two x values: between lines, so that their intervals do not cover each other, and
# between a mean and its single runs.
_DODGE, _ASIDE = 0.05, 0.018


@dataclass(frozen=True)
class Style:
    """How a line is drawn."""

    color: str
    dashes: str
    marker: str


def draw_figure(figure: Figure, lines: Sequence[Line], folder: Path) -> dict[str, Path]:
    """Draw means with 95 % intervals beside small dots for single runs; crosses below stand for failed ones.

    Returns:
        The files by format ("png", "svg"). The same lines give the same bytes.
    """
    with matplotlib.rc_context(
        {**THEMES["light"], "svg.hashsalt": figure.name}
    ):  # else ids in SVG are random
        canvas = Canvas(figsize=_INCHES, layout="constrained")
        axes = canvas.add_subplot()
        xs = list(dict.fromkeys(x for line in lines for x in line.points))
        places = _places(xs, figure.log)
        _set_up_axes(axes, figure, places)
        space = _space(places)
        # A line none of whose cells has run yet is in the table alone.
        moving = [
            line
            for line in lines
            if not line.constant and any(point.values or point.failed for point in line.points.values())
        ]
        for number, (line, style) in enumerate(zip(moving, line_styles(moving))):
            shift = (number - (len(moving) - 1) / 2) * _DODGE * space
            _draw_line(axes, line, {x: place + shift for x, place in places.items()}, style, _ASIDE * space)
        for line, dashes in zip((line for line in lines if line.constant), itertools.cycle(_LEVEL_STYLES)):
            _draw_level(axes, line, dashes)
        _draw_legend(axes, any(point.failed for line in moving for point in line.points.values()))
        folder.mkdir(parents=True, exist_ok=True)
        files = {suffix: folder / f"{figure.name}.{suffix}" for suffix in ("png", "svg")}
        canvas.savefig(files["svg"], metadata={"Date": None})
        canvas.savefig(files["png"], dpi=160)
    return files


def line_styles(lines: Sequence[Line]) -> list[Style]:
    """Colours for the values of the first axis in which lines differ, dashes and markers for the others'."""
    names = list(dict.fromkeys(axis for line in lines for axis in line.key))
    varying = [axis for axis in names if len({line.key.get(axis) for line in lines}) > 1]
    colors = [tuple(line.key.get(axis) for axis in varying[:1]) for line in lines]
    shapes = [tuple(line.key.get(axis) for axis in varying[1:]) for line in lines]
    styles = []
    for color, shape in zip(_numbered(colors), _numbered(shapes)):
        dashes, marker = _SHAPES[shape % len(_SHAPES)]
        styles.append(Style(_COLORS[color % len(_COLORS)], dashes, marker))
    return styles


def _numbered(keys: Sequence[tuple]) -> list[int]:
    """0 for the first key and all its like, 1 for the next, ..."""
    order = list(dict.fromkeys(keys))
    return [order.index(key) for key in keys]


def _places(xs: Sequence[Scalar], log: bool) -> dict[Scalar, float]:
    """Where each value stands along the axis: numbers by size, or by logarithm; names one after another."""
    if log:
        return {x: math.log2(x) for x in xs}
    if all(is_number(x) for x in xs):
        return {x: float(x) for x in xs}
    return {x: float(number) for number, x in enumerate(xs)}


def _space(places: Mapping[Scalar, float]) -> float:
    """The smallest distance of two places."""
    order = sorted(places.values())
    return min((after - before for before, after in zip(order, order[1:])), default=1.0)


def _set_up_axes(axes: Axes, figure: Figure, places: Mapping[Scalar, float]) -> None:
    axes.set(xlabel=figure.label(figure.x), ylabel=figure.label(figure.metric), title=figure.title)
    axes.set_xticks(list(places.values()), [figure.label(x) for x in places])
    axes.xaxis.set_major_locator(FixedLocator(list(places.values())))
    axes.xaxis.set_minor_locator(NullLocator())
    margin = _space(places) / 2
    axes.set_xlim(min(places.values()) - margin, max(places.values()) + margin)
    axes.set_ymargin(0.12)  # room for crosses
    axes.grid(axis="y")


def _draw_line(axes: Axes, line: Line, places: Mapping[Scalar, float], style: Style, aside: float) -> None:
    shown = {x: point.interval for x, point in line.points.items() if point.values}
    order = sorted(shown, key=places.__getitem__)
    axes.errorbar(
        [places[x] for x in order],
        [shown[x].mean for x in order],
        yerr=[shown[x].half_width or 0.0 for x in order],
        color=style.color,
        linestyle=style.dashes,
        marker=style.marker,
        markersize=4.5,
        capsize=2.5,
        elinewidth=1,
        linewidth=1.4,
        label=line.label,
    )
    for x, point in line.points.items():
        runs = list(point.values.values())
        dots = {"color": style.color, "markersize": 2.5, "alpha": 0.7}
        axes.plot([places[x] + aside] * len(runs), runs, "o", markeredgewidth=0, **dots)
        if point.failed:  # near the lower edge, whatever the values
            at = {
                "xycoords": axes.get_xaxis_transform(),
                "color": style.color,
                "ha": "center",
                "va": "center",
            }
            axes.annotate("\u00d7" * point.failed, (places[x], 0.03), fontsize=12, fontweight="bold", **at)


def _draw_level(axes: Axes, line: Line, dashes: str) -> None:
    """A line without the x axis: its mean across the figure, its interval as a band."""
    interval = next(iter(line.points.values())).interval
    if interval is not None:
        axes.axhline(interval.mean, color=GREY, linestyle=dashes, linewidth=1.2, label=line.label)
        half = interval.half_width or 0.0
        axes.axhspan(interval.mean - half, interval.mean + half, color=GREY, alpha=0.1, linewidth=0)


def _draw_legend(axes: Axes, has_failed: bool) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if has_failed:
        handles.append(
            Line2D([], [], color=GREY, marker="x", markeredgewidth=2, linestyle="", label="a failed run")
        )
    if handles:
        if len(handles) > _MOST_INSIDE:  # too many to leave room for what they explain
            width, height = _INCHES
            axes.figure.set_size_inches(width, height + _INCHES_OF_ENTRY * len(handles))
            axes.figure.legend(handles=handles, loc="outside lower left")
        else:
            axes.legend(handles=handles)
