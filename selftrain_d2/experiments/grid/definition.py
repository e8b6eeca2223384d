"""What a grid of experiments consists of: a YAML file of axes and steps, read into cells.

The grid is the product of all axes, less what ``include`` and ``exclude`` leave out; an ``exclude`` with a ``step``
leaves out cells of that step alone. A *step* is one command
with the axes that matter to it, and has a *cell* for each combination of their values in the grid. A step that
names an earlier one in braces gets the output folder of that step's cell, and runs after it: so students of many
alphas share one teacher. See ``configs/grids`` for grids in use.

    title: Does the teacher's length matter?
    values: {data: data/trees}                       # constants; --set NAME=VALUE changes them (a list: by a line)
    axes:
      seed: [0, 1, 2]
      loss:                                          # a name, and the words it stands for
        normalized: [SELFTRAIN.NORMALIZE_LOSS, "True"]
        plain: [SELFTRAIN.NORMALIZE_LOSS, "False"]
    steps:
      teacher:
        axes: [seed]
        command: train --resume ... OUTPUT_DIR {output} SEED {seed}
        seconds: 600                                 # a guess, until a cell has finished
      student:
        axes: [loss, seed]
        command: train --resume ... MODEL.WEIGHTS {teacher}/model_final.pth {loss} OUTPUT_DIR {output} SEED {seed}
    exclude: [{loss: plain, seed: 2}, {step: student, seed: 1}]
    report: [...]                                    # see selftrain_d2.experiments.report.figure_spec
    contrasts: [...]                                 # see selftrain_d2.experiments.report.contrasts

A word that is nothing but ``{name}`` becomes all the words it stands for; inside a longer word it becomes the
text of the value, which for an axis with words is the value's name. Other braces stay as they are.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import yaml

from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.words import (
    DIR,
    OUTPUT,
    STEP,
    Names,
    check_keys,
    check_known,
    check_mapping,
    scalar_text,
    words_of,
)

Scalar = Union[str, int, float, bool]

_ROOT = f"{{{DIR}}}"
_VALUE = re.compile(r"[\w.+-]+")  # becomes part of a folder's name
_GRID_KEYS = ("title", "program", "values", "axes", "include", "exclude", "steps", "report", "contrasts")
_STEP_KEYS = ("axes", "command", "seconds")


@dataclass(frozen=True)
class Cell:
    """One run of one command."""

    step: str
    #: Values of the step's axes, in its order. For an axis with words, the value's name.
    axes: Mapping[str, Scalar]
    #: The words of the command without the program; ``{DIR}`` is the grid's folder.
    command: tuple[str, ...]
    #: ids of the cells whose output this one reads.
    needs: tuple[str, ...] = ()
    #: How long it may take, if the file says so.
    seconds: float | None = None

    @property
    def id(self) -> str:
        """``step/axis=value,axis=value``: also its folder below the grid's."""
        return cell_id(self.step, self.axes)

    def words(self, root: str | os.PathLike) -> list[str]:
        """The command for a grid in the folder ``root``."""
        return [word.replace(_ROOT, str(root)) for word in self.command]


@dataclass(frozen=True)
class Grid:
    """A grid file, read and checked."""

    title: str
    #: Words of the program that commands are given to; None: ``selftrain-d2``.
    program: tuple[str, ...] | None
    #: All values of each axis, in the file's order.
    axes: Mapping[str, tuple[Scalar, ...]]
    #: In an order in which each comes after those that it needs.
    cells: tuple[Cell, ...]
    #: The file's ``report`` section, unchecked.
    report: Any
    #: The file's ``contrasts`` section, unchecked.
    contrasts: Any
    #: The file's content, with changed values in place.
    source: Mapping[str, Any]

    def select(self, only: Mapping[str, Iterable[str]]) -> tuple[Cell, ...]:
        """The cells that have one of the given values on each given axis, and all cells they need.

        Args:
            only: texts of values by axis; the axis "step" is the step. Cells without an axis match it.

        Raises:
            InputError: an axis or a value does not exist.
        """
        known = {**self.axes, STEP: tuple(dict.fromkeys(cell.step for cell in self.cells))}
        for axis, values in only.items():
            check_known(axis, known, "axis", "--only")
            for value in values:
                check_known(str(value), [str(v) for v in known[axis]], f"value of {axis}", "--only")
        wanted = {cell.id for cell in self.cells if matches({STEP: cell.step, **cell.axes}, only)}
        for cell in reversed(self.cells):  # a cell comes after those that it needs
            if cell.id in wanted:
                wanted.update(cell.needs)
        return tuple(cell for cell in self.cells if cell.id in wanted)


def cell_id(step: str, axes: Mapping[str, Scalar]) -> str:
    """Name of a cell, the same in every grid."""
    return f"{step}/{','.join(f'{axis}={value}' for axis, value in axes.items()) or 'all'}"


def matches(values: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether ``values`` has one of the wanted values (one, or a list) on each wanted axis that it has."""
    return all(
        str(values[axis]) in {str(option) for option in as_list(options)}
        for axis, options in wanted.items()
        if axis in values
    )


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as the only item of one."""
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]


def load_grid(file: str | os.PathLike, changed: Mapping[str, str] | None = None) -> Grid:
    """Read a grid from a YAML file.

    Args:
        changed: other constants than those of the file's ``values``, by name.

    Raises:
        InputError: the file is missing, or has a fault; the message says where.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"Grid file {file} does not exist.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"Grid {file} is not valid YAML: {' '.join(str(error).split())}.") from error
    return parse_grid(content, str(file), changed)


def parse_grid(content: Any, where: str, changed: Mapping[str, str] | None = None) -> Grid:
    """Check what a grid file holds, and lay out its cells.

    Args:
        content: the file's content, as YAML or JSON gives it.
        where: the file's name, for messages.
        changed: as in :func:`load_grid`.

    Raises:
        InputError: an unknown key, axis, value or name in braces; a name used twice; a step without command.
    """
    content = dict(check_mapping(content, where))
    check_keys(content, _GRID_KEYS, where)
    content["values"] = _change(
        check_mapping(content.get("values") or {}, f"{where}: values"), changed or {}, where
    )
    steps = check_mapping(content.get("steps"), f"{where}: steps")
    names = Names(where)
    for name, value in content["values"].items():
        names.add(name, *_constant(value, names, f"{where}: values: {name}"))
    axes = {
        str(axis): _axis(axis, values, names, where)
        for axis, values in check_mapping(content.get("axes") or {}, f"{where}: axes").items()
    }
    program = content.get("program")
    if not steps:
        raise InputError(f"{where}: steps is empty: a grid has at least one.")
    for name in [*axes, *steps]:
        names.reserve(name)
    rules = {key: _rules(content, key, axes, tuple(map(str, steps)), where) for key in ("include", "exclude")}
    combinations = _combinations(axes, rules, where)
    cells: list[Cell] = []
    _check_rules_of_steps(rules["exclude"], steps, where)
    done: dict[str, list[str]] = {}
    for name, step in steps.items():
        of_step = [
            values
            for values in combinations
            if not any(matches({STEP: name, **values}, rule) for rule in rules["exclude"])
        ]
        cells += _cells_of_step(str(name), step, axes, of_step, names, done, f"{where}: steps: {name}")
    known = {cell.id for cell in cells}
    for cell in cells:
        for need in set(cell.needs) - known:
            raise InputError(f"{where}: exclude leaves out {need}, which {cell.id} needs.")
    return Grid(
        title=str(content.get("title") or Path(where).stem),
        program=None if program is None else tuple(words_of(program, f"{where}: program")),
        axes={axis: tuple(values) for axis, values in axes.items()},
        cells=tuple(cells),
        report=content.get("report"),
        contrasts=content.get("contrasts"),
        source=content,
    )


def _constant(value: Any, names: Names, where: str) -> tuple[list[str], str | None]:
    words = names.fill(
        words_of(value, where) if isinstance(value, list) else [scalar_text(value, where)], where
    )
    return words, None if isinstance(value, list) else words[0]


def _axis(axis: Any, values: Any, names: Names, where: str) -> dict[Scalar, list[str]]:
    """The words of each value of an axis, by its name."""
    where = f"{where}: axes: {axis}"
    if not isinstance(values, (list, Mapping)) or not values:
        raise InputError(f"{where} must be a list of values, or a mapping of names to words.")
    words = {}
    for value in values:
        text = scalar_text(value, where)
        if not _VALUE.fullmatch(text):
            raise InputError(
                f"{where}: {text!r} cannot be part of a folder's name; give it a name: 'name: [{text}]'."
            )
        if text in {str(v) for v in words}:
            raise InputError(f"{where} has the value {text} twice.")
        is_named = isinstance(values, Mapping)
        words[value] = names.fill(words_of(values[value], where), where) if is_named else [text]
    return words


def _rules(
    content: Mapping[str, Any],
    key: str,
    axes: Mapping[str, Mapping[Scalar, Any]],
    steps: Sequence[str],
    where: str,
) -> list[Mapping[str, Any]]:
    """The rules of ``include`` or ``exclude``, checked."""
    rules = content.get(key) or []
    if not isinstance(rules, list):
        raise InputError(f"{where}: {key} must be a list of mappings, e.g. [{{policy: S1, alpha: [2, 4]}}].")
    known = {**axes, **({STEP: steps} if key == "exclude" else {})}
    for rule in rules:
        for axis, values in check_mapping(rule, f"{where}: {key}").items():
            check_known(axis, known, "axis", f"{where}: {key}")
            for value in as_list(values):
                check_known(str(value), [str(v) for v in known[axis]], f"value of {axis}", f"{where}: {key}")
    return rules


def _check_rules_of_steps(rules: Sequence[Mapping[str, Any]], steps: Mapping[str, Any], where: str) -> None:
    """A rule about an axis that its step does not have would leave out nothing."""
    for rule in rules:
        for name in as_list(rule.get(STEP, [])):
            own = as_list(check_mapping(steps[name], f"{where}: steps: {name}").get("axes") or [])
            for axis in set(rule) - {STEP}:
                check_known(axis, own, f"axis of the step {name}", f"{where}: exclude")


def _combinations(
    axes: Mapping[str, Mapping[Scalar, Any]], rules: Mapping[str, Sequence[Mapping[str, Any]]], where: str
) -> list[dict[str, Scalar]]:
    """All combinations of values of all axes that include and exclude leave."""
    combinations = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    kept = [
        values
        for values in combinations
        if (not rules["include"] or any(matches(values, rule) for rule in rules["include"]))
        and not any(matches(values, rule) for rule in rules["exclude"] if STEP not in rule)
    ]
    if not kept:
        raise InputError(f"{where}: include and exclude leave no cell.")
    return kept


def _cells_of_step(
    name: str,
    step: Any,
    axes: Mapping[str, Mapping[Scalar, list[str]]],
    combinations: Sequence[Mapping[str, Scalar]],
    names: Names,
    done: dict[str, list[str]],
    where: str,
) -> list[Cell]:
    """Lay out one step, and enter its axes into ``done``, the steps before it."""
    step = check_mapping(step, where)
    check_keys(step, _STEP_KEYS, where)
    own = [str(axis) for axis in as_list(step.get("axes") or [])]
    for axis in own:
        check_known(axis, axes, "axis", where)
    if len(set(own)) < len(own):
        raise InputError(f"{where}: axes has the same axis twice.")
    command = words_of(step.get("command"), f"{where}: command")
    seconds = step.get("seconds")
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
        raise InputError(f"{where}: seconds must be a number above 0, not {seconds!r}.")
    needed = [other for other in done if any(f"{{{other}}}" in word for word in command)]
    for other in needed:
        missing = set(done[other]) - set(own)
        if missing:
            raise InputError(
                f"{where} uses {{{other}}}, which has the axis {sorted(missing)[0]} too: add it to the step's axes."
            )
    done[name] = own
    cells = {}
    for values in combinations:
        values = {axis: values[axis] for axis in own}
        needs = [cell_id(other, {axis: values[axis] for axis in done[other]}) for other in needed]
        folders = {other: f"{_ROOT}/{need}/{OUTPUT}" for other, need in zip(needed, needs)}
        folders[OUTPUT] = f"{_ROOT}/{cell_id(name, values)}/{OUTPUT}"
        scope = {axis: (axes[axis][value], str(value)) for axis, value in values.items()}
        scope.update({folder: ([path], path) for folder, path in folders.items()})
        words = names.with_values(scope).fill(command, f"{where}: command")
        cell = Cell(name, values, tuple(words), tuple(needs), seconds)
        cells[cell.id] = cell
    return list(cells.values())


def _change(values: Mapping[str, Any], changed: Mapping[str, str], where: str) -> dict[str, Any]:
    for name in changed:
        check_known(name, values, "constant", f"{where}: values")
    # In place of a list comes a list, of a line as a shell reads it.
    words = {
        name: words_of(text, f"--set {name}")
        for name, text in changed.items()
        if isinstance(values[name], list)
    }
    return {**values, **changed, **words}
