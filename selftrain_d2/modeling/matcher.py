"""Which anchor predicts which box."""

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
