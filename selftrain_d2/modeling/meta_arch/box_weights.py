"""Boxes that count for less than others: ``gt_weights`` of ``Instances``, in [0, 1], times the losses that they cause.

Letters in shapes: P anchors or proposals that were matched to an object, M objects of an image, N images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.meta_arch.ignored_boxes import replaced


def have_weights(instances: Sequence[Instances], field: str = "gt_weights") -> bool:
    """Whether boxes of any of N images have weights, or another ``field``."""
    return any(x.has(field) for x in instances)


def matched_weights(
    boxes: Tensor, classes: Tensor | None, instances: Instances, field: str = "gt_weights"
) -> Tensor:
    """The weights, or another ``field``, of the objects that anchors or proposals of an image were matched to.

    Args:
        boxes: (P, 4), ``gt_boxes`` of these objects; copies, so that the object is the one whose box they equal.
        classes: (P,) theirs; None where they do not count. Of equal objects the one of the largest weight counts.
        instances: M objects of the image.

    Returns:
        (P,); 1 where the instances have no weights.
    """
    if not len(boxes) or not instances.has(field):
        return torch.ones(len(boxes), device=boxes.device)
    same = (boxes[:, None] == instances.gt_boxes.tensor).all(dim=2)  # (P, M)
    if classes is not None:
        same &= classes[:, None] == instances.gt_classes
    return (same * instances.get(field)).amax(dim=1)


@contextlib.contextmanager
def weighted_losses(model: nn.Module, samples: Sequence[dict]) -> Iterator[None]:
    """Inside, losses of an R-CNN's RPN, and class and box losses of its ROI heads, follow ``gt_weights``.

    Its sampling stays as it is, and so do the numbers that losses are divided by: what was sampled. Losses of masks and
    keypoints know no weights. RPN and heads calculate them as ever, for all that has one weight at a time.

    Args:
        model: with detectron2's RPN and ROIHeads, or subclasses.
        samples: of the forward pass that is made inside.
    """
    instances = [sample["instances"].to(model.device) for sample in samples if "instances" in sample]
    if not have_weights(instances):
        yield
        return
    rpn, predictors = model.proposal_generator, model.roi_heads.box_predictor
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(rpn, "losses", _rpn_losses(rpn.losses, instances)))
        for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
            losses = _head_losses(predictor.losses, predictor.num_classes, instances)
            stack.enter_context(replaced(predictor, "losses", losses))
        yield


def _rpn_losses(losses: Callable, instances: Sequence[Instances]) -> Callable:
    def weighted(
        anchors, logits, gt_labels: list[Tensor], deltas, gt_boxes: list[Tensor]
    ) -> dict[str, Tensor]:
        labels = torch.stack(gt_labels)
        weights = torch.ones(labels.shape, device=labels.device)
        for of_image, label, boxes, objects in zip(weights, labels, gt_boxes, instances):
            of_image[label == 1] = matched_weights(boxes[label == 1], None, objects)

        def part(weight: Tensor) -> dict[str, Tensor]:
            chosen = list(labels.masked_fill(weights != weight, -1))
            return losses(
                anchors, logits, chosen, deltas, gt_boxes
            )  # sums, by a number that is always the same

        with torch.no_grad():
            losses(anchors, logits, gt_labels, deltas, gt_boxes)  # for what it logs
        return _sum_of_parts(part, weights[labels >= 0])

    return weighted


def _head_losses(losses: Callable, num_classes: int, instances: Sequence[Instances]) -> Callable:
    def weighted(predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        weights = [_of_proposals(p, num_classes, objects) for p, objects in zip(proposals, instances)]
        together = torch.cat(weights)
        if not len(together):
            return losses(predictions, proposals)

        def part(weight: Tensor) -> dict[str, Tensor]:
            chosen = together == weight
            share = chosen.sum() / len(chosen)  # a mean over these alone, as a part of that over all
            of_images = [p[w == weight] for p, w in zip(proposals, weights)]
            found = losses(tuple(x[chosen] for x in predictions), of_images)
            return {name: share * loss for name, loss in found.items()}

        with torch.no_grad():
            losses(predictions, proposals)  # for what it logs
        return _sum_of_parts(part, together)

    return weighted


def _of_proposals(proposals: Instances, num_classes: int, objects: Instances) -> Tensor:
    weights = torch.ones(len(proposals), device=proposals.gt_classes.device)
    positive = proposals.gt_classes < num_classes
    if positive.any():
        boxes: Boxes = proposals.gt_boxes
        weights[positive] = matched_weights(boxes.tensor[positive], proposals.gt_classes[positive], objects)
    return weights


def _sum_of_parts(part: Callable[[Tensor], dict[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    """Losses by name, each weight times those of its part."""
    total: dict[str, Tensor] = {}
    with EventStorage():  # what parts log is nobody's
        for weight in weights.unique():
            for name, loss in part(weight).items():
                total[name] = total.get(name, 0.0) + weight * loss
    return total


def check_weighs_boxes(model: nn.Module) -> None:
    """Raise InputError unless a model's losses follow ``gt_weights``."""
    if not getattr(model, "weighs_boxes", False):
        raise InputError(
            f"{type(model).__name__} has no loss of each box that a weight could lessen, as RetinaNet, FCOS and R-CNNs "
            "have: set SELFTRAIN.SCORE_WEIGHTED False, or train one of these."
        )
