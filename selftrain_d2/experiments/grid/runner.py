"""Runs the cells of a grid in their order, some at a time, and goes on where it was stopped.

Where they run is a :class:`Runner`'s business: processes of this machine, or SLURM jobs.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shlex
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from selftrain_d2.engine.logs import duration
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.cell_record import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    check_record,
    program_words,
    read_record,
    shell_status,
)
from selftrain_d2.experiments.grid.definition import Cell, Grid
from selftrain_d2.experiments.grid.local_runner import Devices
from selftrain_d2.files import write_text

logger = logging.getLogger(__name__)

#: Copy of the grid in its folder; what the report reads.
GRID = "grid.yaml"
_LOCK = ".lock"
_POLL_SECONDS = 0.2


class Runner(Protocol):
    """Where cells run."""

    #: Cells that run at the same time, at most.
    jobs: int

    def free(self) -> int:
        """How many cells can start now."""

    def start(self, cells: Sequence[Cell]) -> None:
        """Start cells; at most as many as are free."""

    def ended(self) -> dict[str, dict[str, Any]]:
        """Records of the cells that ended since the last call, by id."""

    def stop(self) -> None:
        """End everything that runs, and write it down as interrupted."""


@contextlib.contextmanager
def locked(root: Path) -> Iterator[int]:
    """Keep a grid's folder to one runner; yields the descriptor that its processes inherit.

    Raises:
        InputError: another runner is at work there, or a cell that outlived its runner.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / _LOCK, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{root} is in use: another grid runner is at work there, or cells that outlived theirs; wait "
                "until they end, or end them."
            ) from None
        yield file.fileno()


@dataclass
class State:
    """What is done in a grid's folder, and what is to do."""

    #: Records by cell id; of cells that began.
    records: dict[str, dict[str, Any]]
    #: Cells to run, in order. Not: finished ones, failed ones, and those that need one of these.
    waiting: list[Cell]
    #: Cells that cannot run, and what they lack.
    blocked: dict[str, str]


def read_state(grid: Grid, root: Path, cells: Sequence[Cell], *, retry_failed: bool = False) -> State:
    """Look through a grid's folder.

    Args:
        cells: those to run; each after those that it needs.
        retry_failed: failed cells are to run again, also with other commands than before.

    Raises:
        InputError: a cell was begun with another command, or is older than one that it was made from.
    """
    records = {}
    for cell in grid.cells:
        record = read_record(root / cell.id)
        # A failed cell's command may be corrected: what it made is kept, and whether it fits is the command's business.
        if not (retry_failed and record is not None and record["status"] == FAILED):
            check_record(record, cell, root / cell.id)
        if record is not None:
            records[cell.id] = record
    state = State(records, [], {})
    for cell in cells:
        status = records.get(cell.id, {}).get("status")
        _check_age(cell, records, root)
        if status == FINISHED:
            continue
        if status == FAILED and not retry_failed:
            state.blocked[cell.id] = FAILED
        elif blocked := [need for need in cell.needs if need in state.blocked]:
            state.blocked[cell.id] = f"needs {blocked[0]}"
        else:
            state.waiting.append(cell)
    return state


def _check_age(cell: Cell, records: Mapping[str, Mapping[str, Any]], root: Path) -> None:
    """Raise InputError if what a cell was made from is not there as it was."""
    for need in cell.needs if cell.id in records else ():
        other = records.get(need, {})
        if other.get("status") != FINISHED or other["ended"] > records[cell.id]["begun"]:
            raise InputError(
                f"{root / cell.id} was made from {need}, which is gone or newer than it: delete the former, too."
            )


def run_grid(
    grid: Grid, root: Path, runner: Runner, cells: Sequence[Cell], *, retry_failed: bool = False
) -> dict[str, str]:
    """Run cells until none is left that can run.

    Finished cells are not run again, failed ones only if asked for, interrupted ones go on. Nothing is tried
    twice in one call. The folder must be locked (:func:`locked`).

    Returns:
        Why a cell is not finished, by id: "failed", "interrupted", or "needs ..." one of these.

    Raises:
        InputError: see :func:`read_state`.
        KeyboardInterrupt: after everything that ran was stopped.
    """
    state = read_state(grid, root, cells, retry_failed=retry_failed)
    write_text(root / GRID, yaml.safe_dump(dict(grid.source), sort_keys=False, allow_unicode=True))
    progress = _Progress(state, len(cells), runner.jobs)
    running: dict[str, Cell] = {}
    try:
        while state.waiting or running:
            ready = [cell for cell in state.waiting if _is_ready(cell, state)][: runner.free()]
            if ready:
                runner.start(ready)
                running.update({cell.id: cell for cell in ready})
                state.waiting = [cell for cell in state.waiting if cell.id not in running]
                progress.started(ready)
            for cell_id, record in runner.ended().items():
                del running[cell_id]
                state.records[cell_id] = record
                if record["status"] != FINISHED:
                    state.blocked[cell_id] = record["status"]
                    _block(state)
                progress.ended(cell_id, record, list(running.values()))
            if running:
                time.sleep(_POLL_SECONDS)
    except BaseException:
        runner.stop()
        raise
    return state.blocked


def _is_ready(cell: Cell, state: State) -> bool:
    return all(state.records.get(need, {}).get("status") == FINISHED for need in cell.needs)


def _block(state: State) -> None:
    """Move cells that wait for one that did not finish out of the way."""
    for cell in list(state.waiting):
        lacking = [need for need in cell.needs if need in state.blocked]
        if lacking:
            state.blocked[cell.id] = f"needs {lacking[0]}"
            state.waiting.remove(cell)


class _Progress:
    """One line for each cell that starts or ends, with the time that is left."""

    def __init__(self, state: State, total: int, jobs: int):
        self.state, self.total, self.jobs = state, total, jobs
        done = total - len(state.waiting) - len(state.blocked)
        logger.info(f"{total} cells: {done} finished before, {len(state.waiting)} to run")
        for cell_id, reason in state.blocked.items():
            hint = "; --retry-failed runs it again" if reason == FAILED else ""
            logger.warning(f"{cell_id}: not run ({reason}){hint}")

    def started(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            logger.info(f"{cell.id}: started")

    def ended(self, cell_id: str, record: Mapping[str, Any], running: Sequence[Cell]) -> None:
        waiting = self.state.waiting
        left = estimate([*waiting, *running], self.state.records, self.jobs)
        done = self.total - len(waiting) - len(running) - len(self.state.blocked)
        line = f"{cell_id}: {record['status']} after {record['seconds'] / 60:.1f} min"
        if record["status"] == FINISHED:
            shown = {name: v for name, v in record["metrics"].items() if name.endswith("bbox/AP")}
            line += "".join(f", {name} {'none' if v is None else round(v, 1)}" for name, v in shown.items())
        else:
            line += f" ({shell_status(record['exit_status'])}): " + (record["log_tail"] or ["no output"])[-1]
        logger.log(
            logging.INFO if record["status"] == FINISHED else logging.WARNING,
            f"{line}; {done} of {self.total} finished, {duration(left)} to go",
        )


def estimate(cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]], jobs: int) -> float | None:
    """Seconds that cells will take, ``jobs`` at a time; None if nothing is known of one of their steps.

    A cell takes as long as the finished ones of its step did on average; while there is none, what the grid
    file says.
    """
    total = 0.0
    for cell in cells:
        known = [r["seconds"] for r in records.values() if r["step"] == cell.step and r["status"] == FINISHED]
        seconds = statistics.mean(known) if known else cell.seconds
        if seconds is None:
            return None
        total += seconds
    return total / min(jobs, max(1, len(cells)))


def dry_run(grid: Grid, root: Path, devices: Devices, state: State) -> str:
    """What would be run, as a shell script, and how long it may take."""
    program = program_words(grid.program)
    lines = [f"# {grid.title}: {len(state.waiting)} cells to run in {root}"]
    lines += [f"# not run: {cell_id} ({reason})" for cell_id, reason in state.blocked.items()]
    for number, cell in enumerate(state.waiting):
        variables = [f"{name}={shlex.quote(value)}" for name, value in devices.environment(number).items()]
        interrupted = state.records.get(cell.id, {}).get("status") in (RUNNING, INTERRUPTED)
        lines += [
            f"# {cell.id}" + (" (goes on)" if interrupted else ""),
            " ".join([*variables, shlex.join([*program, *cell.words(root)])]),
        ]
    left = estimate(state.waiting, state.records, devices.jobs)
    lines.append(f"# {duration(left)}, {devices.jobs} at a time")
    return "\n".join(lines)
