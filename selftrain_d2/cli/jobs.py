"""Several runs at a time on this machine: arguments of commands, and the seeds of the loop as processes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from selftrain_d2.engine.loop.seeds import seed_folder
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.cell_record import LOG, log_tail, program_words, shell_status
from selftrain_d2.experiments.grid.local_runner import Devices, start_process, stop_processes
from selftrain_d2.files import writing

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


def add_jobs_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--jobs`` and ``--devices``.

    Args:
        what: runs at a time, in the plural.
    """
    parser.add_argument(
        "--jobs", type=int, metavar="K", help=f"{what} at a time (default: one for each device, else 1)"
    )
    parser.add_argument(
        "--devices",
        metavar="0,1|cpu",
        help="GPUs that jobs take turns on, each seeing one; or cpu, where each of K jobs has 1/K of the cores "
        "unless OMP_NUM_THREADS is set (default: jobs see what is there)",
    )


def devices_of(args: argparse.Namespace) -> Devices:
    """What the arguments of :func:`add_jobs_arguments` say.

    Raises:
        InputError: they are no devices, or no number of jobs.
    """
    gpus = None
    if args.devices is not None:
        gpus = () if args.devices == "cpu" else tuple(args.devices.split(","))
        if not all(gpu.isalnum() or "-" in gpu for gpu in gpus):
            raise InputError(f"--devices must be 'cpu' or GPUs such as 0,1, not {args.devices!r}.")
    jobs = args.jobs if args.jobs is not None else len(gpus or ()) or 1
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, not {jobs}.")
    return Devices(jobs, gpus)


def run_seeds(
    words: Sequence[str],
    output: str,
    devices: Devices,
    seeds: Sequence[int],
    finished: Callable[[int], None],
) -> None:
    """Run ``self-train`` for several seeds as processes of this machine; what they print is in ``seed_N/log.txt``.

    Args:
        words: the command line, from the command's name on.
        output: folder of all seeds.
        devices: how many at a time, and where.
        finished: called with each seed that is done.

    Raises:
        InputError: a seed ended with a mistake; the others are finished.
        SystemExit: a seed failed otherwise; the others are finished.
        KeyboardInterrupt: after all that ran was stopped.
    """
    program, waiting = program_words(None), list(seeds)
    running: dict[int, tuple[int, subprocess.Popen]] = {}  # by the number of the job
    failed: dict[int, int] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop in good order, as at Ctrl-C
    try:
        while waiting or running:
            for job in range(devices.jobs):
                if waiting and job not in running:
                    seed = waiting.pop(0)
                    log = Path(seed_folder(output, seed), LOG)
                    with writing(log):
                        log.parent.mkdir(exist_ok=True)
                    command = [*program, words[0], "--one-seed", str(seed), *words[1:]]
                    environment = {**os.environ, **devices.environment(job)}
                    running[job] = seed, start_process(command, log, environment)
                    logger.info(f"Seed {seed}: started ({log})")
            for job, (seed, process) in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    if process.returncode:
                        failed[seed] = process.returncode
                        logger.warning(f"Seed {seed}: {shell_status(process.returncode)}")
                    else:
                        finished(seed)
            time.sleep(_POLL_SECONDS if running else 0)
    except BaseException:
        stop_processes([process for _, process in running.values()])
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    for seed, status in failed.items():
        log = Path(seed_folder(output, seed), LOG)
        message = (
            f"seed {seed} ended with {shell_status(status)} ({log}): {(log_tail(log) or ['no output'])[-1]}"
        )
        if status == 2:
            raise InputError(message)
        logger.error(message)
    if failed:
        sys.exit(1)
