"""Faster and Mask R-CNN as functions of one tensor, on whole batches.

detectron2's path is ``GeneralizedRCNN.inference``: ``find_top_rpn_proposals``, ``fast_rcnn_inference`` and
``mask_rcnn_inference``. Letters in shapes: N images of H x W pixels, P proposals, D detections, K classes; C channels
and m x m cells of a pooled region.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes
from torch import Tensor, nn

from selftrain_d2.deployment.batched import (
    at_most,
    best_of_level,
    clipped,
    filled,
    suppressed,
    suppressed_in_rows,
    taken,
)
from selftrain_d2.deployment.image_function import ImageFunction
from selftrain_d2.errors import InputError


class RegionDetection(ImageFunction):
    """The boxes of Faster R-CNN, the boxes and masks of Mask R-CNN.

    Raises:
        InputError: a part that works in another way than detectron2's own, or keypoints.
    """

    def __init__(self, model: nn.Module, image_format: str):
        super().__init__(model, image_format)
        heads = model.roi_heads
        _check_kind("MODEL.PROPOSAL_GENERATOR.NAME", model.proposal_generator, RPN)
        _check_kind("MODEL.ROI_HEADS.NAME", heads, StandardROIHeads)
        _check_kind("The box predictor", heads.box_predictor, FastRCNNOutputLayers)
        if heads.mask_on:
            _check_kind("MODEL.ROI_MASK_HEAD.NAME", heads.mask_head, MaskRCNNConvUpsampleHead)
        if heads.keypoint_on:
            raise InputError("An R-CNN with keypoints (MODEL.KEYPOINT_ON) cannot be exported.")
        self.outputs = ("boxes", "scores", "classes", *(["masks"] if heads.mask_on else []))
        self.score_threshold = heads.box_predictor.test_score_thresh

    def forward(self, images: Tensor, score_threshold: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            images: (N, 3, H, W), uint8 RGB.
            score_threshold: (1,), in 0-1. Boxes of higher scores take part.

        Returns:
            boxes (N, D, 4), XYXY in pixels of the images; scores (N, D), descending; classes (N, D), int64; and of
            Mask R-CNN masks (N, D, m, m), probabilities in cells of the boxes. D is at most TEST.DETECTIONS_PER_IMAGE;
            what an image has less is filled with score 0, class -1 and masks of 0.
        """
        features = self.features(images)
        proposals, exist = self._proposals(features, images)
        boxes, scores = self._candidates(features, proposals)
        boxes = clipped(boxes, images)
        takes_part = (scores > score_threshold) & exist[:, :, None]
        scores = torch.where(takes_part, scores, torch.zeros_like(scores))
        predictor = self.model.roi_heads.box_predictor
        # Each class of each image is a row.
        rows = scores.transpose(1, 2)  # (N, K, P)
        kept = suppressed_in_rows(
            boxes.transpose(1, 2).flatten(0, 1), rows.flatten(0, 1), predictor.test_nms_thresh
        )
        scores = kept.reshape(rows.shape).transpose(1, 2).flatten(1)  # (N, P * K)
        best = at_most(scores.shape[1], predictor.test_topk_per_image)
        scores, index = scores.topk(best, dim=1)
        boxes, scores, classes = filled(
            taken(boxes.flatten(1, 2), index), scores, index % predictor.num_classes
        )
        if not self.model.roi_heads.mask_on:
            return boxes, scores, classes
        masks = self._masks(features, boxes, classes)
        return boxes, scores, classes, masks * (scores > 0)[:, :, None, None]

    def _proposals(self, features: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """Proposals (N, P, 4), and which of them exist, (N, P); the others are filling."""
        rpn = self.model.proposal_generator
        levels = [features[name] for name in rpn.in_features]
        found = []
        for level, (anchors, logits, deltas) in enumerate(
            zip(rpn.anchor_generator(levels), *rpn.rpn_head(levels))
        ):
            logits, deltas = permute_to_N_HWA_K(logits, 1), permute_to_N_HWA_K(deltas, 4)
            boxes, logits, zeros = best_of_level(
                anchors.tensor, logits, deltas, rpn.box2box_transform, rpn.pre_nms_topk[False]
            )
            found.append((boxes, logits, zeros + level))
        boxes, logits, level = (torch.cat(parts, dim=1) for parts in zip(*found))
        order = logits.argsort(1, descending=True)
        boxes, level = clipped(taken(boxes, order), images), level.gather(1, order)
        # Suppression wants scores above 0. Probabilities of large logits would be equal: so places, from the end.
        scores = torch.ones_like(logits).cumsum(1).flip(1)
        scores = scores * ((boxes[:, :, 2:] - boxes[:, :, :2]) > rpn.min_box_size).all(2)
        scores = suppressed(boxes, scores, level, rpn.nms_thresh)
        scores, index = scores.topk(at_most(scores.shape[1], rpn.post_nms_topk[False]), dim=1)
        return taken(boxes, index), scores > 0

    def _candidates(self, features: dict[str, Tensor], proposals: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (N, P, K, 4) and scores (N, P, K) of proposals (N, P, 4)."""
        heads = self.model.roi_heads
        predictor = heads.box_predictor
        regions = pooled(heads.box_pooler, [features[name] for name in heads.box_in_features], proposals)
        logits, deltas = predictor(heads.box_head(regions))
        scores = logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(1)
        boxes = predictor.box2box_transform.apply_deltas(deltas, proposals.reshape(-1, 4))
        images, number = proposals.shape[:2]
        boxes = boxes.reshape(images, number, -1, 4)  # one for all classes, or one for each
        scores = scores[:, : predictor.num_classes].reshape(images, number, predictor.num_classes)
        return boxes.expand(-1, -1, predictor.num_classes, -1), scores

    def _masks(self, features: dict[str, Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        """Probabilities (N, D, m, m) of detections (N, D)."""
        heads = self.model.roi_heads
        regions = pooled(heads.mask_pooler, [features[name] for name in heads.mask_in_features], boxes)
        logits = heads.mask_head.layers(regions)  # (N * D, K or 1, m, m)
        if logits.shape[1] > 1:
            of_class = classes.reshape(-1, 1, 1, 1).clamp(min=0)
            logits = logits.gather(1, of_class.expand(-1, 1, logits.shape[2], logits.shape[3]))
        images, number = classes.shape
        return logits.sigmoid().reshape(images, number, logits.shape[2], logits.shape[3])


def pooled(pooler: ROIPooler, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """The pooler's regions, (N * P, C, m, m), of boxes (N, P, 4) in images with these features."""
    images, number = boxes.shape[:2]
    flat = boxes.reshape(-1, 4)
    image = torch.ones_like(boxes[:, :, :1]).cumsum(0).reshape(-1, 1) - 1
    regions = torch.cat([image, flat], dim=1)
    if len(pooler.level_poolers) == 1:
        return pooler.level_poolers[0](features[0], regions)
    levels = assign_boxes_to_levels(
        [Boxes(flat)], pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
    )
    output = flat.new_zeros(images * number, features[0].shape[1], *pooler.output_size)
    for level, (pool, feature) in enumerate(zip(pooler.level_poolers, features)):
        index = (levels == level).nonzero()[:, 0]
        output = output.index_put((index,), pool(feature, regions[index]))
    return output


def _check_kind(what: str, part: nn.Module, known: type[nn.Module]) -> None:
    if type(part) is not known:  # subclasses may work in another way
        raise InputError(f"{what} {type(part).__name__} cannot be exported: only {known.__name__} can.")
