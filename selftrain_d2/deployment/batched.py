"""Steps of detection on whole batches, which traces follow at any batch and size.

Letters in shapes: N images of H x W pixels, R places, M candidates, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms


def at_most(size: Any, limit: int) -> Any:
    """min(size, limit), also where a trace has the size as a tensor."""
    return size.clamp(max=limit) if isinstance(size, Tensor) else min(size, limit)


def clipped(boxes: Tensor, images: Tensor) -> Tensor:
    """Boxes (..., 4), XYXY, cut at the border of images (N, 3, H, W)."""
    size = torch.stack([_scalar(images.shape[i], images.device) for i in (3, 2, 3, 2)]).float()
    return torch.minimum(boxes.clamp(min=0), size)


def taken(boxes: Tensor, index: Tensor) -> Tensor:
    """Of each image the boxes that are named.

    Args:
        boxes: (N, M, 4).
        index: (N, D), in 0-M.

    Returns:
        (N, D, 4)
    """
    return boxes.gather(1, index[:, :, None].expand(-1, -1, 4))


def best_of_level(
    anchors: Tensor, scores: Tensor, deltas: Tensor, transform: Any, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best candidates of a level of a pyramid, in each image.

    Args:
        anchors: (R, 4), XYXY.
        scores: (N, R, K); of any kind, larger is better.
        deltas: (N, R, 4).
        transform: has ``apply_deltas(deltas, anchors)``.
        limit: M is at most this.

    Returns:
        boxes (N, M, 4), scores (N, M), classes (N, M)
    """
    classes = scores.shape[2]
    flat = scores.flatten(1)
    scores, index = flat.topk(at_most(flat.shape[1], limit), dim=1)
    place = torch.div(index, classes, rounding_mode="floor")
    deltas = taken(deltas, place)
    boxes = transform.apply_deltas(deltas.reshape(-1, 4), anchors[place.reshape(-1)])
    return boxes.reshape(deltas.shape), scores, index - place * classes


def filled(boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Detections (N, D, 4), (N, D), (N, D), best first, with filling of score 0 and class -1 behind them.

    Filling takes the place of those of score 0, and of boxes without area: what lies outside of its image altogether,
    which detectron2 drops in ``detector_postprocess``.
    """
    has_area = (boxes[:, :, 2:] > boxes[:, :, :2]).all(2)
    scores, order = torch.where(has_area, scores, torch.zeros_like(scores)).sort(1, descending=True)
    classes = torch.where(scores > 0, classes.gather(1, order), torch.full_like(order, -1))
    return taken(boxes, order), scores, classes


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
    return suppressed_in_rows(apart, scores, iou_threshold)


def suppressed_in_rows(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """:func:`suppressed` within each row, whatever the N rows are."""
    if torch.onnx.is_in_onnx_export():
        kept = _OnnxNMS.apply(boxes, scores, iou_threshold)
    else:
        kept = _nms_of_rows(boxes, scores, iou_threshold)
    row, box = kept.unbind(1)
    return torch.zeros_like(scores).index_put((row, box), scores[row, box])


@torch.jit.script
def _nms_of_rows(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Pairs (row, box) that stay, (R, 2)."""
    kept = []
    for row in range(boxes.shape[0]):
        valid = (scores[row] > 0).nonzero()[:, 0]
        box = valid[nms(boxes[row][valid], scores[row][valid], iou_threshold)]
        kept.append(torch.stack([torch.full_like(box, row), box], dim=1))
    return torch.cat(kept)


class _OnnxNMS(torch.autograd.Function):
    """The same as ONNX's operator, which knows batches."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        return _nms_of_rows(boxes, scores, iou_threshold)

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
        )  # (R, 3): row, class, box
        return g.op("Gather", found, constant([0, 2], torch.int64), axis_i=1)


def _scalar(size: Any, device: torch.device) -> Tensor:
    return size.to(device) if isinstance(size, Tensor) else torch.tensor(size, device=device)
