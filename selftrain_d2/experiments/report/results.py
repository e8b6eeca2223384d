"""What became of the cells of a grid, from its folder or from a small file of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.cell_record import FAILED, read_record
from selftrain_d2.experiments.grid.definition import Grid, Scalar, cell_id, load_grid, parse_grid
from selftrain_d2.experiments.grid.runner import GRID
from selftrain_d2.experiments.grid.words import STEP
from selftrain_d2.files import read_json

#: Status of a cell that never began.
MISSING = "missing"


@dataclass(frozen=True)
class CellResult:
    """What the report keeps of a cell."""

    step: str
    axes: Mapping[str, Scalar]
    status: str
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    #: Seconds that its command ran; None if it never did.
    seconds: float | None = None
    git_revision: str | None = None
    git_dirty: bool | None = None
    #: Why it failed: the last line of its log.
    error: str | None = None

    @property
    def id(self) -> str:
        """As the grid's cells have it."""
        return cell_id(self.step, self.axes)

    @property
    def values(self) -> dict[str, Scalar]:
        """Its axes, "step" among them."""
        return {STEP: self.step, **self.axes}


@dataclass(frozen=True)
class Experiment:
    """A grid and what became of its cells."""

    grid: Grid
    #: One for each cell of the grid, in its order.
    cells: tuple[CellResult, ...]


def read_experiment(folder: Path) -> Experiment:
    """The grid that was run in a folder, finished or not.

    Raises:
        InputError: no grid was run there.
    """
    if not (folder / GRID).exists():
        raise InputError(f"{folder} holds no {GRID}: give the --output folder of a grid.")
    grid = load_grid(folder / GRID)
    cells = []
    for cell in grid.cells:
        record = read_record(folder / cell.id) or {}
        tail = record.get("log_tail") or [None]
        cells.append(
            CellResult(
                cell.step,
                cell.axes,
                record.get("status", MISSING),
                record.get("metrics", {}),
                record.get("seconds"),
                record.get("git_revision"),
                record.get("git_dirty"),
                tail[-1] if record.get("status") == FAILED else None,
            )
        )
    return Experiment(grid, tuple(cells))


def to_json(experiment: Experiment) -> dict[str, Any]:
    """An experiment for a metrics file; without what is None or empty, metrics to 4 decimals."""
    cells = []
    for cell in experiment.cells:
        content = {key: value for key, value in vars(cell).items() if value not in (None, {})}
        if "metrics" in content:
            rounded = {name: None if v is None else round(v, 4) for name, v in cell.metrics.items()}
            content["metrics"] = rounded
        cells.append({**content, "axes": dict(cell.axes)})
    return {"grid": dict(experiment.grid.source), "cells": cells}


def from_json(content: Any, where: str) -> Experiment:
    """An experiment of a metrics file.

    Raises:
        InputError: it is not what :func:`to_json` makes.
    """
    try:
        grid = parse_grid(content["grid"], where)
        found = {cell.id: cell for cell in (CellResult(**record) for record in content["cells"])}
    except (KeyError, TypeError) as error:
        raise InputError(f"{where} is not a metrics file of the report command ({error}).") from error
    cells = [found.get(cell.id, CellResult(cell.step, cell.axes, MISSING)) for cell in grid.cells]
    return Experiment(grid, tuple(cells))


def read_metrics(file: Path) -> list[Experiment]:
    """All experiments of a metrics file.

    Raises:
        InputError: it is missing, or no metrics file.
    """
    if not file.is_file():
        raise InputError(f"Metrics file {file} does not exist.")
    content = read_json(file)
    if not isinstance(content, list):
        raise InputError(f"{file} is not a metrics file of the report command: it must hold a list.")
    return [from_json(experiment, str(file)) for experiment in content]
