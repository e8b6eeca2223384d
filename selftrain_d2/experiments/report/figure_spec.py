"""What the cells of a grid say: lines of a figure, their points, and comparisons of lines.

The ``report`` section of a grid file is a list of figures, each a mapping:

    - name: loss_normalization        # of its files
      title: Normalized and plain loss
      steps: [teacher, student]       # whose cells it shows
      x: alpha                        # the axis along the figure; log: true for a logarithmic one
      lines: [step, loss]             # axes whose combinations are the lines ("step" is one)
      metric: bbox/AP                 # as cell.json names it; bbox/AP if left out
      repeats: [seed]                 # axes that only repeat a run; [seed] if left out
      where: {policy: [S1]}           # leave out cells with other values
      baseline: [{loss: plain}]       # compare each line with the one that has these values instead
      paper: [figure_2]               # tables of the paper to show beside
      labels: {alpha: "$\\alpha$", bbox/AP: AP, plain: plain sum}      # words in place of names

A step without the x axis is a line with one value everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.definition import Grid, as_list
from selftrain_d2.experiments.grid.words import STEP, check_keys, check_known, check_mapping
from selftrain_d2.experiments.report.paper_tables import PAPER_TABLES

_KEYS = (
    "name", "title", "steps", "x", "log", "lines", "metric", "repeats", "where", "baseline", "paper", "labels",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One entry of a grid's ``report`` section, checked."""

    name: str
    title: str
    steps: tuple[str, ...]
    x: str
    log: bool
    lines: tuple[str, ...]
    metric: str
    repeats: tuple[str, ...]
    where: Mapping[str, Any]
    baseline: tuple[Mapping[str, Any], ...]
    paper: tuple[str, ...]
    labels: Mapping[str, str]

    def label(self, value: Any) -> str:
        """How a name or a value is shown."""
        return self.labels.get(str(value), str(value))


def figures_of(grid: Grid) -> list[Figure]:
    """The figures that a grid's ``report`` section asks for.

    Raises:
        InputError: a key, step, axis, value or table is unknown, or a name is used twice.
    """
    entries = grid.report or []
    where = f"Grid {grid.title!r}: report"
    if not isinstance(entries, list):
        raise InputError(f"{where} must be a list of figures.")
    figures = [_figure(check_mapping(entry, f"{where}: each figure"), grid, where) for entry in entries]
    names = [figure.name for figure in figures]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{where}: two figures have the name {name!r}.")
    return figures


def _figure(entry: Mapping[str, Any], grid: Grid, where: str) -> Figure:
    name = str(entry.get("name", ""))
    where = f"{where}: figure {name!r}"
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"{where}: its name must consist of letters, digits, '_', '.' and '-'.")
    check_keys(entry, _KEYS, where)
    axes = {STEP: tuple(dict.fromkeys(cell.step for cell in grid.cells)), **grid.axes}

    def names(key: str, known: Iterable[str], default: Sequence[str] = ()) -> tuple[str, ...]:
        found = tuple(map(str, as_list(entry.get(key, default))))
        for item in found:
            check_known(item, known, "such name", f"{where}: {key}")
        return found

    def values(key: str, item: Any, known: Iterable[str]) -> Mapping[str, Any]:
        for axis, wanted in check_mapping(item, f"{where}: {key}").items():
            check_known(axis, known, "axis", f"{where}: {key}")
            for value in as_list(wanted):
                check_known(str(value), map(str, axes[axis]), f"value of {axis}", f"{where}: {key}")
        return item

    lines = names("lines", axes)
    figure = Figure(
        name=name,
        title=str(entry.get("title", name)),
        steps=names("steps", axes[STEP]),
        x=(names("x", axes) or ("",))[0],
        log=entry.get("log", False) is True,
        lines=lines,
        metric=str(entry.get("metric", "bbox/AP")),
        repeats=names("repeats", axes, ["seed"] if "seed" in axes else []),
        where=values("where", entry.get("where", {}), axes),
        baseline=tuple(values("baseline", item, lines) for item in as_list(entry.get("baseline", []))),
        paper=names("paper", PAPER_TABLES),
        labels={
            str(key): str(value)
            for key, value in check_mapping(entry.get("labels", {}), f"{where}: labels").items()
        },
    )
    if not figure.steps or not figure.x:
        raise InputError(f"{where} needs steps (whose cells it shows) and x (the axis along it).")
    if figure.log and not all(is_number(value) and value > 0 for value in axes[figure.x]):
        raise InputError(f"{where}: log needs an x axis of numbers above 0.")
    return figure


def is_number(value: Any) -> bool:
    """Whether a value is a number; True and False are names."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
