"""Boxes that count for less than others: ``gt_weights`` of ``Instances``, in [0, 1], times the losses that they cause.

Letters in shapes: P anchors or proposals that were matched to an object, M objects of an image, N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from selftrain_d2.errors import InputError


def have_weights(instances: Sequence[Instances]) -> bool:
    """Whether boxes of any of N images have weights."""
    return any(x.has("gt_weights") for x in instances)


def matched_weights(boxes: Tensor, classes: Tensor, instances: Instances) -> Tensor:
    """The weights of the objects that anchors or proposals of an image were matched to.

    Args:
        boxes: (P, 4), ``gt_boxes`` of these objects; copies, so that the object is the one whose box they equal.
        classes: (P,) theirs. Of equal objects the one of the largest weight counts.
        instances: M objects of the image.

    Returns:
        (P,); 1 where the instances have no weights.
    """
    if not len(boxes) or not instances.has("gt_weights"):
        return torch.ones(len(boxes), device=boxes.device)
    same = (boxes[:, None] == instances.gt_boxes.tensor).all(dim=2)  # (P, M)
    same &= classes[:, None] == instances.gt_classes
    return (same * instances.gt_weights).amax(dim=1)


def check_weighs_boxes(model: nn.Module) -> None:
    """Raise InputError unless a model's losses follow ``gt_weights``."""
    if not getattr(model, "weighs_boxes", False):
        raise InputError(
            f"{type(model).__name__} has no loss of each box that its score could weigh, as RetinaNet and FCOS have: "
            "set SELFTRAIN.SCORE_WEIGHTED False, or train one of these."
        )
