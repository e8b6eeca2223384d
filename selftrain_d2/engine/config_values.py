"""A user's config values: merged, and checked before any work starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from selftrain_d2.data.loader import SAMPLERS
from selftrain_d2.engine.trackers import TRACKERS
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone.bifpn import ATTENTIONS
from selftrain_d2.modeling.backbone.spinenet import ACTIVATIONS, SIZES
from selftrain_d2.modeling.backbone.spinenet_blocks import RESAMPLINGS
from selftrain_d2.modeling.classes import is_segmentor
from selftrain_d2.modeling.meta_arch.ignored_boxes import OVERLAPS

__all__ = [
    "LR_SCHEDULERS",
    "RULES",
    "Rule",
    "check_values",
    "is_segmentor",
    "merge_options",
    "one_line",
    "value_of",
]

#: Those of ``detectron2.solver.build_lr_scheduler``.
LR_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")


class Rule(NamedTuple):
    """What a config key may be: the check of a value, and the end of the sentence "it must be"."""

    is_allowed: Callable[[Any], bool]
    description: Callable[[], str]


def _at_least(least: float) -> Rule:
    return Rule(lambda value: value >= least, lambda: f"at least {least}")


def _one_of(names: Callable[[], Iterable[str]]) -> Rule:
    return Rule(lambda value: value in names(), lambda: f"one of {', '.join(names())}")


def _registered(registry: Iterable[tuple[str, Any]]) -> Rule:
    return _one_of(lambda: sorted(name for name, _ in registry))


def _is_device(name: str) -> bool:
    """Whether tensors can be there. CUDA as a whole may be missing: training then falls back to the CPU."""
    try:
        device = torch.device(name)
        if device.type == "cuda":
            return not torch.cuda.is_available() or (device.index or 0) < torch.cuda.device_count()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # not a name, or PyTorch was built without it
        return False
    return device.type != "meta"


RULES: dict[str, Rule] = {
    "MODEL.META_ARCHITECTURE": _registered(META_ARCH_REGISTRY),
    "MODEL.BACKBONE.NAME": _registered(BACKBONE_REGISTRY),
    "MODEL.DEVICE": Rule(_is_device, lambda: "cpu, cuda, or cuda:N for GPU N of this machine, from 0"),
    "MODEL.RETINANET.CONV_DIM": _at_least(0),
    "MODEL.SPINENET.NAME": _one_of(lambda: SIZES),
    "MODEL.SPINENET.ACTIVATION": _one_of(lambda: ACTIVATIONS),
    "MODEL.SPINENET.DROP_CONNECT_RATE": Rule(lambda value: 0 <= value < 1, lambda: "in [0, 1)"),
    "MODEL.SPINENET.OUT_CHANNELS": _at_least(0),
    "MODEL.SPINENET.RESAMPLING": _one_of(lambda: RESAMPLINGS),
    "MODEL.BIFPN.ATTENTION": _one_of(lambda: ATTENTIONS),
    "MODEL.BIFPN.REPEATS": _at_least(1),
    "MODEL.RETINANET.ACTIVATION": _one_of(lambda: ("relu", "swish")),
    "DATALOADER.NUM_WORKERS": _at_least(0),
    "INPUT.CLASSIFICATION_IMAGE_SIZE": _at_least(0),
    "DATALOADER.SAMPLER_TRAIN": _one_of(lambda: SAMPLERS),
    "DATALOADER.PSEUDO_SAMPLER_TRAIN": _one_of(lambda: SAMPLERS),
    "SOLVER.IMS_PER_BATCH": _at_least(1),
    "SOLVER.PSEUDO_IMS_PER_BATCH": _at_least(0),
    "SOLVER.CLASSIFICATION_IMS_PER_BATCH": _at_least(0),
    "SOLVER.BASE_LR": _at_least(0.0),
    "SOLVER.CHECKPOINT_PERIOD": _at_least(1),
    "SOLVER.CHECKPOINTS_TO_KEEP": _at_least(0),
    "SOLVER.LR_SCHEDULER_NAME": _one_of(lambda: LR_SCHEDULERS),
    "SOLVER.MAX_ITER": _at_least(1),
    "SOLVER.MAX_SKIPPED_STEPS": _at_least(0),
    "SOLVER.WARMUP_METHOD": _one_of(lambda: ("constant", "linear")),
    "SELFTRAIN.CLASSIFICATION_LOSS_WEIGHT": _at_least(0.0),
    "SELFTRAIN.IGNORE_SCORE_THRESH": Rule(lambda value: 0 <= value <= 1, lambda: "a score in [0, 1]"),
    "SELFTRAIN.LOCALIZATION_THRESH": Rule(lambda value: 0 <= value <= 1, lambda: "an IoU in [0, 1]"),
    "SELFTRAIN.IGNORE_OVERLAP": _one_of(lambda: OVERLAPS),
    "SELFTRAIN.IGNORE_OVERLAP_THRESH": Rule(lambda value: 0 < value <= 1, lambda: "in (0, 1]"),
    "SELFTRAIN.MAX_BOXES_RATIO": Rule(lambda value: value > 0, lambda: "above 0"),
    "SELFTRAIN.MAX_LOSS_RATIO": Rule(lambda value: value > 0, lambda: "above 0"),
    "SELFTRAIN.TAKE_OVER_SECONDS": Rule(lambda value: value > 0, lambda: "above 0"),
    "SELFTRAIN.TEACHER": _one_of(lambda: ("labels", "moving_average")),
    "SELFTRAIN.TEACHER_EMA_DECAY": Rule(lambda value: 0 < value < 1, lambda: "in (0, 1)"),
    "SELFTRAIN.TEACHER_CHECK_PERIOD": _at_least(0),
    "SELFTRAIN.THRESHOLDS": _one_of(lambda: ("fixed", "counts")),
    "SELFTRAIN.IGNORE_COUNT_RATIO": Rule(
        lambda value: 1 <= value < float("inf"), lambda: "a number of at least 1"
    ),
    "SELFTRAIN.STAGE": _at_least(-1),
    "SELFTRAIN.TEACHER_CHECKPOINT": _one_of(lambda: ("last", "best")),
    "SELFTRAIN.TRACKERS": Rule(
        lambda value: set(value) <= set(TRACKERS) and len(set(value)) == len(value),
        lambda: f"a tuple of {', '.join(TRACKERS)}, such as ('{next(iter(TRACKERS))}',)",
    ),
    "SELFTRAIN.REFINE_ITERS": _at_least(0),
    "SELFTRAIN.REFINE_LR_FACTOR": Rule(lambda value: 0 < value < float("inf"), lambda: "a number above 0"),
    "SELFTRAIN.TTA.SCORES": _one_of(lambda: ("best", "mean")),
    "SELFTRAIN.TTA.BOX_VOTING": Rule(lambda value: 0 <= value <= 1, lambda: "an IoU in [0, 1]"),
    "SELFTRAIN.MIN_NONEMPTY_SHARE": Rule(lambda value: 0 <= value <= 1, lambda: "a share in [0, 1]"),
}


def check_values(cfg: CfgNode) -> None:
    """Check the values of single keys, as :data:`RULES` has them.

    Raises:
        InputError: naming the first key that is wrong, its value, and what it may be.
    """
    for key, rule in RULES.items():
        value = value_of(cfg, key)
        if not rule.is_allowed(value):
            raise InputError(f"{key} is {value!r}: it must be {rule.description()}.")


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of a key like "SOLVER.MAX_ITER"; None if there is no such key."""
    value: Any = cfg
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def merge_options(cfg: CfgNode, options: Sequence[Any]) -> None:
    """Merge ``KEY VALUE`` pairs, in place.

    Raises:
        InputError: an odd number of words, an unknown key, or a value of the wrong type.
    """
    options = list(options[1:]) if list(options[:1]) == ["--"] else list(options)
    for word in options[::2]:
        if str(word).startswith("-"):
            raise InputError(f"{word} comes after KEY VALUE pairs: put all --arguments before them.")
    if len(options) % 2:
        raise InputError(f"KEY VALUE words come in pairs, but {options[-1]!r} stands alone.")
    for key, value in zip(options[::2], options[1::2]):
        try:
            cfg.merge_from_list([key, _fit_float(cfg, key, value)])
        except (
            KeyError,
            AssertionError,
            AttributeError,
            TypeError,
        ):  # TypeError: a key below one that is no section
            raise InputError(f"There is no config key {key!r}.") from None
        except ValueError as error:
            raise InputError(f"Config key {key}: {one_line(error)}.") from error


def _fit_float(cfg: CfgNode, key: str, value: Any) -> Any:
    """A whole number for a key with a fraction (SELFTRAIN.ALPHA 1) as 1.0; yacs would refuse it."""
    is_whole = isinstance(value_of(cfg, key), float) and str(value).lstrip("+-").isdecimal()
    return float(value) if is_whole else value


def one_line(error: Exception) -> str:
    """An exception's text for the middle of a sentence."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()).rstrip(".")
