"""One training or evaluation run: datasets, seeds and logs."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng

from selftrain_d2.data.augmentation import set_test_size
from selftrain_d2.data.classification import register_classification_folder
from selftrain_d2.data.datasets import (
    class_names,
    register_human_labels,
    register_image_folder,
    register_pseudo_labels,
    unregister,
)
from selftrain_d2.data.image_headers import check_images
from selftrain_d2.data.image_sources import absolute_root
from selftrain_d2.data.pseudo_labels.counts import in_words, thresholds_by_counts
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.pseudo_labels.selection import check_counts, class_names_of, selection_from_config
from selftrain_d2.data.random_state import stage_seed
from selftrain_d2.data.segmentation_datasets import register_segmentation_folder
from selftrain_d2.data.training_sets import count_human_boxes
from selftrain_d2.engine.box_reach import tell_box_reach
from selftrain_d2.engine.coco_evaluation import check_evaluation
from selftrain_d2.engine.config_checks import check_evaluated_classes, check_test_sets
from selftrain_d2.engine.hooks.loss_normalizer import model_of
from selftrain_d2.engine.logs import log_to_console, log_to_file
from selftrain_d2.engine.process_group import Processes, restarted, run_in_processes
from selftrain_d2.engine.run_folder import RESULTS, check_run_folder, drop_rows, held
from selftrain_d2.engine.stage import with_stage
from selftrain_d2.engine.trainer import SelfTrainingTrainer
from selftrain_d2.engine.validation_loss import ValidationLoss, add_to_results
from selftrain_d2.files import NO_ROOM, write_json, write_text, writing
from selftrain_d2.modeling.checkpoint import (
    checkpoints_in,
    load_weights,
    require_complete,
    require_same_anchors,
)
from selftrain_d2.modeling.torch_flags import torch_flag
from selftrain_d2.processes import on_main_process

logger = logging.getLogger(__name__)

#: (name, register function, its other arguments). Every process registers the datasets for itself.
DatasetSpec = tuple


def human_labels(name: str, json_file: str, image_root: str) -> DatasetSpec:
    """Human labels in COCO JSON, for :func:`registered`."""
    return name, register_human_labels, (absolute_root(json_file), absolute_root(image_root))


def human_masks(name: str, images: str, masks: str, classes: Sequence[str]) -> DatasetSpec:
    """A folder of images and one of masks, for :func:`registered`."""
    return (
        name,
        register_segmentation_folder,
        (os.path.abspath(images), os.path.abspath(masks), tuple(classes)),
    )


def pseudo_labels(name: str, folder: str, cfg: CfgNode, human: Sequence[DatasetSpec] = ()) -> DatasetSpec:
    """A pseudo-label folder, for :func:`registered`, with the boxes or pixels that SELFTRAIN.* selects.

    Args:
        human: see :func:`select`.
    """
    return selected_labels(name, folder, *select(folder, cfg, human))


def selected_labels(
    name: str,
    folder: str | os.PathLike,
    selection: Mapping[str, Any],
    counts: Mapping[str, Any] | None = None,
) -> DatasetSpec:
    """A pseudo-label folder, for :func:`registered`, with what :func:`select` gave."""
    return (
        name,
        functools.partial(_register_selected, selection=selection, counts=counts),
        (absolute_root(folder),),
    )


def _register_selected(
    name: str, folder: str, selection: Mapping[str, Any], counts: Mapping[str, Any] | None
) -> None:
    register_pseudo_labels(name, folder, **selection)
    if counts is not None:  # here, where the log of the run is open
        logger.info(f"{name}: {in_words(counts)}.")


def select(
    folder: str | os.PathLike, cfg: CfgNode, human: Sequence[DatasetSpec] = ()
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What SELFTRAIN.* selects of a pseudo-label folder.

    Args:
        folder: a finished one.
        human: datasets of DATASETS.TRAIN that are not registered yet: SELFTRAIN.THRESHOLDS "counts" counts their boxes.

    Returns:
        Arguments of ``load_pseudo_labels``; and the thresholds by counts that they are from, if they are, as
        ``CountThresholds.as_dict`` has them.

    Raises:
        InputError: see :func:`read_manifest`, :func:`check_counts` and :func:`count_human_boxes`.
    """
    manifest = read_manifest(folder)
    names = class_names_of(manifest)
    if cfg.SELFTRAIN.THRESHOLDS == "fixed":
        return selection_from_config(cfg, names), None
    check_counts(cfg, manifest)
    with registered(human):
        counts = thresholds_by_counts(
            folder,
            count_human_boxes(cfg),
            ignore_from=cfg.SELFTRAIN.IGNORE_SCORE_THRESH or None,
            ignore_ratio=cfg.SELFTRAIN.IGNORE_COUNT_RATIO,
        )
    return selection_from_config(cfg, names, counts), counts.as_dict()


def unlabeled_images(name: str, folder: str | os.PathLike, names: Sequence[str] | None = None) -> DatasetSpec:
    """Images of a folder that are labeled while a student is trained, for :func:`registered`; all without names."""
    return name, register_image_folder, (absolute_root(folder), names)


def classification_images(name: str, folder: str) -> DatasetSpec:
    """A folder of classes for joint training, for :func:`registered`."""
    return name, register_classification_folder, (absolute_root(folder),)


@contextlib.contextmanager
def registered(datasets: Sequence[DatasetSpec]) -> Iterator[None]:
    """Register datasets, and remove them again."""
    done = []
    try:
        for name, register, arguments in datasets:
            register(name, *arguments)
            done.append(name)
        yield
    finally:
        for name in done:
            unregister(name)


def train(
    cfg: CfgNode,
    datasets: Sequence[DatasetSpec] = (),
    *,
    resume: bool = False,
    allow_unsafe: bool = False,
    processes: Processes | None = None,
) -> None:
    """Train and evaluate as the config says; ``metrics.json``, ``log.txt`` and checkpoints go to OUTPUT_DIR.

    Predictions for DATASETS.TEST go to ``inference/`` there; of several datasets, to ``inference/NAME/``.

    Args:
        cfg: a teacher's or a student's config.
        datasets: registered for the time of the run, in every process.
        resume: go on from the last checkpoint in OUTPUT_DIR, if there is one. Without, a folder that holds a run is
            refused, unless torchrun has started the processes anew.
        allow_unsafe: load MODEL.WEIGHTS even if that is a pickle that can run code.
        processes: one by default.
    """
    run_in_processes(_train, processes, (cfg, datasets, resume, allow_unsafe), cfg.MODEL.DEVICE)


def evaluate(
    cfg: CfgNode,
    datasets: Sequence[DatasetSpec] = (),
    *,
    allow_unsafe: bool = False,
    averaged: bool = False,
    processes: Processes | None = None,
) -> None:
    """Evaluate MODEL.WEIGHTS on DATASETS.TEST and log the results.

    Args:
        averaged: evaluate the moving average that this checkpoint of training carries.
    """
    run_in_processes(_evaluate, processes, (cfg, datasets, allow_unsafe, averaged), cfg.MODEL.DEVICE)


@contextlib.contextmanager
def _run(cfg: CfgNode, datasets: Sequence[DatasetSpec]) -> Iterator[None]:
    rank = comm.get_rank()
    suffix = f".rank{rank}" if rank else ""
    with log_to_file(os.path.join(cfg.OUTPUT_DIR, f"log.txt{suffix}")), registered(datasets):
        if rank == 0:
            if comm.get_world_size() > 1:  # a new process
                log_to_console()
            logging.getLogger("detectron2").info("Environment:\n" + collect_env_info())
        seed = stage_seed(cfg)
        # Lower 31 bits: NumPy takes no more than 32.
        seed_all_rng(None if seed is None else (seed + rank) % 2**31)
        yield


def _written(cfg: CfgNode) -> CfgNode:
    """A run's config for other programs: with it detectron2's own predictor and test loader resize as the run does."""
    written = cfg.clone()
    written.defrost()
    policy = cfg.INPUT.AUGMENTATION.POLICY
    if not set_test_size(written):
        logger.warning(
            f"detectron2's own predictor and test loader cannot resize images as policy {policy} does: with this run's "
            "config.yaml their results differ from those here."
        )
    sizes, before = ((c.INPUT.MIN_SIZE_TEST, c.INPUT.MAX_SIZE_TEST) for c in (written, cfg))
    if sizes != before:
        logger.info(
            f"config.yaml has INPUT.MIN_SIZE_TEST {sizes[0]} and MAX_SIZE_TEST {sizes[1]} in place of {before[0]} and "
            f"{before[1]}: the size that policy {policy} tests at."
        )
    return written


def _train(cfg: CfgNode, datasets: Sequence[DatasetSpec], resume: bool, allow_unsafe: bool) -> None:
    resume = resume or any(comm.all_gather(restarted()))
    cfg = with_stage(cfg, resume)
    folder = cfg.OUTPUT_DIR
    with (
        held(folder, lambda: check_run_folder(folder, resume)),
        writing(folder, NO_ROOM),
        _run(cfg, datasets),
        # Not for evaluation and labeling, whose images have many sizes.
        torch_flag(torch.backends.cudnn, "benchmark", cfg.CUDNN_BENCHMARK),
    ):
        trainer = SelfTrainingTrainer(cfg, allow_unsafe=allow_unsafe)
        on_main_process(lambda: check_images((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
        if comm.is_main_process():
            humans = trainer.data_loader.dataset.sources[0]
            tell_box_reach(cfg, model_of(trainer), humans, class_names(cfg.DATASETS.TRAIN[0]))
        trainer.resume_or_load(resume)
        if comm.is_main_process():
            _write_config(cfg)  # not before: a run that is refused leaves that of the run before
            drop_rows(os.path.join(folder, "metrics.json"), trainer.start_iter)
        trainer.train()
        if comm.is_main_process():
            results = getattr(trainer, "_last_eval_results", None) or {}
            write_json(os.path.join(folder, RESULTS), _finite(results))


def _evaluate(
    cfg: CfgNode, datasets: Sequence[DatasetSpec], allow_unsafe: bool, averaged: bool = False
) -> dict[str, Any]:
    with writing(cfg.OUTPUT_DIR, NO_ROOM), _run(cfg, datasets):
        if comm.is_main_process() and not checkpoints_in(cfg.OUTPUT_DIR):  # that of a training run stays
            _write_config(cfg)
        check_test_sets(cfg)
        check_evaluation(cfg)
        model = SelfTrainingTrainer.build_model(cfg)
        report = load_weights(model, cfg.MODEL.WEIGHTS, allow_unsafe, averaged)
        require_complete(report, cfg.MODEL.WEIGHTS)
        require_same_anchors(report, cfg)
        check_evaluated_classes(cfg, report.classes)
        results = SelfTrainingTrainer.test(cfg, model)
        if cfg.TEST.VALIDATION_LOSS:
            losses = ValidationLoss(cfg)(model)
            if comm.is_main_process():
                add_to_results(results, losses)
        for name, tasks in results_by_set(results if comm.is_main_process() else {}).items():
            for task, metrics in tasks.items():
                numbers = ", ".join(f"{metric} {value:.2f}" for metric, value in metrics.items())
                logger.info(f"{name + ', ' if name else ''}{task}: {numbers}")
        return results


def results_by_set(results: Mapping[str, Any]) -> Mapping[str, Mapping[str, Mapping[str, float | None]]]:
    """What ``results.json`` holds, as ``{dataset: {task: {metric: value}}}``.

    A run with one name in DATASETS.TEST has no datasets there; its results come under the name "".
    """
    nested = any(isinstance(value, Mapping) for metrics in results.values() for value in metrics.values())
    return results if nested else {"": results}


def _write_config(cfg: CfgNode) -> None:
    write_text(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), _written(cfg).dump())


def _finite(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results for JSON, which has no NaN: COCO's AP of a box size that no truth has becomes null."""
    return {
        name: _finite(value) if isinstance(value, Mapping) else value if math.isfinite(value) else None
        for name, value in results.items()
    }
