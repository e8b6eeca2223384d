"""Semantic segmentation: one forward pass over human and pseudo labels, and the paper's head.

Shapes: N images of H x W pixels (padded to one size), C channels, K classes; h = ceil(H / stride), w likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.modeling.meta_arch import SemanticSegmentor
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone.norm import configured_norm
from selftrain_d2.modeling.meta_arch.by_source import (
    LossesBySource,
    as_slice,
    by_source,
    without_pixel_losses,
)


@META_ARCH_REGISTRY.register()
class SelfTrainingSegmentor(LossesBySource, SemanticSegmentor):
    """detectron2's SemanticSegmentor over a batch of human-labeled and pseudo-labeled images.

    The whole batch goes through the network at once, so batch norm sees the mixed batch as in the paper; then each
    source of labels has its own losses. For that the head must have ``layers(features)``, which gives predictions
    (N, ...), and ``losses(predictions, targets)``: SemSegPyramidSumHead, detectron2's SemSegFPNHead and the heads of
    its DeepLab project do. For other heads there is ``SelfTrainingSemanticSegmentor``, with a pass for each source.

    Inference is SemanticSegmentor's: a dict a picture, with ``sem_seg``, logits (K, height, width) at the size of the
    original image.
    """

    def losses_by_source(self, batched_inputs: list[dict]) -> dict[str, dict[str, Tensor]]:
        """As in ``LossesBySource``, of one pass: ``loss_sem_seg``. Each input dict has ``sem_seg`` (H, W), class ids or
        the head's ignore value."""
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        targets = [x["sem_seg"].to(self.device) for x in batched_inputs]
        predictions = self.sem_seg_head.layers(self.backbone(self._padded(images, 0.0)))
        targets = self._padded(targets, self.sem_seg_head.ignore_value)
        losses = {}
        for source, index in by_source(batched_inputs).items():
            part = as_slice(index)
            nothing_valid = self.all_pixels_are_ignored([batched_inputs[i] for i in index])
            with get_event_storage().name_scope(source):
                losses[source] = self.sem_seg_head.losses(
                    predictions[part], torch.zeros_like(targets[part]) if nothing_valid else targets[part]
                )
            if nothing_valid:
                losses[source] = without_pixel_losses(losses[source])
        return losses

    def _padded(self, tensors: list[Tensor], value: float) -> Tensor:
        """One batch of images (C, H, W) or of label maps (H, W), as the backbone needs it."""
        backbone = self.backbone
        return ImageList.from_tensors(
            tensors, backbone.size_divisibility, value, backbone.padding_constraints
        ).tensor


@SEM_SEG_HEADS_REGISTRY.register()
class SemSegPyramidSumHead(nn.Module):
    """The paper's segmentation head (Section 4.2 and [TF]).

    All levels of a pyramid, upsampled bilinearly to one stride and summed; 3x3 convolutions, each with norm and ReLU;
    a 1x1 classifier. Made for :class:`NASFPN`, works on any pyramid of levels with as many channels.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dims: int = 256,
        num_convs: int = 3,
        common_stride: int = 4,
        norm: str | Callable[[int], nn.Module] = "BN",
        ignore_value: int = 255,
        loss_weight: float = 1.0,
    ):
        """
        Args:
            input_shape: the levels in use, all of the same channels and of strides that ``common_stride`` divides.
            num_classes: K, with the background if it is a class.
            conv_dims: channels of the 3x3 convolutions.
            num_convs: their number.
            common_stride: of the sum and of the logits. The paper has 4.
            norm: see ``detectron2.layers.get_norm``.
            ignore_value: label of pixels without loss.
            loss_weight: factor of the loss.

        Raises:
            InputError: no levels, levels of different channels, or a stride that ``common_stride`` does not divide.
        """
        super().__init__()
        levels = sorted(input_shape.items(), key=lambda item: item[1].stride)
        channels = {shape.channels for _, shape in levels}
        if len(channels) != 1 or any(shape.stride % common_stride for _, shape in levels):
            raise InputError(
                "MODEL.SEM_SEG_HEAD.IN_FEATURES must name levels of a pyramid, of equal channels and of strides that "
                f"COMMON_STRIDE {common_stride} divides; those named have "
                f"{ {name: (shape.channels, shape.stride) for name, shape in levels} } (channels, stride)."
            )
        self.in_features = [name for name, _ in levels]
        self.scales = [shape.stride // common_stride for _, shape in levels]
        self.common_stride = common_stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        widths = [channels.pop()] + [conv_dims] * num_convs
        self.convs = nn.Sequential(
            *(
                Conv2d(
                    inputs,
                    outputs,
                    kernel_size=3,
                    padding=1,
                    bias=not norm,
                    norm=get_norm(norm, outputs),
                    activation=F.relu,
                )
                for inputs, outputs in zip(widths, widths[1:])
            )
        )
        self.predictor = Conv2d(widths[-1], num_classes, kernel_size=1)
        for conv in self.convs:
            weight_init.c2_msra_fill(conv)
        # [TF]: all classes start about equally probable.
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict:
        keys = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {name: shape for name, shape in input_shape.items() if name in keys.IN_FEATURES},
            "num_classes": keys.NUM_CLASSES,
            "conv_dims": keys.CONVS_DIM,
            "num_convs": keys.NUM_CONVS,
            "common_stride": keys.COMMON_STRIDE,
            "norm": configured_norm(keys.NORM, keys, cfg.MODEL.DEVICE),
            "ignore_value": keys.IGNORE_VALUE,
            "loss_weight": keys.LOSS_WEIGHT,
        }

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The interface of detectron2's heads.

        Args:
            features: level name to (N, C, ...).
            targets: (N, H, W), in training.

        Returns:
            In training, None and the losses; else logits (N, K, stride * h, stride * w), which cover the images,
            and no losses.
        """
        logits = self.layers(features)
        if self.training:
            return None, self.losses(logits, targets)
        return _upsampled(logits, self.common_stride), {}

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (N, K, h, w)."""
        # Sizes of levels are rounded up: the finest one's is the smallest when upsampled, and covers the image.
        finest = features[self.in_features[0]]
        height, width = (self.scales[0] * size for size in finest.shape[2:])
        total = sum(
            _upsampled(features[name], scale)[:, :, :height, :width]
            for name, scale in zip(self.in_features, self.scales)
        )
        return self.predictor(self.convs(total))

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """
        Args:
            predictions: logits (N, K, h, w).
            targets: (N, H, W), class ids or the ignore value.
        """
        targets = subsample_labels(targets, predictions.shape[2:], self.common_stride, self.ignore_value)
        return {"loss_sem_seg": self.loss_weight * mean_image_loss(predictions, targets, self.ignore_value)}


def mean_image_loss(logits: Tensor, labels: Tensor, ignore_value: int) -> Tensor:
    """Cross entropy: a pixel's, averaged over the valid pixels of its image, averaged over the images.

    An image has the same weight however many of its pixels are ignored, so the loss does not depend on which images
    share a batch or a GPU. ([TF] averages over all valid pixels of a TPU core's images.) An image without any valid
    pixel has the loss 0, and counts as an image.

    Args:
        logits: (N, K, h, w), of any precision; the loss is float32.
        labels: (N, h, w), class ids or the ignore value.
    """
    losses = F.cross_entropy(logits.float(), labels, ignore_index=ignore_value, reduction="none")
    valid_pixels = (labels != ignore_value).sum((1, 2))
    return (losses.sum((1, 2)) / valid_pixels.clamp(min=1)).mean()


def subsample_labels(labels: Tensor, size: torch.Size, stride: int, ignore_value: int) -> Tensor:
    """The label at the centre of each stride x stride cell; labels are never interpolated.

    For an even stride it is the pixel below and right of the centre. ([TF] takes the top left pixel, which is the
    centre where pixels are counted by their corners, as its resizing does and PyTorch's does not.)

    Args:
        labels: (N, H, W).
        size: (h, w) of the result. Cells whose centre is outside the labels are ignored.
    """
    height, width = (stride * s for s in size)
    bottom, right = height - labels.shape[1], width - labels.shape[2]
    padded = F.pad(labels, (0, right, 0, bottom), value=ignore_value)
    return padded[:, stride // 2 :: stride, stride // 2 :: stride]


def _upsampled(x: Tensor, scale: int) -> Tensor:
    if scale == 1:
        return x
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
