"""An image as a teacher sees it: resized as a test image, at each of SELFTRAIN.TTA.SCALES."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor

from selftrain_d2.data.augmentation import build_augmentations
from selftrain_d2.data.mapper import image_to_tensor
from selftrain_d2.errors import InputError


def scale_augmentations(cfg: CfgNode) -> list[T.AugmentationList]:
    """The resizing of a test image, for each of SELFTRAIN.TTA.SCALES.

    Raises:
        InputError: there is no scale, one is not positive, or two are equal.
    """
    scales = [float(scale) for scale in cfg.SELFTRAIN.TTA.SCALES]
    positive = all(scale > 0 and math.isfinite(scale) for scale in scales)
    if not scales or not positive or len(set(scales)) < len(scales):
        raise InputError(
            f"SELFTRAIN.TTA.SCALES is {tuple(scales)}: give positive numbers, each once; (1.0,) for none."
        )
    augmentations = []
    for scale in scales:
        scaled = cfg.clone()
        scaled.defrost()
        scaled.INPUT.AUGMENTATION.IMAGE_SIZE = max(round(scale * cfg.INPUT.AUGMENTATION.IMAGE_SIZE), 1)
        for key in ("MIN_SIZE_TEST", "MAX_SIZE_TEST"):  # of a policy that resizes as detectron2 does
            scaled.INPUT[key] = round(scale * cfg.INPUT[key])
        augmentations.append(T.AugmentationList(build_augmentations(scaled, is_train=False)))
    return augmentations


def scaled_images(image: np.ndarray, augmentations: Sequence[T.AugmentationList]) -> list[Tensor]:
    """An image at each scale.

    Args:
        image: (H, W, C) uint8.
        augmentations: of :func:`scale_augmentations`.

    Returns:
        (C, h, w) uint8 of each.
    """
    images = []
    for augmentation in augmentations:
        scaled = T.AugInput(image)
        augmentation(scaled)
        images.append(image_to_tensor(scaled.image))
    return images
