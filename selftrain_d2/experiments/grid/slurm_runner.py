"""Runs cells of a grid as SLURM jobs, through submitit (an optional dependency)."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.cell_record import INTERRUPTED, LOG, RUNNING, begin, finish, read_record
from selftrain_d2.experiments.grid.definition import Cell
from selftrain_d2.experiments.grid.local_runner import start_process, stop_processes
from selftrain_d2.files import read_json, write_json

# submitit's name of where jobs go; its tests and ours have "local".
_CLUSTER = "slurm"
# submitit's own limit of array tasks that run at a time.
_JOBS = 256


class CellJob:
    """One cell, in a job of its own."""

    def __init__(self, cell: Cell, root: Path, program: Sequence[str]):
        self.cell, self.root, self.program = cell, root, list(program)

    def __call__(self) -> str:
        """Run the cell; how it ended is in its record.

        Returns:
            Its status.
        """
        folder = self.root / self.cell.id
        words = [*self.program, *self.cell.words(self.root)]
        begin(self.cell, folder, words)
        process = start_process(words, folder / LOG, {"OMP_WAIT_POLICY": "PASSIVE", **os.environ})
        try:
            process.wait()
        except BaseException:  # SLURM ends the job
            stop_processes([process])
            finish(folder, process.returncode, stopped=True)
            raise
        return finish(folder, process.returncode)["status"]

    def checkpoint(self) -> Any:
        """What submitit queues again when the job's time is over, or it makes room for another: the same."""
        return _submitit().helpers.DelayedSubmission(self)


class SlurmRunner:
    """Submits cells as array jobs. The ids of the jobs are kept, so that a new runner takes over from one that died."""

    def __init__(
        self,
        root: Path,
        program: Sequence[str],
        jobs: int | None = None,
        parameters: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            root: the grid's folder; all nodes must see it under this path.
            program: words in front of each cell's command.
            jobs: tasks of an array that run at a time.
            parameters: submitit's (``timeout_min``, ``slurm_partition``, ``gpus_per_node``, ...).

        Raises:
            InputError: submitit is not installed, SLURM is not there, or a parameter is unknown or of the wrong type.
        """
        submitit = _submitit()
        self.root, self.program, self.jobs = root, list(program), jobs or _JOBS
        folder = _folder(root)
        try:
            self.executor = submitit.AutoExecutor(folder, cluster=_CLUSTER)
            self.executor.update_parameters(
                **{"name": "selftrain-d2", "slurm_array_parallelism": self.jobs, **(parameters or {})}
            )
        except (RuntimeError, NameError, AssertionError) as error:
            raise InputError(f"--slurm: {' '.join(str(error).split())}") from error
        self._running = {
            cell_id: submitit.SlurmJob(folder, job_id) for cell_id, job_id in submitted_jobs(root).items()
        }

    def free(self) -> int:
        return 1_000_000  # SLURM has the queue

    def start(self, cells: Sequence[Cell]) -> None:
        new = [cell for cell in cells if cell.id not in self._running]
        if new:
            jobs = self.executor.submit_array([CellJob(cell, self.root, self.program) for cell in new])
            self._running.update({cell.id: job for cell, job in zip(new, jobs)})
            self._write_jobs()

    def ended(self) -> dict[str, dict[str, Any]]:
        ended = {cell_id: self._record(cell_id, job) for cell_id, job in self._running.items() if job.done()}
        if ended:
            self._running = {cell_id: job for cell_id, job in self._running.items() if cell_id not in ended}
            self._write_jobs()
        return ended

    def stop(self) -> None:
        for job in self._running.values():
            job.cancel(check=False)
        self._running = {}
        self._write_jobs()

    def _record(self, cell_id: str, job: Any) -> dict[str, Any]:
        """How a cell ended whose job is over."""
        folder = self.root / cell_id
        record = read_record(folder)
        if record is None:  # it never began
            tail = (job.stderr() or "the job wrote nothing").strip().splitlines()[-1:]
            return {"status": INTERRUPTED, "seconds": 0.0, "exit_status": -signal.SIGKILL, "log_tail": tail}
        if record["status"] == RUNNING:  # it died without a word
            return finish(folder, -signal.SIGKILL)
        return record

    def _write_jobs(self) -> None:
        folder = _folder(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "jobs.json", {cell_id: job.job_id for cell_id, job in self._running.items()})


def submitted_jobs(root: Path) -> dict[str, str]:
    """Ids of the jobs that may still be queued or running, by cell."""
    file = _folder(root) / "jobs.json"
    return read_json(file) if file.exists() else {}


def _folder(root: Path) -> Path:
    return root / "slurm"


def _submitit() -> ModuleType:
    try:
        return importlib.import_module("submitit")
    except ImportError:
        raise InputError("--slurm needs submitit, which is not installed: pip install submitit") from None
