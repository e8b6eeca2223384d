"""The folder of a training run: held by one run at a time, and never the place of two."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from selftrain_d2.errors import InputError
from selftrain_d2.files import remove_unfinished, writing
from selftrain_d2.folder_lock import FolderLock
from selftrain_d2.modeling.checkpoint import BEST_WEIGHTS, FINAL_WEIGHTS, WEIGHT_AVERAGE, checkpoints_in
from selftrain_d2.processes import on_main_process

#: File in OUTPUT_DIR with the evaluation at the end of training; written last. ``{task: {metric: value}}``, and with
#: several names in DATASETS.TEST ``{dataset: {task: {metric: value}}}``.
RESULTS = "results.json"
#: Below OUTPUT_DIR: the weights that labeled at the end of training, where SELFTRAIN.TEACHER is "moving_average".
MOVING_TEACHER = os.path.join("moving_teacher", FINAL_WEIGHTS)


def made_and_locked(folder: str | os.PathLike) -> FolderLock:
    """Make a folder, if it is not there, and hold it against other writers.

    Raises:
        InputError: another holds the folder, or it cannot be written.
    """
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        return FolderLock(folder)


@contextlib.contextmanager
def held(folder: str | os.PathLike, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a run's folder against other runs; in several processes the main one does it for all.

    What a killed run left half-written is removed.

    Args:
        check: made when the folder is held, before anything in it changes.

    Raises:
        InputError: in every process: another run holds the folder, it cannot be written, or what ``check`` raised.
    """
    folder = Path(folder)

    def take() -> FolderLock:
        lock = made_and_locked(folder)
        try:
            if check is not None:
                check()
            for file in (FINAL_WEIGHTS, WEIGHT_AVERAGE, BEST_WEIGHTS, MOVING_TEACHER):
                remove_unfinished((folder / file).parent)
        except BaseException:
            lock.close()
            raise
        return lock

    lock = on_main_process(take)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def check_run_folder(folder: str | os.PathLike, resume: bool) -> None:
    """Refuse to begin a run in the folder of another, whose checkpoints and metrics would be mixed with its own.

    Raises:
        InputError: there are checkpoints or results, and the run does not go on from a checkpoint.
    """
    checkpoints, results = checkpoints_in(folder), Path(folder, RESULTS)
    if resume and checkpoints:
        return
    if checkpoints or results.exists():
        found = os.path.basename(checkpoints[-1]) if checkpoints else RESULTS
        way = "choose another OUTPUT_DIR, or delete that folder to start anew"
        raise InputError(
            f"{folder} holds a run already ({found}): {way}."
            if resume
            else f"{folder} holds a run already ({found}): go on from its last checkpoint with --resume, {way}."
        )


def drop_rows(metrics: str | os.PathLike, first_step: int) -> None:
    """Take rows of steps that are about to be done (again) out of detectron2's ``metrics.json``, and torn rows.

    The evaluation that ended training before that step stays. The file is changed in place: a writer may have it open,
    for appending.
    """
    try:
        file = open(metrics, "r+b")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        return
    with file:
        rows = file.readlines()
        kept = [row for row in rows if _is_before(row, first_step)]
        if len(kept) < len(rows):
            file.seek(0)
            file.writelines(kept)
            file.truncate()


def _is_before(row: bytes, first_step: int) -> bool:
    try:
        values = json.loads(row) if row.endswith(b"\n") else {}
        step = values["iteration"]
        return step < first_step or (step == first_step > 0 and "total_loss" not in values)
    except (ValueError, KeyError, TypeError):
        return False
