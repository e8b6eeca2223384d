"""Dense detectors of detectron2 (RetinaNet, FCOS) over human and pseudo labels in one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor
from torch.nn import functional as F

from selftrain_d2.modeling.meta_arch.box_weights import have_weights, matched_weights
from selftrain_d2.modeling.meta_arch.by_source import (
    LABEL_SOURCES,
    LossesBySource,
    as_slice,
    by_source,
)
from selftrain_d2.modeling.meta_arch.classification import without_classification
from selftrain_d2.modeling.meta_arch.ignored_boxes import ignored_boxes
from selftrain_d2.modeling.meta_arch.soft_labels import scores_of, soft_focal_loss, soft_targets


class DenseLossesBySource(LossesBySource):
    """Mixed into a ``DenseDetector``, keeps losses apart by ``label_source`` in one forward pass.

    The whole batch goes through backbone and head at once, so batch norm sees the mixed batch as in the
    paper; then each source's predictions have losses of their own.

    Losses are divided by a number of positive anchors: detectron2's moving average, or 1 + the number of the step
    ([TF]), each kept for each source. Both count the whole step, over all processes and all accumulated
    batches: 2 processes of b images give the losses of 1 process of 2b. (detectron2 counts for each process.)

    detectron2's average starts at a guess (100, FCOS 300), which for a while makes the loss of a source with many
    positive anchors too large against that of one with few. So where there are pseudo labels the averages have no
    start value (bias-corrected); without pseudo labels they are detectron2's.

    Background anchors that an image's ``ignored_boxes`` cover are labeled -1, which the detector's ``losses`` must
    leave out of the class loss, as RetinaNet's does. Positive anchors stay, so no normalizer changes.

    Where instances have ``gt_weights``, all losses of a positive anchor are times the weight of its box; background has
    the weight 1. Weights are not normalized: the number of positive anchors, by which losses are divided, stays as it
    is. For that a class has :meth:`losses_of_positives` and ``class_loss_name``.

    Where instances have ``gt_scores`` (soft labels), the class loss of an anchor is :func:`soft_focal_loss` towards
    :func:`soft_targets`; its other losses are times the score of its box, and so is what it adds to the number of
    positive anchors. For that a class has :meth:`labels_of_each_box`.

    Attributes:
        class_loss_name: of the class loss, in what the detector's ``losses`` returns.
        normalize_by_batch: 1 + the number of the step, in place of the moving average.
        positive_anchor_averages: of each source seen so far, the decayed sum of its numbers of positive anchors, and of
            their weights; the average is the first over the second.
    """

    weighs_boxes = True
    takes_soft_labels = True
    class_loss_name = "loss_cls"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.normalize_by_batch = False
        self.positive_anchor_averages: dict[str, tuple[float, float]] = {}
        # Of the current step: positive anchors of each source if known in advance, and the normalizers in use.
        self._positives: dict[str, float] = {}
        self._normalizers: dict[str, float] = {}
        self._sources: dict[str, list[int]] = {}
        self._source = ""
        #: of each image of the current batch; None where there are none
        self._ignored: list[Boxes] | None = None
        #: (N, R), of the images of the current source; None where all anchors count fully
        self._anchor_weights: Tensor | None = None
        #: (N, R, C): what they learn of each class; and (N, R): how much that counts. None without soft labels
        self._soft_targets: tuple[Tensor, Tensor] | None = None

    def losses_by_source(self, batched_inputs: list[dict]) -> dict[str, dict[str, Tensor]]:
        """As in ``LossesBySource``, of one pass of ``DenseDetector.forward``: `forward_training` splits it."""
        self._sources = by_source(batched_inputs)
        self._ignored = ignored_boxes(batched_inputs, self.device)
        if self._passes is None:
            self._positives, self._normalizers = {}, {}
        return super(LossesBySource, self).forward(batched_inputs)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Sequence[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, dict[str, Tensor]]:
        """The detector's losses of each source."""
        losses = {}
        for source, index in self._sources.items():
            self._source = source
            images_of_source = as_slice(index)
            part = [[level[images_of_source] for level in prediction] for prediction in predictions]
            with get_event_storage().name_scope(source):
                losses[source] = super().forward_training(
                    images, features, part, [gt_instances[i] for i in index]
                )
        return losses

    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As the detector's, with the step's positive anchors counted, and without the background that is ignored."""
        labels, boxes = super().label_anchors(anchors, gt_instances)
        scores = self._weights(gt_instances, labels, boxes, "gt_scores")
        if self._source not in self._positives:
            self._positives[self._source] = _over_processes(self._count_positive(labels, scores))
        if scores is None:
            self._anchor_weights = self._weights(gt_instances, labels, boxes, "gt_weights")
            self._soft_targets = None
        else:
            self._anchor_weights = scores
            self._soft_targets = self._targets(anchors, gt_instances)
        if self._ignored is not None:
            every_anchor = Boxes.cat(anchors)
            for i, image in enumerate(self._sources[self._source]):
                left_out = self.covered(every_anchor, self._ignored[image]) & ~self._is_positive(labels[i])
                labels[i][left_out] = -1
                if self._soft_targets is not None:
                    self._soft_targets[1][i, left_out] = 0
        return labels, boxes

    def _targets(self, anchors: list[Boxes], gt_instances: list[Instances]) -> tuple[Tensor, Tensor]:
        found = [
            soft_targets(
                self.labels_of_each_box(anchors, x.gt_boxes), x.gt_classes, scores_of(x), self.num_classes
            )
            for x in gt_instances
        ]
        targets, weights = zip(*found)
        return torch.stack(targets), torch.stack(weights)

    def _weights(
        self, gt_instances: list[Instances], labels: list[Tensor], boxes: list[Tensor], field: str
    ) -> Tensor | None:
        """(N, R): the field of the boxes that positive anchors are matched with, else 1; None where no box has it."""
        if not have_weights(gt_instances, field):
            return None
        weights = torch.ones(len(labels), len(labels[0]), device=labels[0].device)
        for image, instances in enumerate(gt_instances):
            positive = self._is_positive(labels[image])
            weights[image, positive] = matched_weights(
                boxes[image][positive], labels[image][positive], instances, field
            )
        return weights

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        *more: list[Tensor],
    ) -> dict[str, Tensor]:
        """As the detector's; with weights of boxes, what it calculates, summed by them."""
        weights = self._anchor_weights
        if weights is None:
            return super().losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, *more)
        labels = torch.stack(gt_labels)
        valid, positive = labels >= 0, self._is_positive(labels)
        get_event_storage().put_scalar("num_pos_anchors", positive.sum().item() / len(labels))
        normalizer = self._ema_update("", 0.0, 0.0)  # which knows their number
        logits, focal_loss = torch.cat(pred_logits, dim=1), (self.focal_loss_alpha, self.focal_loss_gamma)
        if self._soft_targets is None:
            targets = F.one_hot(labels[valid], self.num_classes + 1)[:, :-1].to(logits.dtype)
            of_anchors = sigmoid_focal_loss(logits[valid], targets, *focal_loss).sum(dim=1)
            of_classes = weights[valid] * of_anchors
        else:
            targets, counts = self._soft_targets
            of_classes = counts * soft_focal_loss(logits, targets, *focal_loss).sum(dim=2)
        of_positives = self.losses_of_positives(
            Boxes.cat(anchors).tensor.expand(len(labels), -1, -1)[positive],
            torch.cat(pred_anchor_deltas, dim=1)[positive],
            torch.stack(gt_boxes)[positive],
            *(torch.cat(prediction, dim=1)[positive] for prediction in more),
        )
        return {
            self.class_loss_name: of_classes.sum() / normalizer,
            **{name: (weights[positive] * loss).sum() / normalizer for name, loss in of_positives.items()},
        }

    def losses_of_positives(
        self, anchors: Tensor, deltas: Tensor, boxes: Tensor, *more: Tensor
    ) -> dict[str, Tensor]:
        """The detector's losses, but that of the class, of P positive anchors, each (P,).

        Args:
            anchors, boxes: (P, 4) XYXY, pixels. deltas: (P, 4), predicted. more: (P, ...), further predictions.
        """
        raise NotImplementedError

    def labels_of_each_box(self, anchors: list[Boxes], boxes: Boxes) -> Tensor:
        """(M, R) int8: of each of M boxes alone, 1 for the anchors that predict it, -1 for those to ignore, else 0."""
        raise NotImplementedError

    def covered(self, anchors: Boxes, ignored: Boxes) -> Tensor:
        """(R,) bool: which of R anchors at least one of an image's ignored boxes covers."""
        return self.ignore_rule.covered(anchors, ignored)

    def _is_positive(self, labels: Tensor) -> Tensor:
        return (labels >= 0) & (labels != self.num_classes)

    def _count_positive(self, labels: list[Tensor], scores: Tensor | None) -> Tensor:
        """How many anchors are positive; of soft labels the sum of their scores (N, R)."""
        positive = [self._is_positive(x) for x in labels]
        if scores is None:
            return sum(x.sum() for x in positive)
        return sum(of_image[x].sum() for of_image, x in zip(scores, positive))

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        """What the detector divides its losses by. It calls this once a pass, with this process's count."""
        if self._source not in self._normalizers:
            positives = self._positives[self._source]
            if self.normalize_by_batch:
                self._normalizers[self._source] = positives + 1
            else:
                # A start value has the weight 1 that all weights sum up to; without one they sum up to less.
                start = (0.0, 0.0) if "pseudo" in self._sources else (initial_value, 1.0)
                total, weight = self.positive_anchor_averages.get(self._source, start)
                total = total * momentum + max(positives, 1) * (1 - momentum)
                weight = weight * momentum + (1 - momentum)
                self.positive_anchor_averages[self._source] = (total, weight)
                self._normalizers[self._source] = total / weight
        # Gradients are averaged over processes, and losses over the passes of a step.
        return self._normalizers[self._source] / comm.get_world_size() / self._number_of_passes

    @contextlib.contextmanager
    def one_step(self, batches: Sequence[list[dict]]) -> Iterator[None]:
        """As in ``LossesBySource``. Losses are divided by the positive anchors of all batches together, which
        are counted in advance."""
        self._normalizers = {}
        counts = torch.zeros(len(LABEL_SOURCES), device=self.device)
        for batch in map(without_classification, batches):
            anchors = self._anchors_of(batch)
            for number, source in enumerate(LABEL_SOURCES):
                instances = [
                    x["instances"].to(self.device) for x in batch if x.get("label_source", "human") == source
                ]
                labels, boxes = super().label_anchors(anchors, instances)
                scores = self._weights(instances, labels, boxes, "gt_scores")
                counts[number] += self._count_positive(labels, scores)
        self._positives = dict(zip(LABEL_SOURCES, _over_processes(counts)))
        self._number_of_passes = len(batches)
        try:
            with super().one_step(batches):
                yield
        finally:
            self._number_of_passes = 1

    #: forward passes of the current step
    _number_of_passes = 1

    def _anchors_of(self, batch: list[dict]) -> list[Boxes]:
        """The anchors that the detector will have for a batch: they depend on its padded size alone."""
        # Their shapes alone: no image is normalized for that.
        images = [torch.empty(x["image"].shape, device="meta") for x in batch]
        padded = ImageList.from_tensors(
            images, self.backbone.size_divisibility, padding_constraints=self.backbone.padding_constraints
        )
        height, width = padded.tensor.shape[-2:]
        shapes = self.backbone.output_shape()
        strides = [shapes[name].stride for name in self.head_in_features]
        features = [
            torch.empty(1, 1, -(-height // stride), -(-width // stride), device=self.device)
            for stride in strides
        ]
        return self.anchor_generator(features)


def _over_processes(counts: Tensor) -> list[float] | float:
    """Counts summed over all processes, as Python numbers."""
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(counts)
    return counts.tolist()
