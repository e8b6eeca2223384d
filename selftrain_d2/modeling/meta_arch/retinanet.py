"""RetinaNet that keeps the losses of human and pseudo labels apart, and can be the paper's."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.matcher import BestAnchorMatcher, labels_of_each_box
from selftrain_d2.modeling.meta_arch.dense import DenseLossesBySource
from selftrain_d2.modeling.meta_arch.ignored_boxes import OverlapRule
from selftrain_d2.modeling.meta_arch.retinanet_head import (
    build_head,
    make_separable,
    set_head_activation,
    set_head_norms,
)
from selftrain_d2.modeling.soft_nms import soft_nms

#: MODEL.RETINANET.BBOX_REG_LOSS_TYPE, but smooth_l1 -> losses (P,) of predicted and true boxes.
IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


@META_ARCH_REGISTRY.register()
class SelfTrainingRetinaNet(DenseLossesBySource, RetinaNet):
    """detectron2's RetinaNet over a batch of human-labeled and pseudo-labeled images.

    With the default config keys, inference and training on a batch without pseudo labels are those of
    RetinaNet (in one process); configs/Base-RetinaNet-EfficientNet-FPN.yaml sets them to the paper's.
    """

    @configurable
    def __init__(
        self,
        *,
        normalize_by_batch: bool = False,
        box_reg_loss_weight: float = 1.0,
        soft_nms_sigma: float = 0.0,
        ignore_rule: OverlapRule | None = None,
        **kwargs,
    ):
        """
        Args:
            normalize_by_batch: divide losses by 1 + the positive anchors of the step, in place of RetinaNet's
                moving average.
            box_reg_loss_weight: factor of the box loss.
            soft_nms_sigma: of :func:`soft_nms`; 0 for NMS.
            ignore_rule: when an ignored box covers an anchor; None for the default rule.
            kwargs: as for ``RetinaNet``.

        Raises:
            InputError: a negative sigma.
        """
        super().__init__(**kwargs)
        if soft_nms_sigma < 0:
            raise InputError(f"MODEL.RETINANET.SOFT_NMS_SIGMA must be >= 0, not {soft_nms_sigma}.")
        self.normalize_by_batch = normalize_by_batch
        self.box_reg_loss_weight = box_reg_loss_weight
        self.soft_nms_sigma = soft_nms_sigma
        self.ignore_rule = ignore_rule or OverlapRule()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        keys = cfg.MODEL.RETINANET
        if keys.LOSS_NORMALIZER not in ("moving_average", "batch"):
            raise InputError(
                f"Unknown MODEL.RETINANET.LOSS_NORMALIZER {keys.LOSS_NORMALIZER!r}: use moving_average or batch."
            )
        args = super().from_config(cfg)
        if keys.CONV_DIM:
            shapes = args["backbone"].output_shape()
            args["head"] = build_head(cfg, [shapes[name] for name in keys.IN_FEATURES])
        if keys.SEPARABLE:
            make_separable(args["head"])
        set_head_activation(args["head"], keys.ACTIVATION)
        set_head_norms(args["head"], cfg)
        if keys.FORCE_BEST_ANCHOR:
            args["anchor_matcher"] = BestAnchorMatcher(keys.IOU_THRESHOLDS, keys.IOU_LABELS)
        return {
            **args,
            "normalize_by_batch": keys.LOSS_NORMALIZER == "batch",
            "box_reg_loss_weight": keys.BBOX_REG_LOSS_WEIGHT,
            "soft_nms_sigma": keys.SOFT_NMS_SIGMA,
            "ignore_rule": OverlapRule.from_config(cfg),
        }

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """As ``RetinaNet.losses``, whose docstring has the shapes, with the weight asked for."""
        # TorchScript recompiles a function after its first calls, which changes its rounding: on a CPU, where
        # that gains nothing, a resumed run would not equal an undisturbed one bit for bit.
        with torch.jit.optimized_execution(pred_logits[0].is_cuda):
            losses = super().losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        losses["loss_box_reg"] = losses["loss_box_reg"] * self.box_reg_loss_weight
        return losses

    def losses_of_positives(
        self, anchors: Tensor, deltas: Tensor, boxes: Tensor, *more: Tensor
    ) -> dict[str, Tensor]:
        """As in ``DenseLossesBySource``."""
        if self.box_reg_loss_type == "smooth_l1":
            targets = self.box2box_transform.get_deltas(anchors, boxes)
            return {"loss_box_reg": smooth_l1_loss(deltas, targets, self.smooth_l1_beta).sum(dim=1)}
        predicted = self.box2box_transform.apply_deltas(deltas, anchors)
        return {"loss_box_reg": IOU_LOSSES[self.box_reg_loss_type](predicted, boxes)}

    def labels_of_each_box(self, anchors: list[Boxes], boxes: Boxes) -> Tensor:
        """As in ``DenseLossesBySource``."""
        return labels_of_each_box(self.anchor_matcher, pairwise_iou(boxes, Boxes.cat(anchors)))

    def inference_single_image(
        self,
        anchors: list[Boxes],
        box_cls: list[Tensor],
        box_delta: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """As ``RetinaNet.inference_single_image``, with Soft-NMS where a sigma is given."""
        if not self.soft_nms_sigma:
            return super().inference_single_image(anchors, box_cls, box_delta, image_size)
        candidates = self._decode_multi_level_predictions(
            anchors, box_cls, box_delta, self.test_score_thresh, self.test_topk_candidates, image_size
        )
        keep, scores = soft_nms(
            candidates.pred_boxes.tensor,
            candidates.scores,
            candidates.pred_classes,
            sigma=self.soft_nms_sigma,
            score_thresh=self.test_score_thresh,
            max_detections=self.max_detections_per_image,
        )
        detections = candidates[keep]
        detections.scores = scores
        return detections
