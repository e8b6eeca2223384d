"""Pseudo boxes that teach a class as far as the teacher believes in it: ``gt_scores`` of ``Instances``, in [0, 1].

Letters in shapes: M boxes of an image, R anchors (locations), C classes.
"""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from selftrain_d2.errors import InputError


def scores_of(instances: Instances) -> Tensor:
    """(M,) scores of the boxes of an image; 1 where they have none."""
    if instances.has("gt_scores"):
        return instances.gt_scores
    return instances.gt_boxes.tensor.new_ones(len(instances))


def soft_targets(labels: Tensor, classes: Tensor, scores: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """What the anchors of an image learn of each class.

    Boxes of several classes at one place, a teacher's first and second guess, all teach the anchors there. A box of
    score s is an object with s, and background with 1 - s: so far as it is one, an anchor that nearly predicts it
    (label -1) and none better is left out.

    Args:
        labels: (M, R), of each box alone: 1 for the anchors that predict it, -1 for those to be ignored, else 0.
        classes: (M,). scores: (M,) in [0, 1].

    Returns:
        targets (R, C): the best score of the boxes of a class that an anchor predicts, 0 where there is none; and
        weights (R,): 1, less by how much a box that the anchor is to ignore has a better score than all these.
    """
    targets = scores.new_zeros(num_classes, labels.shape[1])
    targets.scatter_reduce_(0, classes[:, None].expand_as(labels), (labels == 1) * scores[:, None], "amax")
    ignored = scores.new_zeros(1, labels.shape[1])  # the row of zeros is for images without boxes
    ignored = torch.cat([ignored, (labels == -1) * scores[:, None]]).amax(dim=0)
    return targets.T, 1 - (ignored - targets.amax(dim=0)).clamp(min=0)


def soft_focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """The focal loss for targets in [0, 1]: its modulating factor is the distance from the target.

    It is 0 where the probability is the target, and the focal loss where the target is 0 or 1. Quality Focal Loss (Li
    et al., 2020, equation 5) with the focal loss's alpha.

    Args:
        logits, targets: of any one shape.
        alpha: weight of a target of 1, and 1 - alpha of one of 0; negative: both weigh 1.

    Returns:
        of the same shape.
    """
    distance = (logits.sigmoid() - targets).abs()
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * distance**gamma
    return loss * (alpha * targets + (1 - alpha) * (1 - targets)) if alpha >= 0 else loss


def check_takes_soft_labels(model: nn.Module) -> None:
    """Raise InputError unless a model's losses follow ``gt_scores``."""
    if not getattr(model, "takes_soft_labels", False):
        raise InputError(
            f"{type(model).__name__} has no class loss that a score between 0 and 1 could be the target of, as "
            "RetinaNet and FCOS have: set SELFTRAIN.SOFT_LABELS False, or train one of these."
        )
