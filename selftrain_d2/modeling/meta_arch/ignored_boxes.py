"""Boxes that are neither objects nor background: what they cover is not learned as background.

Letters in shapes: N anchors or proposals, M ignored boxes of an image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou
from torch import Tensor, nn

from selftrain_d2.errors import InputError

#: SELFTRAIN.IGNORE_OVERLAP -> overlaps (M, N) of ignored boxes with others. "covered" is the share of the other box's
#: area, by which COCO compares detections with crowd regions.
OVERLAPS: dict[str, Callable[[Boxes, Boxes], Tensor]] = {"covered": pairwise_ioa, "iou": pairwise_iou}


@dataclass(frozen=True)
class OverlapRule:
    """When an ignored box covers another box.

    Attributes:
        overlap: a key of OVERLAPS.
        threshold: the overlap from which on it does, in (0, 1].
    """

    overlap: str = "covered"
    threshold: float = 0.5

    @classmethod
    def from_config(cls, cfg: CfgNode) -> OverlapRule:
        """What SELFTRAIN.IGNORE_OVERLAP and IGNORE_OVERLAP_THRESH say; the defaults for a config without SELFTRAIN."""
        if "SELFTRAIN" not in cfg:
            return cls()
        return cls(cfg.SELFTRAIN.IGNORE_OVERLAP, cfg.SELFTRAIN.IGNORE_OVERLAP_THRESH)

    def covered(self, boxes: Boxes, ignored: Boxes) -> Tensor:
        """(N,) bool: which of N boxes at least one of M ignored ones covers."""
        return (OVERLAPS[self.overlap](ignored, boxes) >= self.threshold).any(dim=0)


def ignored_boxes(samples: Sequence[dict], device: torch.device) -> list[Boxes] | None:
    """``ignored_boxes`` of each image, on a device; None where no image has any."""
    if not any(len(sample.get("ignored_boxes", ())) for sample in samples):
        return None
    none = Boxes(torch.zeros(0, 4))
    return [sample.get("ignored_boxes", none).to(device) for sample in samples]


@contextlib.contextmanager
def never_background(model: nn.Module, samples: Sequence[dict], rule: OverlapRule) -> Iterator[None]:
    """Inside, an R-CNN samples no anchor and no proposal as background that an ignored box of its image covers.

    Its RPN and heads stay as they are; the methods that label and sample get a step before or after their own. Those
    matched to an object are sampled as ever, and others in place of what is not.

    Args:
        model: with detectron2's RPN and ROIHeads, or subclasses.
        samples: of the forward pass that is made inside.
        rule: when a box is covered.

    Raises:
        InputError: ``ignored_boxes`` were asked for, but the model labels boxes in another way.
    """
    asked = any("ignored_boxes" in sample for sample in samples)
    if asked and not all(
        hasattr(getattr(model, part, None), method)
        for part, methods in LABELING_METHODS.items()
        for method in methods
    ):
        raise InputError(
            f"{type(model).__name__} does not label boxes as detectron2's RPN and ROIHeads do: {_ADVICE}"
        )
    ignored = ignored_boxes(samples, model.device)
    if ignored is None:
        yield
        return
    rpn, heads = model.proposal_generator, model.roi_heads
    anchors: list[Tensor] = []  # which are covered, of the images that are still to be sampled from
    proposals: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for part, methods in (
            (rpn, _anchor_methods(rpn, ignored, rule, anchors)),
            (heads, _proposal_methods(heads, ignored, rule, proposals)),
        ):
            for name, method in methods.items():
                stack.enter_context(replaced(part, name, method))
        yield
    if anchors or proposals:
        raise InputError(
            f"{type(model).__name__} does not sample boxes as detectron2's RPN and ROIHeads do: {_ADVICE}"
        )


#: Of detectron2: they label all images of a batch, and then sample from each.
LABELING_METHODS = {
    "proposal_generator": ("label_and_sample_anchors", "_subsample_labels"),
    "roi_heads": ("label_and_sample_proposals", "_sample_proposals"),
}
_ADVICE = "it cannot ignore any; set SELFTRAIN.IGNORE_SCORE_THRESH to 0 and SELFTRAIN.IGNORE_CROWD to False."


def _anchor_methods(
    rpn: nn.Module, ignored: Sequence[Boxes], rule: OverlapRule, waiting: list[Tensor]
) -> dict[str, Callable]:
    label, subsample = rpn.label_and_sample_anchors, rpn._subsample_labels

    def label_and_sample_anchors(anchors: list[Boxes], gt_instances: list[Instances]):
        every_anchor = Boxes.cat(anchors)
        waiting.extend(rule.covered(every_anchor, boxes) for boxes in ignored)
        return label(anchors, gt_instances)

    def _subsample_labels(labels: Tensor) -> Tensor:
        labels[waiting.pop(0) & (labels == 0)] = -1
        return subsample(labels)

    return {"label_and_sample_anchors": label_and_sample_anchors, "_subsample_labels": _subsample_labels}


def _proposal_methods(
    heads: nn.Module, ignored: Sequence[Boxes], rule: OverlapRule, waiting: list[Tensor]
) -> dict[str, Callable]:
    label, sample = heads.label_and_sample_proposals, heads._sample_proposals

    def label_and_sample_proposals(proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        waiting.extend(rule.covered(p.proposal_boxes, boxes) for p, boxes in zip(proposals, ignored))
        return label(proposals, targets)

    def _sample_proposals(matched_idxs: Tensor, matched_labels: Tensor, gt_classes: Tensor):
        # Images without objects have all proposals sampled as background, whatever their labels: they are taken out.
        covered = waiting.pop(0)
        allowed = torch.ones_like(matched_labels, dtype=torch.bool)
        # The boxes of the objects, if the heads add them to the proposals, come after these.
        allowed[: len(covered)] = ~(covered & (matched_labels[: len(covered)] == 0))
        allowed = allowed.nonzero().squeeze(1)
        sampled, classes = sample(matched_idxs[allowed], matched_labels[allowed], gt_classes)
        return allowed[sampled], classes

    methods = {
        "label_and_sample_proposals": label_and_sample_proposals,
        "_sample_proposals": _sample_proposals,
    }
    if hasattr(
        heads, "_match_and_label_boxes"
    ):  # later stages of a cascade label all boxes of the one before
        match_and_label = heads._match_and_label_boxes

        def _match_and_label_boxes(proposals: list[Instances], stage: int, targets: list[Instances]):
            labeled = match_and_label(proposals, stage, targets)
            return [
                p[~((p.gt_classes == heads.num_classes) & rule.covered(p.proposal_boxes, boxes))]
                for p, boxes in zip(labeled, ignored)
            ]

        methods["_match_and_label_boxes"] = _match_and_label_boxes
    return methods


@contextlib.contextmanager
def replaced(module: nn.Module, name: str, method: Callable) -> Iterator[None]:
    """A method of one module replaced for a while."""
    before = vars(module).get(name)  # None: the class's, which the attribute set here hides
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name) if before is None else setattr(module, name, before)
