"""Lines of a figure, their points, and comparisons of lines, from the cells of a grid."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from selftrain_d2.engine.intervals import Interval, PairedTest, mean_interval, paired_test
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.cell_record import FAILED, FINISHED
from selftrain_d2.experiments.grid.definition import Scalar, matches
from selftrain_d2.experiments.grid.words import STEP
from selftrain_d2.experiments.report.figure_spec import Figure
from selftrain_d2.experiments.report.results import CellResult, Experiment


@dataclass
class Point:
    """The runs of one place of a line."""

    #: The metric, by the values of the axes that repeat runs.
    values: dict[tuple[Scalar, ...], float] = field(default_factory=dict)
    #: Cells that failed, or finished without a finite metric.
    failed: int = 0
    #: Cells that did not finish yet.
    missing: int = 0

    @property
    def interval(self) -> Interval | None:
        """Mean and interval of the runs that have a value; None if none has."""
        return mean_interval(list(self.values.values())) if self.values else None


@dataclass
class Line:
    """One line of a figure."""

    #: Values of the figure's line axes that its cells have.
    key: Mapping[str, Scalar]
    label: str
    #: By value of the x axis.
    points: dict[Scalar, Point] = field(default_factory=dict)
    #: Its cells do not have the x axis: the same point everywhere.
    constant: bool = False


@dataclass(frozen=True)
class Comparison:
    """A line against its baseline, run by run."""

    line: Line
    baseline: Line
    #: By value of the x axis; None where no runs can be paired.
    tests: Mapping[Scalar, PairedTest | None]
    #: Of each run's mean over ``together``, the x values that every run of both lines has; None if under two.
    overall: PairedTest | None
    together: tuple[Scalar, ...]


def lines_of(figure: Figure, experiment: Experiment) -> list[Line]:
    """The lines of a figure, with every cell of the grid at its place, whatever became of it.

    Raises:
        InputError: cells of one place differ in an axis that the figure does not name.
    """
    shown = [
        cell for cell in experiment.cells if cell.step in figure.steps and matches(cell.values, figure.where)
    ]
    if not shown:
        raise InputError(f"Figure {figure.name!r} shows no cell: its steps and where leave none.")
    named = {figure.x, *figure.lines, *figure.repeats}
    for axis in (STEP, *experiment.grid.axes):
        values = {cell.values[axis] for cell in shown if axis in cell.values}
        if axis not in named and len(values) > 1:
            raise InputError(
                f"Figure {figure.name!r}: its cells differ in {axis!r} too ({', '.join(sorted(map(str, values)))}): "
                "name that axis in lines, in repeats, or choose by where."
            )
    xs = [
        x for x in _axis_values(figure.x, experiment) if any(cell.values.get(figure.x) == x for cell in shown)
    ]
    lines: dict[Hashable, Line] = {}
    for cell in shown:
        key = {axis: cell.values[axis] for axis in figure.lines if axis in cell.values}
        label = ", ".join(figure.label(value) for value in key.values()) or figure.label(figure.metric)
        constant = figure.x not in cell.values
        line = lines.setdefault(tuple(key.items()), Line(key, label, constant=constant))
        point = Point()
        for x in xs if constant else [cell.values[figure.x]]:
            point = line.points.setdefault(x, point)
        _add(point, cell, figure)
    for line in lines.values():
        line.points = {x: line.points[x] for x in xs if x in line.points}
    return list(lines.values())


def _add(point: Point, cell: CellResult, figure: Figure) -> None:
    value = cell.metrics.get(figure.metric)
    if cell.status == FINISHED and value is not None:
        point.values[tuple(cell.values[axis] for axis in figure.repeats if axis in cell.values)] = value
    elif cell.status in (FAILED, FINISHED):
        point.failed += 1
    else:
        point.missing += 1


def _axis_values(axis: str, experiment: Experiment) -> Sequence[Scalar]:
    if axis == STEP:
        return tuple(dict.fromkeys(cell.step for cell in experiment.cells))
    return experiment.grid.axes[axis]


def comparisons_of(figure: Figure, lines: Sequence[Line]) -> list[Comparison]:
    """Each line against those that the figure's ``baseline`` names for it; of two lines only one against the other.

    Raises:
        InputError: there are several such lines.
    """
    comparisons = []
    for wanted in figure.baseline:
        for line in lines:
            if not set(wanted) <= set(line.key) or matches(line.key, wanted):
                continue
            others = {axis: value for axis, value in line.key.items() if axis not in wanted}
            found = [
                other
                for other in lines
                if set(wanted) <= set(other.key) and matches(other.key, wanted) and matches(other.key, others)
            ]
            if len(found) > 1:
                raise InputError(
                    f"Figure {figure.name!r}: {line.label!r} has {len(found)} baselines of {wanted}: "
                    f"{', '.join(other.label for other in found)}; name more axes in baseline."
                )
            known = [(comparison.baseline, comparison.line) for comparison in comparisons]
            comparisons += [compare(line, other) for other in found if (line, other) not in known]
    return comparisons


def compare(line: Line, baseline: Line) -> Comparison:
    """Paired tests of the runs that two lines share."""
    pairs = {x: _pairs(line.points[x], baseline.points[x]) for x in line.points if x in baseline.points}
    tests = {x: paired_test(*zip(*both.values())) if both else None for x, both in pairs.items()}
    runs = sorted({run for both in pairs.values() for run in both}, key=str)
    together = tuple(x for x, both in pairs.items() if len(both) == len(runs))
    overall = None
    if len(together) > 1 and runs:
        means = [
            [sum(pairs[x][run][side] for x in together) / len(together) for run in runs] for side in (0, 1)
        ]
        overall = paired_test(*means)
    return Comparison(line, baseline, tests, overall, together)


def _pairs(point: Point, baseline: Point) -> dict[tuple[Scalar, ...], tuple[float, float]]:
    return {
        run: (value, baseline.values[run]) for run, value in point.values.items() if run in baseline.values
    }
