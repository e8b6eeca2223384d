"""The loop with several seeds, and what they say together: means with intervals, and differences seed by seed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from selftrain_d2.data.labeled_draw import draw_labeled
from selftrain_d2.engine.logs import duration
from selftrain_d2.engine.loop.checks import SEED_FOLDER, checked_stages
from selftrain_d2.engine.loop.findings import (
    difference,
    in_words,
    mean_value,
    share_of_ceiling,
    signed,
    value_of,
)
from selftrain_d2.engine.loop.options import LoopOptions
from selftrain_d2.engine.loop.pipeline import self_train
from selftrain_d2.engine.loop.summary import SUMMARY, SUMMARY_MARKDOWN
from selftrain_d2.engine.loop.tasks import TASKS, Task
from selftrain_d2.engine.loop.tasks.detection import Detection
from selftrain_d2.engine.run_folder import made_and_locked
from selftrain_d2.errors import InputError
from selftrain_d2.files import read_json, write_json, write_text

logger = logging.getLogger(__name__)

#: Differences of stages that are summed up where both were trained.
_DIFFERENCES = (("student", "control"), ("student", "teacher"), ("control", "teacher"), ("oracle", "control"))

#: Runs seeds, and calls a function with each that is done.
RunAll = Callable[[Sequence[int], Callable[[int], None]], None]


def self_train_seeds(
    cfg: CfgNode,
    task: Task,
    output: str | os.PathLike,
    seeds: Sequence[int],
    run_all: RunAll | None = None,
    *,
    jobs: int = 1,
    draw: int | None = None,
    options: LoopOptions | None = None,
) -> dict[str, Any]:
    """Run the loop once for each seed, in ``output/seed_N``, and sum up in ``summary.json`` and ``summary.md``.

    Called again it goes on as :func:`~selftrain_d2.engine.loop.pipeline.self_train` does, also with more seeds.

    Args:
        cfg, task, options: of ``self_train``, but for SEED.
        output: folder of all seeds.
        seeds: at least one, each once.
        run_all: how to run them; by default one after the other in this process.
        jobs: how many ``run_all`` runs at a time, for the time that is left.
        draw: each seed has a draw of its own of so many labeled images, see :func:`with_draw`; None: all have all.

    Returns:
        The summary; see :func:`sum_up`.

    Raises:
        InputError: see ``self_train``; or ``output`` has stages of a single run.
    """
    output = Path(output)
    if (output / "teacher").exists():
        raise InputError(
            f"{output} holds a run of one seed: choose another output folder for --seeds, or leave --seeds out "
            "to go on."
        )
    tasks = {seed: task if draw is None else with_draw(task, output, seed, draw) for seed in seeds}
    options = options or LoopOptions()
    checked_stages(with_seed(cfg, seeds[0]), tasks[seeds[0]], seed_folder(output, seeds[0]), options)
    runs: dict[int, dict[str, Any]] = {}

    def finished(seed: int) -> None:
        runs[seed] = read_json(seed_folder(output, seed) / SUMMARY)
        logger.info(_progress(runs, seed, len(seeds), jobs))

    def one_after_the_other(seeds: Sequence[int], finished: Callable[[int], None]) -> None:
        for seed in seeds:
            logger.info(f"Seed {seed}: {seed_folder(output, seed)}")
            self_train(with_seed(cfg, seed), tasks[seed], seed_folder(output, seed), options)
            finished(seed)

    with contextlib.closing(made_and_locked(output)):
        (run_all or one_after_the_other)(seeds, finished)
        summary = sum_up([runs[seed] for seed in seeds])
        if draw is not None:
            summary["drawn"] = draw
        write_text(output / SUMMARY_MARKDOWN, seeds_to_markdown(summary))
        write_json(output / SUMMARY, summary)
    logger.info(f"Results of all seeds: {output / SUMMARY_MARKDOWN}")
    return summary


def with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    """A config with another SEED."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    return cfg


def with_draw(task: Detection, output: str | os.PathLike, seed: int, number: int) -> Detection:
    """A task in which some of the labeled images are labeled, drawn by the seed; the others are its unlabeled ones.

    Their labels are withheld: pseudo labels are judged by them, and an oracle is trained on them.

    Args:
        output: folder of all seeds; the draw is written to ``seed_N/draw``.
        number: images to draw.

    Raises:
        InputError: see :func:`~selftrain_d2.data.labeled_draw.draw_labeled`.
    """
    folder = seed_folder(output, seed) / "draw"
    labeled, unlabeled = map(str, draw_labeled(task.labeled_json, folder, number, seed))
    return replace(
        task,
        labeled_json=labeled,
        unlabeled_images=[unlabeled],
        unlabeled_root=task.labeled_images,
        unlabeled_truth_json=unlabeled,
    )


def seed_folder(output: str | os.PathLike, seed: int) -> Path:
    """Where the loop of a seed is."""
    return Path(output, f"{SEED_FOLDER}{seed}")


def sum_up(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up the summaries of the loop, one a seed.

    Returns:
        ``in_words``, ``task``, ``metric``, ``seeds``; ``stages``: of each the metric ``by_seed``, its ``mean``, and the
        ``half_width`` of its 95 % interval; ``differences``: the same of "student - control" and others, seed by seed,
        with the ``p`` of the paired t test; ``share_of_ceiling``. None stands for what is not known.
    """
    seeds = [run["seed"] for run in runs]
    names = dict.fromkeys(name for run in runs for name, stage in run["stages"].items() if "metrics" in stage)
    stages = {}
    for name in names:
        mean = mean_value(runs, name)
        if mean is not None:
            by_seed = [value_of(run, name) for run in runs]
            stages[name] = {"by_seed": by_seed, **asdict(mean)}
    differences = {}
    for pair in _DIFFERENCES:
        test = difference(runs, *pair)
        if test is not None:
            by_seed = [difference([run], *pair) for run in runs]
            differences[" - ".join(pair)] = {
                "by_seed": [None if one is None else one.difference.mean for one in by_seed],
                **asdict(test.difference),
                "p": test.p,
            }
    return {
        "in_words": in_words(runs),
        "task": runs[0]["task"],
        "metric": TASKS[runs[0]["task"]].metrics[0],
        "seeds": seeds,
        "stages": stages,
        "differences": differences,
        "share_of_ceiling": share_of_ceiling(runs),
        "runs": [f"{SEED_FOLDER}{seed}/{SUMMARY}" for seed in seeds],
    }


def seeds_to_markdown(summary: Mapping[str, Any]) -> str:
    """The summary of several seeds as a page."""
    seeds = summary["seeds"]
    titles = [
        summary["metric"],
        *(f"[{seed}]({SEED_FOLDER}{seed}/{SUMMARY_MARKDOWN})" for seed in seeds),
        "mean",
        "95 %",
    ]
    lines = [
        f"# Self-training summary of {len(seeds)} seeds",
        "",
        " ".join(summary["in_words"]),
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for rows, shown in ((summary["stages"], "{:.1f}".format), (summary["differences"], signed)):
        for name, row in rows.items():
            values = ["-" if value is None else shown(value) for value in (*row["by_seed"], row["mean"])]
            width = "-" if row["half_width"] is None else f"+- {row['half_width']:.1f}"
            lines.append(f"| {name} | {' | '.join(values)} | {width} |")
    lines += ["", "Intervals by Student's t; differences are taken seed by seed."]
    if "drawn" in summary:
        lines.append(f"Each seed has a draw of its own of {summary['drawn']} labeled images.")
    return "\n".join(lines) + "\n"


def _progress(runs: Mapping[int, Mapping[str, Any]], seed: int, total: int, jobs: int) -> str:
    """A line for a seed that is done, with the time that is left."""
    values = {name: value_of(runs[seed], name) for name in ("student", "control")}
    metric = TASKS[runs[seed]["task"]].metrics[0]
    shown = "".join(f", {name} {value:.1f} {metric}" for name, value in values.items() if value is not None)
    took = [sum(stage["seconds"] for stage in run["stages"].values()) for run in runs.values()]
    left = statistics.mean(took) * math.ceil((total - len(runs)) / jobs)
    return f"Seed {seed}: finished{shown}; {len(runs)} of {total} seeds, {duration(left)} to go"
