"""A classifier on a detector's backbone, for joint training (paper, Table 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from detectron2.modeling import Backbone
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone.bottom_up import bottom_up_of, coarsest_feature
from selftrain_d2.modeling.backbone.norm import running_statistics_kept

#: ``label_source`` of an image with a class, and nothing else.
CLASSIFICATION = "classification"
#: Name of its loss among those of a step.
CLASSIFICATION_LOSS = "loss_classification"
#: Attribute of a detector, hence prefix of the head's weights in checkpoints.
CLASSIFICATION_HEAD = "classification_head"
#: (K, C), for K classes.
CLASSIFICATION_WEIGHT = f"{CLASSIFICATION_HEAD}.predictor.weight"


class ClassificationHead(nn.Module):
    """The mean of a feature map over its pixels, and a linear classifier, as ImageNet models have.

    Args:
        in_channels: C, of the feature map.
        num_classes: K.
        loss_weight: w of ``L_detection + w * L_classification``, >= 0. The paper has 0.5 without and 0.2 with
            self-training.
    """

    def __init__(self, in_channels: int, num_classes: int, loss_weight: float):
        super().__init__()
        if not (math.isfinite(loss_weight) and loss_weight >= 0):
            raise InputError(
                f"SELFTRAIN.CLASSIFICATION_LOSS_WEIGHT must be a number >= 0, not {loss_weight}."
            )
        self.loss_weight = loss_weight
        self.predictor = nn.Linear(in_channels, num_classes)
        # As detectron2's ResNet: all classes start about equally probable (Goyal et al., arXiv:1706.02677, 5.1).
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        return self.predictor(features.float().mean((2, 3)))

    def losses(self, features: Tensor, class_ids: Tensor) -> dict[str, Tensor]:
        """The weighted cross entropy, averaged over the images; their accuracy goes to the log.

        Args:
            features: (N, C, H, W).
            class_ids: (N,) int64, in [0, K).
        """
        logits = self(features).float()
        accuracy = (logits.detach().argmax(1) == class_ids).float().mean()
        get_event_storage().put_scalar("classification_accuracy", accuracy.item())
        return {CLASSIFICATION_LOSS: self.loss_weight * F.cross_entropy(logits, class_ids)}


def bottom_up_features(backbone: Backbone, images: Tensor) -> Tensor:
    """The coarsest feature map (N, C, h, w) of a backbone, below its pyramid if it has one.

    Batch norm in training mode has the statistics of these images; its running ones, for evaluation, stay those of the
    detector's images.

    Args:
        images: (N, 3, H, W), normalized.
    """
    bottom_up = bottom_up_of(backbone)
    with running_statistics_kept(bottom_up):
        return bottom_up(images)[coarsest_feature(bottom_up)]


def add_classification_head(model: nn.Module, num_classes: int, loss_weight: float) -> None:
    """Give a detector a head for joint training, as ``model.classification_head``, on the device of its weights.

    Args:
        model: with :class:`~selftrain_d2.modeling.meta_arch.LossesBySource`; its ``backbone`` may be any.
        num_classes, loss_weight: see :class:`ClassificationHead`.

    Raises:
        InputError: a model without LossesBySource, or a bad weight.
    """
    if not hasattr(model, CLASSIFICATION_HEAD):
        raise InputError(
            f"{type(model).__name__} cannot be trained jointly with classification: put SelfTraining before the "
            "name in MODEL.META_ARCHITECTURE, or mix LossesBySource into a class of your own."
        )
    bottom_up = bottom_up_of(model.backbone)
    channels = bottom_up.output_shape()[coarsest_feature(bottom_up)].channels
    model.classification_head = ClassificationHead(channels, num_classes, loss_weight).to(model.device)


def without_classification(batched_inputs: Sequence[dict]) -> list[dict]:
    """The samples of a batch that a detector is trained on."""
    return [sample for sample in batched_inputs if sample.get("label_source") != CLASSIFICATION]
