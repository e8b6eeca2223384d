"""Models as functions of one tensor, which traces follow at any batch and size.

detectron2's own inference goes image by image through Python lists, which a trace would fix to one batch. Here the same
steps work on whole batches. Letters in shapes: N images of H x W pixels, D detections.
"""

from __future__ import annotations

import torch
from detectron2.modeling.meta_arch import GeneralizedRCNN, PanopticFPN, SemanticSegmentor
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import Tensor, nn

from selftrain_d2.deployment.batched import at_most, best_of_level, clipped, filled, suppressed, taken
from selftrain_d2.deployment.image_function import ImageFunction
from selftrain_d2.deployment.region_detection import RegionDetection
from selftrain_d2.errors import InputError


def exportable(model: nn.Module, image_format: str) -> ImageFunction:
    """The function of images to export.

    Args:
        model: with its weights; it is in evaluation mode afterwards.
        image_format: INPUT.FORMAT, RGB or BGR.

    Raises:
        InputError: a model of another kind.
    """
    if image_format not in ("RGB", "BGR"):
        raise InputError(f"A model of INPUT.FORMAT {image_format} cannot be exported: only RGB and BGR can.")
    if isinstance(model, (RetinaNet, FCOS)):
        if getattr(model, "soft_nms_sigma", 0):
            raise InputError("Soft-NMS cannot be exported: set MODEL.RETINANET.SOFT_NMS_SIGMA 0.")
        return DenseDetection(model, image_format).eval()
    if isinstance(model, SemanticSegmentor):
        return Segmentation(model, image_format).eval()
    if isinstance(model, GeneralizedRCNN) and not isinstance(model, PanopticFPN):
        return RegionDetection(model, image_format).eval()
    raise InputError(
        f"A {type(model).__name__} cannot be exported: RetinaNet, FCOS, Faster and Mask R-CNN and segmentors can."
    )


class Segmentation(ImageFunction):
    """A segmentor's classes of pixels."""

    outputs = ("classes", "scores")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: (N, 3, H, W), uint8 RGB.

        Returns:
            classes (N, H, W), int64, and their probabilities (N, H, W).
        """
        logits, _ = self.model.sem_seg_head(self.features(images))
        scores, classes = logits[:, :, : images.shape[2], : images.shape[3]].softmax(1).max(1)
        return classes, scores


class DenseDetection(ImageFunction):
    """RetinaNet's and FCOS's boxes."""

    outputs = ("boxes", "scores", "classes")

    def __init__(self, model: nn.Module, image_format: str):
        super().__init__(model, image_format)
        self.score_threshold = model.test_score_thresh

    def forward(self, images: Tensor, score_threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: (N, 3, H, W), uint8 RGB.
            score_threshold: (1,), in 0-1. Boxes of higher scores take part.

        Returns:
            boxes (N, D, 4), XYXY in pixels of the images; scores (N, D), descending; classes (N, D), int64. D is at
            most TEST.DETECTIONS_PER_IMAGE; what an image has less is filled with score 0 and class -1.
        """
        model = self.model
        features = self.features(images)
        levels = [features[name] for name in model.head_in_features]
        predictions = model._transpose_dense_predictions(
            model.head(levels),
            [model.num_classes, 4, 1] if isinstance(model, FCOS) else [model.num_classes, 4],
        )
        scores = [logits.sigmoid() for logits in predictions[0]]
        if isinstance(model, FCOS):
            scores = [torch.sqrt(s * centre.sigmoid()) for s, centre in zip(scores, predictions[2])]
        anchors = (a.tensor for a in model.anchor_generator(levels))
        found = [
            best_of_level(*level, model.box2box_transform, model.test_topk_candidates)
            for level in zip(anchors, scores, predictions[1])
        ]
        boxes, scores, classes = (torch.cat(parts, dim=1) for parts in zip(*found))
        scores = torch.where(scores > score_threshold, scores, torch.zeros_like(scores))
        scores = suppressed(boxes, scores, classes, model.test_nms_thresh)
        best = at_most(scores.shape[1], model.max_detections_per_image)
        scores, index = scores.topk(best, dim=1)
        return filled(clipped(taken(boxes, index), images), scores, classes.gather(1, index))
