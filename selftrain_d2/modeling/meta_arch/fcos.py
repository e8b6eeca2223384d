"""FCOS that keeps the losses of human and pseudo labels apart."""

from __future__ import annotations

import torch
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes, pairwise_point_box_distance
from fvcore.nn import giou_loss
from torch import Tensor
from torch.nn import functional as F

from selftrain_d2.modeling.meta_arch.dense import DenseLossesBySource


class SelfTrainingFCOS(DenseLossesBySource, FCOS):
    """detectron2's FCOS; see :class:`DenseLossesBySource`.

    Like FCOS it is built from explicit arguments (LazyConfig), not from a config's META_ARCHITECTURE.

    An ignored box covers a location that lies inside it, whatever ``ignore_rule``: FCOS compares points with boxes,
    and the side of an "anchor", its level's stride, says nothing of the size of what is found there.
    """

    class_loss_name = "loss_fcos_cls"

    def covered(self, anchors: Boxes, ignored: Boxes) -> Tensor:
        distances = pairwise_point_box_distance(
            anchors.get_centers(), ignored
        )  # (R, M, 4): to the four sides
        return (distances > 0).all(dim=2).any(dim=1)

    def labels_of_each_box(self, anchors: list[Boxes], boxes: Boxes) -> Tensor:
        """As in ``DenseLossesBySource``: by FCOS's own rule, from which small boxes have their right of way."""
        return (self._match_anchors(boxes, anchors) > 1e-5).to(torch.int8)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        *predictions_and_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """As ``FCOS.losses``, which knows no labels of -1: there, these have no class loss."""
        if self._ignored is not None:
            ignored = torch.stack(gt_labels) < 0
            of_levels = ignored.unsqueeze(2).split([len(level) for level in anchors], dim=1)
            # As background with such a logit they have a focal loss of 0, and no gradient.
            pred_logits = [x.masked_fill(part, -1e4) for x, part in zip(pred_logits, of_levels)]
            gt_labels = [labels.masked_fill(labels < 0, self.num_classes) for labels in gt_labels]
        return super().losses(anchors, pred_logits, gt_labels, *predictions_and_boxes)

    def losses_of_positives(
        self, anchors: Tensor, deltas: Tensor, boxes: Tensor, *more: Tensor
    ) -> dict[str, Tensor]:
        """As in ``DenseLossesBySource``; ``more`` is the centerness (P, 1)."""
        targets = self.compute_ctrness_targets([Boxes(anchors)], [boxes])[0]
        return {
            "loss_fcos_loc": giou_loss(self.box2box_transform.apply_deltas(deltas, anchors), boxes),
            "loss_fcos_ctr": F.binary_cross_entropy_with_logits(
                more[0].squeeze(1), targets, reduction="none"
            ),
        }
