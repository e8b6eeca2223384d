"""What a stage of the loop was begun with and what came out, in its folder: work is done once, and never mixed."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.engine.flat_config import flat_config
from selftrain_d2.errors import InputError
from selftrain_d2.files import check_unchanged, is_empty, read_json, write_json, writing
from selftrain_d2.modeling.checkpoint import checkpoints_in

logger = logging.getLogger(__name__)

STAGE = "stage.json"

#: In a stage's settings: hash of the weights that it starts from.
STARTING_WEIGHTS = "weights_sha256"

# Where and how fast a stage runs: as this call says, whatever a stage before ran on.
PLACE = ("DATALOADER.NUM_WORKERS", "MODEL.DEVICE", "CUDNN_BENCHMARK")

# That, and how often it saves, does not change what a stage makes.
_KEYS_WITHOUT_EFFECT = (
    *PLACE,
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",  # by its hash instead
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINTS_TO_KEEP",
    "TEST.EVAL_PERIOD",
    "TEST.VALIDATION_LOSS",
    "SELFTRAIN.MIN_NONEMPTY_SHARE",
    "SELFTRAIN.MAX_BOXES_RATIO",
    "SELFTRAIN.STUDENT_WEIGHTS",  # by their hash as well
    "SELFTRAIN.TAKE_OVER_SECONDS",
    "SELFTRAIN.STAGE",  # the loop's own
    "SELFTRAIN.TRACKERS",
    "SELFTRAIN.TEACHER_CHECKPOINT",  # by the weights' hash
    "SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES",  # which weights were let pass
    "VERSION",
)


def run_stage(folder: Path, settings: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do a stage's work once: a finished one is taken as it is, one of other settings is refused.

    Other settings are accepted where they spoil nothing: before the first checkpoint, or to correct the mistake that
    the work ended with. Nothing is ever deleted.
    """
    file = folder / STAGE
    record: dict[str, Any] = {"settings": settings, "seconds": 0.0, "result": None}
    if file.exists():
        before = read_json(file)
        if before["result"] is not None:
            check_unchanged(folder, _settings_of(before), settings)
            logger.info(f"{folder} is finished already.")
            return {**before["result"], "seconds": before["seconds"]}
        if checkpoints_in(folder):
            _check_correction(folder, before, settings)
            record["seconds"] = before["seconds"]
    elif not is_empty(folder, STAGE):
        raise InputError(f"{folder} is not empty and has no {STAGE}: choose another output folder.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(file, record)
    start = time.perf_counter()

    def save() -> None:
        record["seconds"] = round(record["seconds"] + time.perf_counter() - start, 1)
        write_json(file, record)

    try:
        record["result"] = work()
    except BaseException as error:
        if isinstance(error, InputError):
            record["mistake"] = str(error)
        with contextlib.suppress(InputError):  # the disk may be full: `error` says so
            save()  # the time of a run that was stopped counts as well
        raise
    save()
    return {**record["result"], "seconds": record["seconds"]}


def _check_correction(folder: Path, record: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise InputError unless unfinished work may go on from its last checkpoint with these settings."""
    before = _settings_of(record)
    if "mistake" not in record:
        check_unchanged(folder, before, settings)
    check_unchanged(
        folder, before, {STARTING_WEIGHTS: settings[STARTING_WEIGHTS]}
    )  # what it began with cannot be changed any more
    changed = [
        f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value
    ]
    if changed:
        logger.warning(
            f"{folder} goes on from its last checkpoint with corrected settings ({', '.join(changed)}): the steps "
            "before were trained without them."
        )


def _settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """Work begun before a config key existed was done as the key's default has it."""
    return {**_defaults(), **record["settings"]}


def stage_settings(cfg: CfgNode) -> dict[str, Any]:
    """Every config key that a training run's result depends on, flat, as JSON reads it back."""
    flat = {key: value for key, value in flat_config(cfg).items() if key not in _KEYS_WITHOUT_EFFECT}
    if not cfg.DATASETS.PSEUDO_TRAIN:  # of the keys of self-training, supervised training knows few
        known = ["SELFTRAIN.WEIGHT_EMA_DECAY", "SELFTRAIN.REFINE_ITERS"]
        known += ["SELFTRAIN.REFINE_LR_FACTOR"] * bool(cfg.SELFTRAIN.REFINE_ITERS)  # a control's
        flat = {k: v for k, v in flat.items() if not k.startswith("SELFTRAIN.") or k in known}
    if cfg.TEST.BEST_METRIC:  # which weights are compared
        flat["TEST.EVAL_PERIOD"] = cfg.TEST.EVAL_PERIOD
    return json.loads(json.dumps(flat))


def _defaults() -> dict[str, Any]:
    """The default of every config key, as :func:`stage_settings` has them."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    return json.loads(json.dumps(flat_config(cfg)))
