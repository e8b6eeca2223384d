"""Which anchor predicts which box.

Letters in shapes: M boxes of an image, R anchors.
"""

from __future__ import annotations

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor


class BestAnchorMatcher(Matcher):
    """Every box gets the anchor that overlaps it most, whatever their IoU ([TF]).

    ``Matcher(allow_low_quality_matches=True)`` makes that anchor positive too, but lets it predict the box
    that it overlaps most, which may be another; and it does so for all anchors of equal IoU, here for the first.
    An anchor that is the best of several boxes predicts the first of them.
    """

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            match_quality_matrix: IoU (M, N) of M boxes and N anchors.

        Returns:
            for each anchor the index of its box (N,), int64, and its label (N,), int8: one of ``labels``.
        """
        matches, labels = super().__call__(match_quality_matrix)
        if match_quality_matrix.numel() == 0:
            return matches, labels
        overlap, best_anchors = match_quality_matrix.max(dim=1)
        boxes = torch.nonzero(overlap > 0).squeeze(1)  # a box that meets no anchor has no best one
        best_anchors = best_anchors[boxes]
        matches.scatter_reduce_(0, best_anchors, boxes, "amin", include_self=False)
        labels[best_anchors] = 1
        return matches, labels


def labels_of_each_box(matcher: Matcher, overlap: Tensor) -> Tensor:
    """Which anchors each box would have if it were the only one of its image.

    Args:
        matcher: detectron2's or :class:`BestAnchorMatcher`.
        overlap: IoU (M, R).

    Returns:
        (M, R) int8, in each row what the matcher gives for that row alone.
    """
    labels = torch.zeros_like(overlap, dtype=torch.int8)
    for low, high, label in zip(matcher.thresholds[:-1], matcher.thresholds[1:], matcher.labels):
        labels[(overlap >= low) & (overlap < high)] = label
    if not overlap.numel():
        return labels
    if isinstance(matcher, BestAnchorMatcher):
        most, best_anchors = overlap.max(dim=1)
        boxes = torch.nonzero(most > 0).squeeze(1)
        labels[boxes, best_anchors[boxes]] = 1
    elif matcher.allow_low_quality_matches:
        labels[overlap == overlap.amax(dim=1, keepdim=True)] = 1
    return labels
