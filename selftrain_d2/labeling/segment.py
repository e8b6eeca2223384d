"""A segmentor as a teacher: class probabilities of several views, averaged at the size of the image, in strips.

A 4000 x 3000 image of 21 classes has a gigabyte of probabilities. The network sees it smaller; its logits of all views
are kept as they are, and enlarged for a few rows at a time.

Shapes: K classes, an image of H x W pixels, logits of h x w, R rows of a strip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from selftrain_d2.data.label_maps import VOID
from selftrain_d2.data.pseudo_labels.masks import PixelLabels
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.inference import Network, Sample

#: Numbers in the probabilities of a strip (32 MiB); a few such arrays exist at once.
STRIP_NUMBERS = 2**23
#: Numbers in the logits of all views of the images that are under way at once (1 GiB), of one image at least.
LOGIT_NUMBERS = 2**28


class SegmentationTeacher(Network):
    """A segmentor's labels for pixels, at SELFTRAIN.LABEL_PRECISION and with the views of SELFTRAIN.TTA.

    Each view's logits are those of the segmentor's own inference, up to the network's input size; enlarged to the image
    (bilinear), their probabilities are averaged (Section 3 of the paper: scales 0.5, 0.75, 1, 1.25, 1.5, 1.75).

    Raises:
        InputError: for an unknown precision, or more than 255 classes.
    """

    def __init__(self, cfg: CfgNode, segmentor: nn.Module):
        super().__init__(cfg, segmentor)
        self.num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        if self.num_classes > VOID:
            raise InputError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {self.num_classes}: pseudo masks can have 1 to {VOID}."
            )

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> Iterator[PixelLabels]:
        """Labels at the size of the files, image by image.

        Args:
            samples: images that have the same shape at each scale.
        """
        pixels = sum(samples[0]["images"][scale][0].numel() for scale, _ in self.views)
        together = max(1, LOGIT_NUMBERS // (self.num_classes * pixels))
        for start in range(0, len(samples), together):
            batch = samples[start : start + together]
            views: list[list[Tensor]] = [[] for _ in batch]
            for scale, flipped in self.views:
                outputs = self.outputs(batch, scale, flipped, at_file_size=False)
                for image_views, output in zip(views, outputs):
                    logits = output["sem_seg"]
                    image_views.append(logits.flip(-1) if flipped else logits)
            for sample, image_views in zip(batch, views):
                yield label_pixels(image_views, (sample["height"], sample["width"]))


def label_pixels(logits: Sequence[Tensor], size: tuple[int, int]) -> PixelLabels:
    """The most probable class of every pixel, by the mean probability of all views.

    Args:
        logits: (K, h, w) of each view, each its own h and w.
        size: (H, W).
    """
    height, width = size
    classes, percents = np.empty(size, np.uint8), np.empty(size, np.uint8)
    rows = max(1, STRIP_NUMBERS // (len(logits[0]) * width))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        scores, best = mean_probabilities(logits, size, top, bottom).max(dim=0)
        classes[top:bottom] = best.to("cpu", torch.uint8).numpy()
        percents[top:bottom] = (100 * scores).floor().clamp(max=100).to("cpu", torch.uint8).numpy()
    return PixelLabels(classes, percents)


def mean_probabilities(logits: Sequence[Tensor], size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """(K, R, W) float32: rows ``top`` to ``bottom`` (exclusive) of the mean probabilities at the size (H, W)."""
    total = resized_rows(logits[0].float(), size, top, bottom).softmax(dim=0)
    for view in logits[1:]:
        total += resized_rows(view.float(), size, top, bottom).softmax(dim=0)
    return total / len(logits)


def resized_rows(image: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Some rows of ``F.interpolate(image, size, mode="bilinear", align_corners=False)``.

    Args:
        image: (K, h, w).
        size: (H, W) of the whole result.
        top, bottom: the rows, ``bottom`` exclusive.

    Returns:
        (K, R, W).
    """
    last = image.shape[1] - 1
    rows = torch.arange(top, bottom, dtype=torch.float64, device=image.device)
    source = ((rows + 0.5) * ((last + 1) / size[0]) - 0.5).clamp(min=0)
    above = source.long().clamp(max=last)
    weight = (source - above).to(image.dtype)[:, None]
    strip = torch.lerp(image[:, above], image[:, (above + 1).clamp(max=last)], weight)
    return F.interpolate(strip[None], (bottom - top, size[1]), mode="bilinear", align_corners=False)[0]


def makes_masks(model: nn.Module) -> bool:
    """Whether a teacher labels pixels: it has a semantic head, and nothing that makes boxes."""
    return hasattr(model, "sem_seg_head") and not hasattr(model, "proposal_generator")
