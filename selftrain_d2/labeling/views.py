"""Test-time augmentation: a detector sees an image several times, resized and mirrored, and its boxes are merged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from selftrain_d2.modeling.soft_nms import soft_nms

#: The detections of one image in several views, in pixels of the image as it is -> those to keep.
Merge = Callable[[Sequence[Instances]], Instances]


def see_once(cfg: CfgNode) -> None:
    """Set SELFTRAIN.TTA of ``cfg`` so that a detector sees each image once, as in evaluation."""
    tta = cfg.SELFTRAIN.TTA
    tta.SCALES, tta.FLIP, tta.BOX_VOTING, tta.SCORES = (1.0,), False, 0.0, "best"


def mirrored(instances: Instances) -> Instances:
    """Detections of an image, for the same image mirrored left to right, and the other way round.

    Args:
        instances: ``pred_boxes`` (N, 4) XYXY in pixels of ``image_size``, and perhaps ``pred_masks``
            (N, H, W). Other fields stay.
    """
    result = Instances(instances.image_size, **instances.get_fields())
    x0, y0, x1, y1 = instances.pred_boxes.tensor.unbind(dim=1)
    width = instances.image_size[1]
    result.pred_boxes = Boxes(torch.stack([width - x1, y0, width - x0, y1], dim=1))
    if instances.has("pred_masks"):
        result.pred_masks = instances.pred_masks.flip(-1)
    return result


def build_merge(cfg: CfgNode, detector: nn.Module) -> Merge:
    """How the detections of several views become one image's: by the detector's own NMS and limits.

    Of the same object seen several times, NMS within its class keeps the best; with
    MODEL.RETINANET.SOFT_NMS_SIGMA the others lose score instead. With SELFTRAIN.TTA.BOX_VOTING the box is
    the mean of all of them, with SELFTRAIN.TTA.SCORES "mean" its score that of all views.
    """
    two_stage = hasattr(detector, "roi_heads")
    keys = cfg.MODEL.ROI_HEADS if two_stage else cfg.MODEL.RETINANET
    sigma = 0.0 if two_stage else cfg.MODEL.RETINANET.SOFT_NMS_SIGMA
    iou_to_vote, most = cfg.SELFTRAIN.TTA.BOX_VOTING, cfg.TEST.DETECTIONS_PER_IMAGE
    takes_mean = cfg.SELFTRAIN.TTA.SCORES == "mean"

    def merge(views: Sequence[Instances]) -> Instances:
        together = Instances.cat(list(views))
        boxes, scores, classes = together.pred_boxes.tensor, together.scores, together.pred_classes
        if sigma:
            kept, scores = soft_nms(
                boxes,
                scores,
                classes,
                sigma=sigma,
                score_thresh=keys.SCORE_THRESH_TEST,
                max_detections=most,
            )
            best = together[kept]
            best.scores = scores
        else:
            kept = batched_nms(boxes, scores, classes, keys.NMS_THRESH_TEST)
            best = together[kept if takes_mean else kept[:most]]
        if takes_mean:
            best.scores = mean_scores(best, views, keys.NMS_THRESH_TEST)
            best = best[best.scores.argsort(descending=True)[:most]]
            best = best[best.scores >= keys.SCORE_THRESH_TEST]
        if iou_to_vote:
            best.pred_boxes = Boxes(voted_boxes(best, together, iou_to_vote))
        return best

    return merge


def voted_boxes(kept: Instances, candidates: Instances, iou_threshold: float) -> Tensor:
    """Each box as the mean of all boxes of its class around it, weighed by their scores.

    What the views see of one object differs by the noise of its localization, which the mean takes away; NMS keeps the
    best-scored box, and with it the noise of one view (box voting: Gidaris and Komodakis, 2015, Section 4).

    Args:
        kept: ``pred_boxes`` (N, 4) XYXY, ``pred_classes`` (N,).
        candidates: ``pred_boxes`` (M, 4), ``scores`` and ``pred_classes`` (M,): those of all views, the kept ones among
            them.
        iou_threshold: boxes vote for a kept one from this IoU on.

    Returns:
        (N, 4), the boxes in place of ``kept.pred_boxes``.
    """
    votes = pairwise_iou(kept.pred_boxes, candidates.pred_boxes) >= iou_threshold
    votes &= kept.pred_classes[:, None] == candidates.pred_classes
    weights = votes * candidates.scores
    return weights @ candidates.pred_boxes.tensor / weights.sum(dim=1, keepdim=True)


def mean_scores(boxes: Instances, seen: Sequence[Instances], iou_threshold: float) -> Tensor:
    """The mean, over all views, of the best score that the class of a box has in its place; 0 where a view has none.

    The best score of all views is too high for what only one of them takes for an object. The mean, as weighted boxes
    fusion has it (Solovyev et al., 2021, Section 3), is nearer to how often such boxes are right.

    Args:
        boxes: N detections, each out of one of the views. A score that Soft-NMS has lowered is lowered by as much
            in the mean.
        seen: the detections of each view, in the same pixels.
        iou_threshold: the place of a box is what has at least this IoU with it.

    Returns:
        (N,) in [0, 1].
    """
    scores = _best_in_views(boxes, seen, lambda iou, view: (iou >= iou_threshold) * view.scores)
    return boxes.scores * scores.mean(dim=0) / scores.amax(dim=0)


def localization_scores(boxes: Instances, seen: Sequence[Instances]) -> Tensor:
    """How well views agree on boxes: the mean, over the other views, of the IoU with what these have in its place.

    That is the box of the same class that overlaps it most, or nothing, with an IoU of 0. What a detector sees of an
    object does not depend on flip and scale; where its boxes do, it is unsure of the place, whatever its score says.

    Args:
        boxes: N detections, each out of one of the views, or the mean of what they have there.
        seen: the detections of each view, at least two, in the same pixels.

    Returns:
        (N,) in [0, 1].
    """
    best = _best_in_views(boxes, seen, lambda iou, view: iou)
    # In its own view a box finds itself, with an IoU of 1; the mean of several leaves out what is nearest to it.
    return best.sort(dim=0).values[:-1].mean(dim=0)


def _best_in_views(
    boxes: Instances, seen: Sequence[Instances], value: Callable[[Tensor, Instances], Tensor]
) -> Tensor:
    """(V, N): for each box, the best value among the boxes of its class in each view; 0 where there is none.

    Args:
        value: of the IoU (N, M) with a view's M boxes, and these: (N, M), from 0 on.
    """
    best = torch.zeros(len(seen), len(boxes), device=boxes.scores.device)
    for of_view, view in zip(best, seen):
        if len(view):
            same_class = boxes.pred_classes[:, None] == view.pred_classes
            iou = pairwise_iou(boxes.pred_boxes, view.pred_boxes)
            of_view[:] = (value(iou, view) * same_class).amax(dim=1)
    return best


def views(cfg: CfgNode) -> list[tuple[int, bool]]:
    """All views of SELFTRAIN.TTA of an image: the scale's number, and whether it is mirrored."""
    keys = cfg.SELFTRAIN.TTA
    return list(itertools.product(range(len(keys.SCALES)), (False, True) if keys.FLIP else (False,)))
