"""Soft-NMS: overlapping boxes lose score instead of being removed."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor


def soft_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, *, sigma: float, score_thresh: float, max_detections: int
) -> tuple[Tensor, Tensor]:
    """Gaussian Soft-NMS within each class (Bodla et al., arXiv:1704.04503).

    The box of the highest score is kept, and the score s of each other box of its class becomes
    s * exp(-IoU^2 / sigma); then the highest of the rest, and so on. TensorFlow's Soft-NMS has 2 sigma
    where this has sigma.

    Each step takes the best box of all classes and handles all others at once: the number of steps is that
    of the boxes kept.

    Args:
        boxes: (N, 4), XYXY.
        scores: (N,), in 0-1.
        classes: (N,), integers.
        sigma: > 0; the smaller, the nearer to plain NMS at a low threshold.
        score_thresh: boxes whose score falls to this or below are dropped.
        max_detections: the most boxes kept, over all classes.

    Returns:
        indices (K,) of the kept boxes and their new scores (K,), descending.
    """
    boxes, scores = Boxes(boxes.float()), scores.float().clone()
    kept, kept_scores = [scores.new_empty(0, dtype=torch.long)], [scores.new_empty(0)]
    for _ in range(min(max_detections, len(scores))):
        best = scores.argmax(keepdim=True)  # of shape (1,): indexing with it does not wait for the GPU
        kept.append(best)
        kept_scores.append(scores[best])
        overlaps = pairwise_iou(boxes[best], boxes)[0]
        decay = torch.exp(-(overlaps**2) / sigma)
        scores = torch.where(classes == classes[best], scores * decay, scores)
        scores[best] = -1.0  # taken
    kept, kept_scores = torch.cat(kept), torch.cat(kept_scores)
    above = kept_scores > score_thresh
    return kept[above], kept_scores[above]
