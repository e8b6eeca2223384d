"""Runs cells of a grid as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selftrain_d2.experiments.grid.cell_record import LOG, begin, finish
from selftrain_d2.experiments.grid.definition import Cell

#: What a process that is told to stop has to end by itself.
GRACE_SECONDS = 15.0


@dataclass(frozen=True)
class Devices:
    """How many cells run at a time, and what each sees of the machine."""

    jobs: int = 1
    #: GPUs, as CUDA_VISIBLE_DEVICES names them; () for the CPU alone, None for whatever is there.
    gpus: tuple[str, ...] | None = None

    def environment(self, job: int) -> dict[str, str]:
        """Environment variables for one of the jobs. Threads that are set already stay as they are."""
        threads = max(1, len(os.sched_getaffinity(0)) // self.jobs)
        variables = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            # Threads that wait must not keep a core from the other jobs.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        }
        if self.gpus is not None:
            variables["CUDA_VISIBLE_DEVICES"] = self.gpus[job % len(self.gpus)] if self.gpus else ""
        return variables


class LocalRunner:
    """Runs cells as processes of this machine."""

    def __init__(self, root: Path, program: Sequence[str], devices: Devices, lock: int | None = None):
        """
        Args:
            root: the grid's folder.
            program: words in front of each cell's command.
            devices: how many at a time, and where.
            lock: a file descriptor that every process holds open: what outlives this one keeps the lock.
        """
        self.root, self.program, self.devices, self.lock = root, list(program), devices, lock
        self.jobs = devices.jobs
        self._running: dict[int, tuple[Cell, subprocess.Popen]] = {}  # by the number of the job

    def free(self) -> int:
        return self.jobs - len(self._running)

    def start(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            job = next(number for number in range(self.jobs) if number not in self._running)
            folder = self.root / cell.id
            words = [*self.program, *cell.words(self.root)]
            begin(cell, folder, words)
            environment = {**os.environ, **self.devices.environment(job)}
            self._running[job] = cell, start_process(words, folder / LOG, environment, self.lock)

    def ended(self) -> dict[str, dict[str, Any]]:
        return self._collect(stopped=False)

    def stop(self) -> None:
        stop_processes([process for _, process in self._running.values()])
        self._collect(stopped=True)

    def _collect(self, stopped: bool) -> dict[str, dict[str, Any]]:
        ended = {job: pair for job, pair in self._running.items() if pair[1].poll() is not None}
        for job in ended:
            del self._running[job]
        return {
            cell.id: finish(self.root / cell.id, process.returncode, stopped=stopped)
            for cell, process in ended.values()
        }


def start_process(
    words: Sequence[str], log: Path, environment: Mapping[str, str], lock: int | None = None
) -> subprocess.Popen:
    """Start a command whose output is appended to a log, out of reach of the terminal's Ctrl-C.

    A program that cannot be started is one that ended with status 127, as in a shell.
    """
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(words)}\n".encode())
        file.flush()
        options: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": file,
            "stderr": subprocess.STDOUT,
            "env": dict(environment),
            "start_new_session": True,
            "pass_fds": () if lock is None else (lock,),
        }
        try:
            return subprocess.Popen(list(words), **options)
        except OSError as error:
            file.write(f"{error}\n".encode())
            file.flush()
            return subprocess.Popen(["sh", "-c", "exit 127"], **options)


def stop_processes(processes: Sequence[subprocess.Popen]) -> None:
    """Interrupt processes with all their children; kill what is there after a while, or at a second Ctrl-C."""
    try:
        for process in processes:
            _signal(process, signal.SIGINT)
        end = time.monotonic() + GRACE_SECONDS
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it and its children are gone
        os.killpg(process.pid, number)
