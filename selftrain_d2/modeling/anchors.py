"""Which boxes a detector can be taught: those that its anchors, or FCOS's locations, are matched with.

Letters in shapes: N boxes, A anchors at each location of one level. Boxes and anchors are XYXY in pixels of the resized
image, whose first pixel is that of the padded square.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList
from torch import nn

_BOXES_AT_ONCE = 1 << 15  # a part's arrays stay in a core's cache


class AnchorLevel(NamedTuple):
    """One level's anchors: ``first`` (A, 4) at its first location, and the same every ``stride`` pixels."""

    stride: int
    first: np.ndarray


@dataclass(frozen=True)
class Anchors:
    """All anchors of a RetinaNet or of an R-CNN's RPN.

    Attributes:
        iou_threshold: of a RetinaNet the least IoU of a positive anchor (MODEL.RETINANET.IOU_THRESHOLDS, 0.5). Of an
            RPN the least of one that is not background (MODEL.RPN.IOU_THRESHOLDS, 0.3): its 0.7 for positive ones is
            out of reach of most boxes with detectron2's own anchors, one size an octave, and forced matches between
            ignored neighbours are its normal way.
        padded_size: side of the square that the model makes of a square image.
    """

    levels: Sequence[AnchorLevel]
    iou_threshold: float
    padded_size: Callable[[int], int] = int

    @property
    def rule(self) -> str:
        """What boxes that are not reached are without, for the middle of a sentence."""
        return f"an anchor of IoU {self.iou_threshold:g}"

    def scaled(self, factor: float) -> Anchors:
        """Anchors of so many times the size, at the same locations."""
        levels = []
        for stride, first in self.levels:
            centers = np.tile((first[:, 2:] + first[:, :2]) / 2, 2)
            levels.append(AnchorLevel(stride, centers + (first - centers) * factor))
        return replace(self, levels=levels)

    def reached(self, boxes: np.ndarray, image_size: int) -> np.ndarray:
        """Whether an anchor overlaps each box enough: (N,) bool.

        A box's best anchor is positive whatever its IoU, by force. That does not count: it is one anchor where a
        reached box has many, it is far from the box, and its neighbours, which look the same to the head, are taught
        that nothing is there.

        Args:
            boxes: (N, 4).
            image_size: side of the square training image.
        """
        return self.best_iou(boxes, image_size) >= self.iou_threshold

    def best_iou(self, boxes: np.ndarray, image_size: int) -> np.ndarray:
        """The highest IoU of each box with any anchor at any location: (N,) float32.

        No location is tried: between a box and one anchor shape, the overlap of each axis falls with the distance of
        their centres on that axis, so the location nearest to the box's centre is the best.
        """
        padded = self.padded_size(image_size)
        return _in_parts(boxes, lambda part: self._best_iou(part, padded))

    def _best_iou(self, boxes: np.ndarray, padded: int) -> np.ndarray:
        low, high = np.ascontiguousarray(boxes.T, dtype=np.float32).reshape(2, 2, -1)  # (axis, N)
        sizes, centers = high - low, (high + low) / 2
        area, best = sizes[0] * sizes[1], np.zeros(len(boxes), dtype=np.float32)
        for stride, first in self.levels:
            reach: dict[
                tuple[int, float], np.ndarray
            ] = {}  # by axis and centre, which a level's anchors share
            for anchor in first.astype(np.float32):
                anchor_size, overlap = anchor[2:] - anchor[:2], 1
                for axis in (0, 1):
                    center = (anchor[axis] + anchor[axis + 2]) / 2
                    if (axis, center) not in reach:
                        distance = np.abs(centers[axis] - _nearest(centers[axis], center, stride, padded))
                        reach[axis, center] = sizes[axis] / 2 - distance
                    length = np.minimum(reach[axis, center] + anchor_size[axis] / 2, anchor_size[axis])
                    overlap = overlap * np.minimum(length, sizes[axis]).clip(0)
                np.maximum(best, overlap / (area + anchor_size.prod() - overlap), out=best)
        return best


@dataclass(frozen=True)
class Locations:
    """The locations of detectron2's FCOS: a level takes boxes of its range of sizes, near their centres.

    Attributes:
        strides: of the levels, rising.
        offset: of the first location, in strides.
        radius: so many strides a location may be from a box's centre, on each axis.
        padded_size: as in :class:`Anchors`.
    """

    strides: Sequence[int]
    offset: float
    radius: float
    padded_size: Callable[[int], int] = int

    rule = "a location of a level that takes their size"

    def reached(self, boxes: np.ndarray, image_size: int) -> np.ndarray:
        """Whether each box has a location: (N,) bool; the arguments are those of :meth:`Anchors.reached`."""
        padded = self.padded_size(image_size)
        return _in_parts(boxes, lambda part: self._reached(part, padded))

    def _reached(self, boxes: np.ndarray, padded: int) -> np.ndarray:
        found = np.zeros(len(boxes), dtype=bool)
        low, high = np.ascontiguousarray(boxes.T, dtype=np.float32).reshape(2, 2, -1)  # (axis, N)
        steps = range(-math.ceil(self.radius), math.ceil(self.radius) + 1)
        for level, stride in enumerate(self.strides):
            # As FCOS._match_anchors: the farthest side is 4 to 8 strides away; at both ends there is no limit.
            least = 4 * stride if level else 0
            most = 8 * stride if level < len(self.strides) - 1 else math.inf
            farthest: list[list[np.ndarray]] = [
                [],
                [],
            ]  # of each axis and step (N,); infinite where it is too far off
            for axis in (0, 1):
                center = (low[axis] + high[axis]) / 2
                for step in steps:
                    place = _nearest(center, self.offset * stride, stride, padded, step)
                    before, behind = place - low[axis], high[axis] - place
                    inside = (np.minimum(before, behind) > 0) & (
                        np.abs(place - center) < self.radius * stride
                    )
                    farthest[axis].append(np.where(inside, np.maximum(before, behind), math.inf))
            for x, y in itertools.product(*farthest):
                size = np.maximum(x, y)
                found |= (size > least) & (size < most)
        return found


def matched_by(cfg: CfgNode, model: nn.Module) -> Anchors | Locations | None:
    """What boxes are matched with when a model is trained.

    Args:
        cfg: of the model; its anchor generator may be any that repeats its anchors at each stride.
        model: may be on the meta device.

    Returns:
        None where nothing is known: no detector of these kinds, rotated anchors, or irregular ones. (An RPN's
        BOUNDARY_THRESH, which detectron2 has off, is not looked at.)
    """
    if isinstance(model, FCOS):
        generator = model.anchor_generator
        return Locations(
            generator.strides, generator.offset, model.center_sampling_radius, _padded_size(model.backbone)
        )
    rpn = getattr(model, "proposal_generator", None)
    if isinstance(model, RetinaNet):
        threshold, features = _least_iou(model.anchor_matcher, {1}), model.head_in_features
    elif isinstance(rpn, RPN):
        threshold, features = _least_iou(rpn.anchor_matcher, {-1, 1}), rpn.in_features
    else:
        return None
    shapes = model.backbone.output_shape()
    levels = _levels(cfg, [shapes[name] for name in features])
    if levels is None:
        return None
    return Anchors(levels, threshold, _padded_size(model.backbone))


def _levels(cfg: CfgNode, shapes: Sequence) -> list[AnchorLevel] | None:
    generator = build_anchor_generator(cfg, shapes)
    levels = []
    for shape, anchors in zip(shapes, generator([torch.zeros(1, 1, 2, 2)] * len(shapes))):
        if type(anchors) is not Boxes:
            return None
        grid = anchors.tensor.double().numpy().reshape(2, 2, -1, 4)
        x, y = np.meshgrid([0, shape.stride], [0, shape.stride])
        shifts = np.stack([x, y, x, y], axis=-1)[:, :, None]
        if not np.allclose(grid, grid[0, 0] + shifts, atol=1e-3):
            return None
        levels.append(AnchorLevel(shape.stride, grid[0, 0]))
    return levels


def _least_iou(matcher: Matcher, labels: set[int]) -> float:
    """The least IoU that gives an anchor one of these labels (1: positive, -1: ignored, 0: background)."""
    return min(
        (low for low, label in zip(matcher.thresholds, matcher.labels) if label in labels), default=math.inf
    )


def _padded_size(backbone: Backbone) -> Callable[[int], int]:
    def padded_size(image_size: int) -> int:
        image = torch.empty(1, image_size, image_size, device="meta")
        return ImageList.from_tensors(
            [image], backbone.size_divisibility, padding_constraints=backbone.padding_constraints
        ).tensor.shape[-1]

    return padded_size


def _nearest(centers: np.ndarray, first: float, stride: int, padded: int, step: int = 0) -> np.ndarray:
    """The location of an axis that is nearest to each centre (N,), or ``step`` locations further."""
    last = -(-padded // stride) - 1
    return first + stride * (np.rint((centers - first) / stride) + step).clip(0, last)


def _in_parts(boxes: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    starts = range(0, max(len(boxes), 1), _BOXES_AT_ONCE)
    return np.concatenate([function(boxes[start : start + _BOXES_AT_ONCE]) for start in starts])
