"""Config keys that must fit each other, the data and the processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from torch import nn

from selftrain_d2.data.datasets import check_same_classes, class_names
from selftrain_d2.data.training_sets import check_registered
from selftrain_d2.engine.config_values import is_segmentor
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.classes import number_of_classes
from selftrain_d2.modeling.meta_arch.box_weights import check_weighs_boxes
from selftrain_d2.modeling.meta_arch.soft_labels import check_takes_soft_labels


def amp_precision(cfg: CfgNode) -> torch.dtype:
    """The data type that SOLVER.AMP.PRECISION names.

    Raises:
        InputError: neither float16 nor bfloat16, or float16 on a CPU.
    """
    if cfg.SOLVER.AMP.PRECISION not in ("float16", "bfloat16"):
        raise InputError(
            f"SOLVER.AMP.PRECISION is {cfg.SOLVER.AMP.PRECISION!r}: it must be float16 or bfloat16."
        )
    if cfg.SOLVER.AMP.PRECISION == "float16" and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise InputError(
            f"Mixed precision in float16 needs a GPU, MODEL.DEVICE is {cfg.MODEL.DEVICE}: set "
            "SOLVER.AMP.PRECISION bfloat16, or SOLVER.AMP.ENABLED False."
        )
    return getattr(torch, cfg.SOLVER.AMP.PRECISION)


def check_accumulation_steps(cfg: CfgNode, processes: int | None = None) -> int:
    """SOLVER.ACCUMULATION_STEPS.

    Args:
        processes: of the run; by default those that run now.

    Raises:
        InputError: it is not positive, or the images of a step do not divide by it.
    """
    steps, processes = cfg.SOLVER.ACCUMULATION_STEPS, processes or comm.get_world_size()
    if steps < 1:
        raise InputError(f"SOLVER.ACCUMULATION_STEPS must be at least 1, not {steps}.")
    for key in ("IMS_PER_BATCH", "PSEUDO_IMS_PER_BATCH", "CLASSIFICATION_IMS_PER_BATCH"):
        images = cfg.SOLVER[key]
        if images % (steps * processes):
            raise InputError(
                f"SOLVER.{key} = {images} does not divide by SOLVER.ACCUMULATION_STEPS {steps} "
                f"x {processes} processes."
            )
    return steps


def check_reference_world_size(cfg: CfgNode, processes: int | None = None) -> None:
    """Refuse detectron2's scaling to another number of processes, which knows nothing of this plugin's keys.

    Args:
        processes: of the run; by default those that run now.

    Raises:
        InputError: SOLVER.REFERENCE_WORLD_SIZE is another number than theirs, and not 0.
    """
    reference, processes = cfg.SOLVER.REFERENCE_WORLD_SIZE, processes or comm.get_world_size()
    if reference not in (0, processes):
        raise InputError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, but the processes are {processes}: it would scale "
            "SOLVER.IMS_PER_BATCH and the schedule, but neither the pseudo-labeled images nor what SELFTRAIN.* counts "
            f"in steps; set it to 0, and these keys to their values for {processes}."
        )


def check_score_weights(cfg: CfgNode, model: nn.Module) -> None:
    """Raise InputError if SELFTRAIN.SCORE_WEIGHTED or SOFT_LABELS asks a student's model for what it cannot do, or both
    are set."""
    if not cfg.DATASETS.PSEUDO_TRAIN:
        return
    if cfg.SELFTRAIN.SCORE_WEIGHTED and cfg.SELFTRAIN.SOFT_LABELS:
        raise InputError(
            "SELFTRAIN.SCORE_WEIGHTED and SOFT_LABELS are two uses of the same boxes: set one of them False."
        )
    if cfg.SELFTRAIN.SCORE_WEIGHTED:
        check_weighs_boxes(model)
    if cfg.SELFTRAIN.SOFT_LABELS:
        check_takes_soft_labels(model)


def check_test_sets(cfg: CfgNode) -> None:
    """Raise InputError unless DATASETS.TEST has names, registered ones, that results can be told apart by."""
    names = cfg.DATASETS.TEST
    check_registered("DATASETS.TEST", names)
    if len(set(names)) < len(names):
        raise InputError(f"DATASETS.TEST is {tuple(names)}: name each dataset once.")
    if len(names) > 1 and cfg.TEST.EXPECTED_RESULTS:
        raise InputError(
            "TEST.EXPECTED_RESULTS is about one dataset: leave one in DATASETS.TEST, or no expectation."
        )


# Of detectron2's evaluators: the metrics of a task; those that each class has too, as in "AP-car".
_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_METRICS = {
    "bbox": (_AP, ("AP",)),
    "segm": (_AP, ("AP",)),
    "keypoints": (("AP", "AP50", "AP75", "APm", "APl"), ("AP",)),
    "sem_seg": (("mIoU", "fwIoU", "mACC", "pACC"), ("IoU", "ACC")),
    "validation": (("loss",), ()),
}


def check_best_metric(cfg: CfgNode, own_evaluation: bool = False) -> None:
    """Check TEST.BEST_METRIC, and what depends on it, before there is an evaluation.

    Args:
        own_evaluation: by a project's own evaluator, whose metrics are known when it has evaluated: any name is taken
            now, and compared with the results then (:class:`~selftrain_d2.engine.kept_checkpoints.BestCheckpoint`).

    Raises:
        InputError: it is no metric of what the model is evaluated on, there is nothing to evaluate on, or
            SELFTRAIN.TEACHER_CHECKPOINT "best" has no metric.
    """
    metric, datasets = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
    if not metric:
        if cfg.SELFTRAIN.TEACHER_CHECKPOINT == "best":
            raise InputError(
                "SELFTRAIN.TEACHER_CHECKPOINT is best: set TEST.BEST_METRIC (bbox/AP, say) and TEST.EVAL_PERIOD."
            )
        return
    if not datasets:
        raise InputError(
            f"TEST.BEST_METRIC {metric} needs images to evaluate on: give DATASETS.TEST (self-train: --val-images with "
            "their labels)."
        )
    if own_evaluation:
        return
    tasks = ["sem_seg"] if is_segmentor(cfg) else ["bbox"]
    tasks += ["segm"] * bool(cfg.MODEL.MASK_ON) + ["keypoints"] * bool(cfg.MODEL.KEYPOINT_ON)
    tasks += ["validation"] * bool(cfg.TEST.VALIDATION_LOSS)
    prefixes = {f"{name}/": name for name in datasets} if len(datasets) > 1 else {"": datasets[0]}
    for prefix, dataset in prefixes.items():
        task, _, name = metric[len(prefix) :].partition("/")
        if metric.startswith(prefix) and task in tasks and _is_metric(name, task, dataset):
            return
    examples = ", ".join(f"{next(iter(prefixes))}{task}/{_METRICS[task][0][0]}" for task in tasks)
    raise InputError(
        f"TEST.BEST_METRIC is {metric!r}: it must be a metric of the evaluation, such as {examples}."
    )


def _is_metric(name: str, task: str, dataset: str) -> bool:
    metrics, by_class = _METRICS[task]
    if task == "validation" and name.startswith("loss_"):  # its parts are the model's
        return True
    classes = class_names(dataset) or []
    if task != "sem_seg" and len(classes) == 1:  # COCO's evaluation has no AP of the only class
        classes = []
    return name in (*metrics, *(f"{metric}-{one}" for metric in by_class for one in classes))


def check_evaluated_classes(cfg: CfgNode, known: Sequence[str] | None) -> None:
    """Compare the classes of a trained model with those of DATASETS.TEST.

    Args:
        known: the model's, by id; None if its weights do not say. Then only their number is compared.

    Raises:
        InputError: they differ, or stand in another order.
    """
    for name in cfg.DATASETS.TEST:
        if class_names(name) is None:
            DatasetCatalog.get(name)  # register_coco_instances tells the classes when it reads them
        check_number_of_classes(cfg, name)
        if known and (found := class_names(name)):
            check_same_classes(
                known, found, f"The evaluation dataset {name!r}", f"the weights {cfg.MODEL.WEIGHTS}"
            )


def check_number_of_classes(cfg: CfgNode, name: str | None = None) -> None:
    """Raise InputError unless the model has as many classes as the data, of boxes or of pixels as it learns.

    Args:
        name: of the dataset; by default the first of DATASETS.TRAIN.
    """
    name, architecture = name or cfg.DATASETS.TRAIN[0], cfg.MODEL.META_ARCHITECTURE
    if class_names(name) is None:
        return
    of_pixels = is_segmentor(cfg)
    classes = MetadataCatalog.get(name).get("stuff_classes" if of_pixels else "thing_classes")
    if not classes:
        learned, there = ("masks of pixels", "boxes") if of_pixels else ("boxes", "masks of pixels")
        raise InputError(
            f"{architecture} learns {learned}, but {name!r} has {there}: choose another MODEL.META_ARCHITECTURE or "
            "dataset."
        )
    key, number = number_of_classes(cfg) or ("", len(classes))
    if number != len(classes):
        raise InputError(f"{key} is {number}, but {name!r} has {len(classes)} classes: {classes}.")
