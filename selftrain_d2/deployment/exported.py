"""Models as functions of one tensor, which traces follow at any batch and size.

detectron2's own inference goes image by image through Python lists, which a trace would fix to one batch. Here the same
steps work on whole batches. Letters in shapes: N images of H x W pixels, M candidates, D detections, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling.meta_arch import SemanticSegmentor
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from selftrain_d2.errors import InputError


def exportable(model: nn.Module, image_format: str) -> nn.Module:
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
    raise InputError(f"A {type(model).__name__} cannot be exported: RetinaNet, FCOS and segmentors can.")


class _OfImages(nn.Module):
    """What all have in common: input, normalization and padding."""

    def __init__(self, model: nn.Module, image_format: str):
        super().__init__()
        self.model = model
        self.flips_channels = image_format == "BGR"
        constraints = model.backbone.padding_constraints
        if constraints.get("square_size", 0):
            raise InputError(
                "A backbone that needs images of one square size cannot be exported at any size."
            )
        self.divisor = max(constraints.get("size_divisibility", model.backbone.size_divisibility), 1)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Of RGB images (N, 3, H, W), uint8."""
        x = images.flip(1) if self.flips_channels else images
        x = (x.float() - self.model.pixel_mean) / self.model.pixel_std
        bottom, right = -x.shape[2] % self.divisor, -x.shape[3] % self.divisor
        return self.model.backbone(F.pad(x, (0, right, 0, bottom)))


class Segmentation(_OfImages):
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


class DenseDetection(_OfImages):
    """RetinaNet's and FCOS's boxes."""

    outputs = ("boxes", "scores", "classes")

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
        found = [
            self._candidates(*level)
            for level in zip((a.tensor for a in model.anchor_generator(levels)), scores, predictions[1])
        ]
        boxes, scores, classes = (torch.cat(parts, dim=1) for parts in zip(*found))
        scores = torch.where(scores > score_threshold, scores, torch.zeros_like(scores))
        scores = suppressed(boxes, scores, classes, model.test_nms_thresh)
        best = at_most(scores.shape[1], model.max_detections_per_image)
        scores, index = scores.topk(best, dim=1)
        size = torch.stack([_scalar(images.shape[i], images.device) for i in (3, 2, 3, 2)]).float()
        boxes = torch.minimum(boxes.gather(1, index[:, :, None].expand(-1, -1, 4)).clamp(min=0), size)
        classes = torch.where(scores > 0, classes.gather(1, index), torch.full_like(index, -1))
        return boxes, scores, classes

    def _candidates(self, anchors: Tensor, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best of a level: boxes (N, M, 4), scores (N, M), classes (N, M)."""
        classes = self.model.num_classes
        flat = scores.flatten(1)
        scores, index = flat.topk(at_most(flat.shape[1], self.model.test_topk_candidates), dim=1)
        place = torch.div(index, classes, rounding_mode="floor")
        deltas = deltas.gather(1, place[:, :, None].expand(-1, -1, 4))
        boxes = self.model.box2box_transform.apply_deltas(deltas.reshape(-1, 4), anchors[place.reshape(-1)])
        return boxes.reshape(deltas.shape), scores, index - place * classes


def at_most(size: Any, limit: int) -> Any:
    """min(size, limit), also where a trace has the size as a tensor."""
    return size.clamp(max=limit) if isinstance(size, Tensor) else min(size, limit)


def suppressed(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """Scores (N, M), 0 where a box of the same image and class with a higher score overlaps.

    Args:
        boxes: (N, M, 4), XYXY.
        scores: (N, M); those of 0 take no part.
        classes: (N, M).
        iou_threshold: boxes overlap above it.
    """
    # Classes lie apart from each other, as in torchvision's batched_nms.
    apart = boxes + (classes * (boxes.max() - boxes.min() + 1))[:, :, None]
    if torch.onnx.is_in_onnx_export():
        kept = _OnnxNMS.apply(apart, scores, iou_threshold)
    else:
        kept = _nms_of_images(apart, scores, iou_threshold)
    image, box = kept.unbind(1)
    return torch.zeros_like(scores).index_put((image, box), scores[image, box])


@torch.jit.script
def _nms_of_images(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Pairs (image, box) that stay, (R, 2)."""
    kept = []
    for image in range(boxes.shape[0]):
        valid = (scores[image] > 0).nonzero()[:, 0]
        box = valid[nms(boxes[image][valid], scores[image][valid], iou_threshold)]
        kept.append(torch.stack([torch.full_like(box, image), box], dim=1))
    return torch.cat(kept)


class _OnnxNMS(torch.autograd.Function):
    """The same as ONNX's operator, which knows batches."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        return _nms_of_images(boxes, scores, iou_threshold)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou_threshold: float) -> Any:
        def constant(value: Any, dtype: torch.dtype) -> Any:
            return g.op("Constant", value_t=torch.tensor(value, dtype=dtype))

        found = g.op(
            "NonMaxSuppression",
            boxes,
            g.op("Unsqueeze", scores, constant([1], torch.int64)),  # one class
            constant([2**31 - 1], torch.int64),
            constant([iou_threshold], torch.float32),
            constant([0.0], torch.float32),
        )  # (R, 3): image, class, box
        return g.op("Gather", found, constant([0, 2], torch.int64), axis_i=1)


def _scalar(size: Any, device: torch.device) -> Tensor:
    return size.to(device) if isinstance(size, Tensor) else torch.tensor(size, device=device)
