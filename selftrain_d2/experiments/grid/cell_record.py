"""What is known about a cell of a grid: ``cell.json`` in its folder, beside ``log.txt`` and ``output/``."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.evaluation.testing import flatten_results_dict

import selftrain_d2
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.definition import Cell
from selftrain_d2.experiments.grid.words import OUTPUT
from selftrain_d2.files import read_json, write_json

CELL, LOG = "cell.json", "log.txt"
#: Files that training leaves in its folder: the evaluation at the end, and detectron2's curves.
RESULTS, CURVES = "results.json", "metrics.json"

#: States of a cell. One that was killed, or whose runner died, is interrupted: it goes on next time.
RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"

# Somebody ended the process; a crash (SIGSEGV, SIGABRT, ...) is a failure.
_KILLED = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL}
_TAIL_LINES, _TAIL_BYTES = 15, 20_000


def read_record(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The record of the cell in a folder; None if it never began."""
    file = Path(folder) / CELL
    return read_json(file) if file.exists() else None


def check_record(record: Mapping[str, Any] | None, cell: Cell, folder: str | os.PathLike) -> None:
    """Raise InputError if a cell was begun with another command than the grid has now."""
    if record is None or record["command"] == list(cell.command):
        return
    pairs = itertools.zip_longest(record["command"], cell.command, fillvalue="nothing")
    before, now = next(pair for pair in pairs if pair[0] != pair[1])
    correct = "run the corrected command with --retry-failed, " if record["status"] == FAILED else ""
    raise InputError(
        f"{folder} was begun with another command: {before!r} there, {now!r} now; {correct}choose another --output, or "
        "delete that folder to start the cell anew."
    )


def begin(cell: Cell, folder: Path, words: Sequence[str]) -> None:
    """Write down that a cell starts now, or goes on.

    Args:
        words: the whole command, program included.
    """
    before = read_record(folder) or {}
    (folder / OUTPUT).mkdir(parents=True, exist_ok=True)
    write_json(
        folder / CELL,
        {
            "step": cell.step,
            "axes": dict(cell.axes),
            "status": RUNNING,
            "command": list(cell.command),
            "run": list(words),
            **git_revision(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "detectron2": detectron2.__version__,
            },
            "host": platform.node(),
            "starts": before.get("starts", 0) + 1,
            "begun": before.get("begun", _now()),
            "last_start": time.time(),
            "seconds": _seconds_so_far(before, folder),
        },
    )


def finish(folder: Path, exit_status: int, *, stopped: bool = False) -> dict[str, Any]:
    """Write down how a cell ended, with its results.

    Args:
        exit_status: of the process; negative for the number of a signal.
        stopped: this program ended the process; whatever its status then, it did not fail.

    Returns:
        The record.

    Raises:
        InputError: the cell's folder is gone.
    """
    record = read_record(folder)
    if record is None:
        raise InputError(
            f"{folder / CELL} is gone: that folder was deleted or moved while its command ran; run the grid again, "
            "which starts the cell anew."
        )
    if exit_status == 0:
        status = FINISHED
    elif stopped or (-exit_status if exit_status < 0 else exit_status - 128) in _KILLED:
        status = INTERRUPTED
    else:
        status = FAILED
    seconds = record.pop("seconds") + time.time() - record.pop("last_start")
    record.update(status=status, exit_status=exit_status, ended=_now(), seconds=round(seconds, 1))
    if status == FINISHED:
        try:
            record["metrics"], record["curve"] = collect_results(folder / OUTPUT)
        except InputError as error:
            record.update(status=FAILED, log_tail=[*log_tail(folder / LOG), str(error)])
    else:
        record["log_tail"] = log_tail(folder / LOG)
    write_json(folder / CELL, record)
    return record


def collect_results(output: Path) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """The results that commands wrote below a folder.

    Returns:
        Metrics by name, from every ``results.json``: ``task/metric`` ("bbox/AP"), behind the name of the dataset if
        DATASETS.TEST had several ("city/bbox/AP"), behind the name of the folder it lies in if that is not ``output``
        itself ("student/bbox/AP"). And the curve: the metrics of each
        evaluation during training, with its ``iteration``. None stands for what is not finite.

    Raises:
        InputError: a results file is not what training writes.
    """
    metrics: dict[str, float | None] = {}
    curve = []
    for file in sorted(output.rglob(RESULTS)):
        folder = file.parent.relative_to(output).as_posix()
        prefix = "" if folder == "." else f"{folder}/"
        results = read_json(file)
        if not isinstance(results, dict) or not all(isinstance(task, dict) for task in results.values()):
            raise InputError(f"{file} must hold a mapping of tasks to metrics.")
        found = {name: _finite(value) for name, value in flatten_results_dict(results).items()}
        metrics.update({f"{prefix}{name}": value for name, value in found.items()})
        for iteration, row in sorted(_rows(file.with_name(CURVES)).items()):
            values = {f"{prefix}{name}": _finite(row[name]) for name in found if name in row}
            if values:
                curve.append({"iteration": iteration, **values})
    return metrics, curve


def _rows(file: Path) -> dict[int, dict[str, Any]]:
    """Lines of detectron2's metrics by iteration. A run that was stopped may leave half a line, or one twice."""
    rows: dict[int, dict[str, Any]] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                row = json.loads(line)
                rows[row["iteration"]] = {**rows.get(row["iteration"], {}), **row}
    return rows


def log_tail(file: Path) -> list[str]:
    """The last lines of a log; of a progress bar what it showed last."""
    if not file.exists():
        return []
    with open(file, "rb") as log:
        log.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        text = log.read().decode("utf-8", errors="replace")
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-_TAIL_LINES:]


def git_revision() -> dict[str, Any]:
    """The revision of this package's repository, and whether tracked files differ from it; None outside of one."""
    file = Path(selftrain_d2.__file__)

    def git(*words: str) -> str:
        result = subprocess.run(["git", *words], cwd=file.parent, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", file.name
        )  # installed inside of somebody else's repository: not ours
        found = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return {"git_revision": None, "git_dirty": None}
    return {"git_revision": found.replace("-dirty", ""), "git_dirty": found.endswith("-dirty")}


def shell_status(exit_status: int) -> str:
    """An exit status in words."""
    if exit_status < 0:
        return f"signal {signal.Signals(-exit_status).name}"
    return f"exit status {exit_status}"


def program_words(program: Sequence[str] | None) -> list[str]:
    """The words in front of a cell's command: this Python's ``selftrain-d2``, if the grid names none."""
    return list(program) if program is not None else [sys.executable, "-m", "selftrain_d2.cli"]


def _seconds_so_far(record: Mapping[str, Any], folder: Path) -> float:
    seconds = record.get("seconds", 0.0)
    if (
        record.get("status") == RUNNING and (folder / LOG).exists()
    ):  # its runner died: count up to its last word
        seconds += max(0.0, (folder / LOG).stat().st_mtime - record["last_start"])
    return seconds


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _now() -> str:
    """In UTC, so that texts compare as times do."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
