"""Questions that one difference answers: sums of cells, each with its sign, run by run.

The ``contrasts`` section of a grid file is a list of them::

    - name: F1
      title: Pre-training is worth less with stronger augmentation    # what a mean above 0 says
      metric: bbox/AP                                                 # bbox/AP if left out
      repeats: [seed]                                                 # [seed] if left out
      terms:                        # (S1 from ImageNet - S1 from random weights) - the same with S4
      - [1, {step: teacher, start: imagenet, policy: S1}]
      - [-1, {step: teacher, start: rand, policy: S1}]
      - [-1, {step: teacher, start: imagenet, policy: S4}]
      - [1, {step: teacher, start: rand, policy: S4}]

Each term names one cell of each run, that is, of each combination of values of ``repeats``, which its step must have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from selftrain_d2.engine.intervals import PairedTest, paired_test
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.cell_record import FINISHED
from selftrain_d2.experiments.grid.definition import Cell, Grid, Scalar, as_list, matches
from selftrain_d2.experiments.grid.words import STEP, check_keys, check_known, check_mapping
from selftrain_d2.experiments.report.figure_spec import is_number
from selftrain_d2.experiments.report.results import CellResult, Experiment

_KEYS = ("name", "title", "metric", "repeats", "terms")

#: Planned, or finished.
AnyCell = TypeVar("AnyCell", Cell, CellResult)


@dataclass(frozen=True)
class Contrast:
    """One entry of a grid's ``contrasts`` section, checked."""

    name: str
    title: str
    metric: str
    repeats: tuple[str, ...]
    #: Factors, and the step and axes of a cell.
    terms: tuple[tuple[float, Mapping[str, Any]], ...]


@dataclass(frozen=True)
class Answer:
    """What the runs say: the mean over runs, against 0."""

    contrast: Contrast
    #: None where no run has all its cells.
    test: PairedTest | None
    #: Runs that have all cells, and all runs.
    runs: int
    planned: int


def contrasts_of(grid: Grid) -> list[Contrast]:
    """The contrasts that a grid asks for.

    Raises:
        InputError: a key, step, axis or value is unknown, or a term is not a factor and a cell; a term names several
            cells of one run, or none.
    """
    where = f"Grid {grid.title!r}: contrasts"
    if not isinstance(grid.contrasts or [], list):
        raise InputError(f"{where} must be a list.")
    return [_contrast(check_mapping(entry, f"{where}: each"), grid, where) for entry in grid.contrasts or []]


def _contrast(entry: Mapping[str, Any], grid: Grid, where: str) -> Contrast:
    name = str(entry.get("name", ""))
    where = f"{where}: {name!r}"
    check_keys(entry, _KEYS, where)
    axes = {STEP: tuple(dict.fromkeys(cell.step for cell in grid.cells)), **grid.axes}
    repeats = tuple(map(str, as_list(entry.get("repeats", ["seed"] if "seed" in grid.axes else []))))
    for axis in repeats:
        check_known(axis, grid.axes, "axis", f"{where}: repeats")
    terms = []
    for term in as_list(entry.get("terms") or []):
        if not (isinstance(term, list) and len(term) == 2 and is_number(term[0])):
            raise InputError(
                f"{where}: a term must be a number and a cell, e.g. [-1, {{step: teacher}}], not {term!r}."
            )
        factor, cell = term
        for axis, value in check_mapping(cell, f"{where}: terms").items():
            check_known(axis, axes, "axis", f"{where}: terms")
            check_known(str(value), map(str, axes[axis]), f"value of {axis}", f"{where}: terms")
        if STEP not in cell:
            raise InputError(f"{where}: terms: {cell!r} names no step.")
        terms.append((float(factor), cell))
    if not name or not terms:
        raise InputError(f"{where} needs a name and terms.")
    title, metric = str(entry.get("title", name)), str(entry.get("metric", "bbox/AP"))
    contrast = Contrast(name, title, metric, repeats, tuple(terms))
    if not _runs([_cells_of_runs(contrast, cell, grid.cells) for _, cell in terms]):
        raise InputError(f"{where}: its terms share no run of {', '.join(repeats)}.")
    return contrast


def answer(contrast: Contrast, experiment: Experiment) -> Answer:
    """Sum the terms of each run, and test the sums against 0."""
    terms = [_cells_of_runs(contrast, cell, experiment.cells) for _, cell in contrast.terms]
    runs = _runs(terms)
    sums = []
    for run in runs:
        cells = [cells[run] for cells in terms]
        values = [c.metrics.get(contrast.metric) if c.status == FINISHED else None for c in cells]
        if None not in values:
            sums.append(sum(factor * value for (factor, _), value in zip(contrast.terms, values)))
    test = paired_test(sums, [0.0] * len(sums)) if sums else None
    return Answer(contrast, test, len(sums), len(runs))


def _runs(terms: Sequence[Mapping[tuple[Scalar, ...], Any]]) -> list[tuple[Scalar, ...]]:
    """Runs of which every term has a cell."""
    return [run for run in terms[0] if all(run in cells for cells in terms)]


def _cells_of_runs(
    contrast: Contrast, wanted: Mapping[str, Any], cells: Sequence[AnyCell]
) -> dict[tuple[Scalar, ...], AnyCell]:
    """The cell that a term names, by values of the axes that repeat runs."""
    found: dict[tuple[Scalar, ...], AnyCell] = {}
    for cell in cells:
        values = {STEP: cell.step, **cell.axes}
        if set(wanted) <= set(values) and matches(values, wanted):
            absent = [axis for axis in contrast.repeats if axis not in cell.axes]
            if absent:
                raise InputError(
                    f"Contrast {contrast.name!r}: the step {cell.step} has no axis {absent[0]!r}, by which runs "
                    "repeat: leave it out of repeats."
                )
            run = tuple(cell.axes[axis] for axis in contrast.repeats)
            if run in found:
                raise InputError(
                    f"Contrast {contrast.name!r}: {dict(wanted)} are both {found[run].id} and {cell.id}: "
                    "name more axes."
                )
            found[run] = cell
    if not found:
        raise InputError(f"Contrast {contrast.name!r}: there is no cell {dict(wanted)}.")
    return found
