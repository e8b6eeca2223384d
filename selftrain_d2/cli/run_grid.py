"""Run a grid of experiments: a YAML file of axes, and of commands to run for their values.

Runs every cell of the grid, --jobs at a time, each after those it needs. Stop it at any time: the same command goes on
from there. Finished cells are not run again, failed ones only with --retry-failed. Each cell is a folder
DIR/STEP/AXIS=VALUE,.../ with cell.json (axes, command, git revision, seconds, metrics, curve), log.txt and output/.
Exit status 1: some cells are not finished; the lines before say which, and why.

    selftrain-d2 grid grids/loss_normalization.yaml --output output/loss_normalization --dry-run
    selftrain-d2 grid grids/loss_normalization.yaml --output output/loss_normalization --jobs 2 --devices cpu
    selftrain-d2 report output/loss_normalization --output output/loss_normalization/report
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections import defaultdict
from pathlib import Path

import yaml

from selftrain_d2.cli import COMMANDS
from selftrain_d2.cli.common import find_config
from selftrain_d2.cli.jobs import add_jobs_arguments, devices_of
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.cell_record import program_words
from selftrain_d2.experiments.grid.definition import Grid, load_grid
from selftrain_d2.experiments.grid.local_runner import Devices, LocalRunner
from selftrain_d2.experiments.grid.runner import Runner, dry_run, locked, read_state, run_grid
from selftrain_d2.experiments.grid.slurm_runner import SlurmRunner, submitted_jobs
from selftrain_d2.experiments.report.contrasts import contrasts_of
from selftrain_d2.experiments.report.figure_spec import figures_of

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument(
        "grid", metavar="GRID", help="a YAML file: a path, or the name of one that is shipped"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of all cells")
    add_jobs_arguments(parser, "cells")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="AXIS=VALUE,...",
        help="only cells with these values, and what they need; may be repeated; step=NAME chooses steps",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one of the file's values; a list by a line as a shell reads it",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="run failed cells again, also with a corrected command"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands and an estimate of hours, run nothing"
    )
    parser.add_argument(
        "--slurm",
        nargs="*",
        metavar="KEY=VALUE",
        help="submit cells as SLURM array jobs through submitit, with its parameters, e.g. timeout_min=600 "
        "gpus_per_node=1 slurm_partition=gpu; --jobs limits the tasks of an array that run at a time",
    )


def when_stopped(args: argparse.Namespace) -> str:
    """How to go on."""
    return "the same command goes on from here"


def run(args: argparse.Namespace) -> None:
    """Run the grid, or say what would be run."""
    log_to_console()
    grid = load_grid(find_config(args.grid), _pairs(args.set, "--set"))
    _check_commands(grid)
    figures_of(grid)  # a mistake there is told now, not hours later
    contrasts_of(grid)
    only: dict[str, list[str]] = defaultdict(list)
    for text in args.only:
        for axis, values in _pairs([text], "--only").items():
            only[axis] += values.split(",")
    cells = grid.select(only)
    devices = devices_of(args)
    if args.dry_run:
        print(
            dry_run(
                grid,
                args.output,
                devices,
                read_state(grid, args.output, cells, retry_failed=args.retry_failed),
            )
        )
        return
    with locked(args.output) as lock:
        runner = _runner(args, grid, devices, lock)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop in good order, as at Ctrl-C
        try:
            unfinished = run_grid(grid, args.output, runner, cells, retry_failed=args.retry_failed)
        finally:
            signal.signal(signal.SIGTERM, before)
    if unfinished:
        logger.warning(f"{len(unfinished)} of {len(cells)} cells are not finished.")
        sys.exit(1)
    logger.info(f"All {len(cells)} cells are finished: {args.output}")


def _runner(args: argparse.Namespace, grid: Grid, devices: Devices, lock: int) -> Runner:
    program = program_words(grid.program)
    if args.slurm is not None:
        parameters = {key: yaml.safe_load(value) for key, value in _pairs(args.slurm, "--slurm").items()}
        return SlurmRunner(args.output, program, args.jobs, parameters)
    jobs = submitted_jobs(args.output)
    if jobs:
        raise InputError(
            f"{len(jobs)} cells of {args.output} were submitted to SLURM (e.g. job {next(iter(jobs.values()))}): go on "
            "with --slurm; or cancel the jobs and delete its slurm/jobs.json."
        )
    return LocalRunner(args.output, program, devices, lock)


def _pairs(texts: list[str], option: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not equals or not name:
            raise InputError(f"{option} takes NAME=VALUE, not {name!r}.")
    return {name: value for name, _, value in pairs}


def _check_commands(grid: Grid) -> None:
    if grid.program is None:
        for cell in grid.cells:
            if not cell.command or cell.command[0] not in COMMANDS:
                raise InputError(
                    f"Grid {grid.title!r}, step {cell.step}: {' '.join(cell.command[:1])!r} is no command of "
                    f"selftrain-d2; known: {', '.join(COMMANDS)}."
                )
