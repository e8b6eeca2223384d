"""Does the detector fit the boxes? What its anchors reach, and the image size or the anchors that would do.

Letters in shapes: C classes, S image sizes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from torch import nn

from selftrain_d2.data.box_arrays import BoxArrays
from selftrain_d2.errors import InputError
from selftrain_d2.inspection.box_reach import MOST_MISSED, BoxReach
from selftrain_d2.modeling.anchors import Anchors, Locations, matched_by

logger = logging.getLogger(__name__)

#: Image sizes that are compared: multiples of 32 up to 512, of 64 from there.
IMAGE_SIZES = (*range(64, 512, 32), *range(512, 2049, 64))
#: Factors that ``fit_anchors`` compares: eighths of an octave, from 1/8 to 4.
FACTORS = tuple(float(2 ** (eighths / 8)) for eighths in range(-24, 17))
# What sizes and factors are compared on: at most about so many boxes, of each class the same number.
_COMPARED, _LEAST_OF_A_CLASS = 20_000, 100
# Of factors that reach as much within this share of a class, the one that changes least is taken.
_AS_GOOD = 0.01


def box_reach(
    cfg: CfgNode,
    model: nn.Module,
    dicts: Iterable[Mapping[str, Any]],
    class_names: Sequence[str] | None,
    *,
    by_size: bool = False,
) -> BoxReach | None:
    """Which human boxes a detector can be taught at INPUT.AUGMENTATION.IMAGE_SIZE, without scale jitter.

    Args:
        model: of the config; may be on the meta device.
        dicts: dataset dicts of human-labeled images.
        class_names: by contiguous id; None: the ids.
        by_size: also at each of ``IMAGE_SIZES``.

    Returns:
        None where it cannot be known (see :func:`~selftrain_d2.modeling.anchors.matched_by`), or there is no box.
    """
    detector = matched_by(cfg, model)
    if detector is None:
        return None
    boxes = BoxArrays.of(dicts)
    if not len(boxes.boxes):
        return None
    names = list(class_names or map(str, range(boxes.category_ids.max() + 1)))
    size, classes = cfg.INPUT.AUGMENTATION.IMAGE_SIZE, len(names)
    missed = _missed(detector, boxes, size, classes)
    few = _compared(boxes)
    return BoxReach(
        names,
        np.bincount(boxes.category_ids, minlength=classes),
        missed,
        size,
        detector.rule,
        "" if _would_do(missed) else _advice(cfg, detector, few, classes),
        IMAGE_SIZES if by_size else (),
        np.stack([_missed(detector, few, other, classes) for other in IMAGE_SIZES]) if by_size else None,
    )


def tell_box_reach(
    cfg: CfgNode, model: nn.Module, dicts: Iterable[Mapping[str, Any]], class_names: Sequence[str] | None
) -> None:
    """Log what :func:`box_reach` finds: one line, and a warning where it is bad."""
    reach = box_reach(cfg, model, dicts, class_names)
    if reach is not None:
        logger.info(reach.line())
        if reach.warned:
            logger.warning(reach.warning())


def fit_anchors(cfg: CfgNode, model: nn.Module, dicts: Iterable[Mapping[str, Any]]) -> CfgNode:
    """A config whose anchors fit human boxes: all sizes times one factor.

    The factor is that of :data:`FACTORS` with the largest mean over the classes of the share of boxes within reach, at
    the config's image size; of those as good within a hundredth, the one nearest to 1. One factor keeps what a level is
    to the next, as the ``anchor_scale`` of TensorFlow's RetinaNet does.

    Args:
        model: of the config; may be on the meta device.
        dicts: dataset dicts of human-labeled images, the only ones that are looked at.

    Returns:
        The config with other MODEL.ANCHOR_GENERATOR.SIZES.

    Raises:
        InputError: the detector has no anchors that these sizes change.
    """
    detector = matched_by(cfg, model)
    if not isinstance(detector, Anchors):
        raise InputError(
            "--fit-anchors needs a detector with upright anchors (RetinaNet, R-CNN), which "
            f"{cfg.MODEL.META_ARCHITECTURE} is not: leave it out."
        )
    boxes = BoxArrays.of(dicts)
    if not len(boxes.boxes):
        return cfg
    size, classes = cfg.INPUT.AUGMENTATION.IMAGE_SIZE, int(boxes.category_ids.max()) + 1
    factor, _ = _best_factor(detector, _compared(boxes), size, classes)
    fitted = cfg.clone()
    fitted.defrost()
    fitted.MODEL.ANCHOR_GENERATOR.SIZES = _times(cfg.MODEL.ANCHOR_GENERATOR.SIZES, factor)
    if cfg.is_frozen():
        fitted.freeze()
    pairs = zip(matched_by(fitted, model).levels, detector.scaled(factor).levels)
    if not all(np.allclose(there.first, wanted.first, atol=0.01) for there, wanted in pairs):
        raise InputError(
            "--fit-anchors multiplies MODEL.ANCHOR_GENERATOR.SIZES, by which the anchors of "
            f"{cfg.MODEL.ANCHOR_GENERATOR.NAME} do not grow: leave it out."
        )
    logger.info(
        f"--fit-anchors: {factor:.3g} times the sizes of the config's anchors, MODEL.ANCHOR_GENERATOR.SIZES "
        f"{json.dumps(fitted.MODEL.ANCHOR_GENERATOR.SIZES)}."
    )
    return fitted


def _advice(cfg: CfgNode, detector: Anchors | Locations, boxes: BoxArrays, classes: int) -> str:
    """What would leave at most MOST_MISSED of each class out, as the end of a sentence."""
    now = cfg.INPUT.AUGMENTATION.IMAGE_SIZE
    larger, smaller = [s for s in IMAGE_SIZES if s > now], [s for s in reversed(IMAGE_SIZES) if s < now]
    does = (s for s in (*larger, *smaller) if _would_do(_missed(detector, boxes, s, classes)))
    size = next(does, None)
    advice = f"no size up to {IMAGE_SIZES[-1]} would do" if size is None else f"{size} would do"
    if not isinstance(detector, Anchors):
        return advice
    factor, missed = _best_factor(detector, boxes, now, classes)
    if not _would_do(missed):
        return (
            f"{advice}, but no factor of the anchors' sizes: the best, {factor:.3g}, leaves {np.nanmax(missed):.0%} of "
            f"a class out (the finest anchors are {detector.levels[0].stride} pixels apart)"
        )
    sizes = json.dumps(_times(cfg.MODEL.ANCHOR_GENERATOR.SIZES, factor))
    return (
        f"{advice}, and so would --fit-anchors: {factor:.3g} times the anchors' sizes, MODEL.ANCHOR_GENERATOR.SIZES "
        f'"{sizes}"'
    )


def _best_factor(
    detector: Anchors, boxes: BoxArrays, image_size: int, classes: int
) -> tuple[float, np.ndarray]:
    """The factor that :func:`fit_anchors` takes, and what is out of reach with it: (C,)."""
    missed = [_missed(detector.scaled(factor), boxes, image_size, classes) for factor in FACTORS]
    means = np.array([np.nanmean(shares) for shares in missed])
    good = np.flatnonzero(means <= means.min() + _AS_GOOD)
    best = min(good, key=lambda i: abs(np.log(FACTORS[i])))
    return FACTORS[best], missed[best]


def _missed(detector: Anchors | Locations, boxes: BoxArrays, image_size: int, classes: int) -> np.ndarray:
    """(C,): the share of each class's boxes that is out of reach; NaN where there are none."""
    reached = detector.reached(boxes.resized(image_size), image_size)
    all_boxes = np.bincount(boxes.category_ids, minlength=classes)
    missed = np.bincount(boxes.category_ids[~reached], minlength=classes)
    return np.divide(missed, all_boxes, out=np.full(classes, np.nan), where=all_boxes > 0)


def _would_do(missed: np.ndarray) -> bool:
    return not (missed > MOST_MISSED).any()  # NaN is not


def _compared(boxes: BoxArrays) -> BoxArrays:
    return boxes.sample(max(_COMPARED // len(np.unique(boxes.category_ids)), _LEAST_OF_A_CLASS))


def _times(sizes: Any, factor: float) -> Any:
    """Numbers in nested lists times a factor."""
    return (
        [_times(s, factor) for s in sizes] if isinstance(sizes, (list, tuple)) else round(sizes * factor, 4)
    )
