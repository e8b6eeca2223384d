"""AutoAugment for detection and RandAugment: tables, and the augmentations that draw from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from detectron2.data.transforms import Augmentation
from fvcore.transforms.transform import Transform, TransformList

from selftrain_d2.data.augmentation.levels import AUTOAUGMENT_LENGTHS, RANDAUGMENT_LENGTHS
from selftrain_d2.data.augmentation.ops import DEFAULT_SETTINGS, OperationSettings, RandomOperation
from selftrain_d2.errors import InputError

# Sub-policies of (operation, probability, level), one of which is drawn for an image [TF].
_V0 = (
    (("TranslateX_BBox", 0.6, 4), ("Equalize", 0.8, 10)),
    (("TranslateY_Only_BBoxes", 0.2, 2), ("Cutout", 0.8, 8)),
    (("Sharpness", 0.0, 8), ("ShearX_BBox", 0.4, 0)),
    (("ShearY_BBox", 1.0, 2), ("TranslateY_Only_BBoxes", 0.6, 6)),
    (("Rotate_BBox", 0.6, 10), ("Color", 1.0, 6)),
)
AUTOAUGMENT_POLICIES = {
    "v0": _V0,
    "v1": (
        *_V0,
        (("Color", 0.0, 0), ("ShearX_Only_BBoxes", 0.8, 4)),
        (("ShearY_Only_BBoxes", 0.8, 2), ("Flip_Only_BBoxes", 0.0, 10)),
        (("Equalize", 0.6, 10), ("TranslateX_BBox", 0.2, 2)),
        (("Color", 1.0, 10), ("TranslateY_Only_BBoxes", 0.4, 6)),
        (("Rotate_BBox", 0.8, 10), ("Contrast", 0.0, 10)),
        (("Cutout", 0.2, 2), ("Brightness", 0.8, 10)),
        (("Color", 1.0, 6), ("Equalize", 1.0, 2)),
        (("Cutout_Only_BBoxes", 0.4, 6), ("TranslateY_Only_BBoxes", 0.8, 2)),
        (("Color", 0.2, 8), ("Rotate_BBox", 0.8, 10)),
        (("Sharpness", 0.4, 4), ("TranslateY_Only_BBoxes", 0.0, 4)),
        (("Sharpness", 1.0, 4), ("SolarizeAdd", 0.4, 4)),
        (("Rotate_BBox", 1.0, 8), ("Sharpness", 0.2, 8)),
        (("ShearY_BBox", 0.6, 10), ("Equalize_Only_BBoxes", 0.6, 8)),
        (("ShearX_BBox", 0.2, 6), ("TranslateY_Only_BBoxes", 0.2, 10)),
        (("SolarizeAdd", 0.6, 8), ("Brightness", 0.8, 10)),
    ),
}

# [MG], for detection.
RANDAUGMENT_OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate_BBox",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX_BBox",
    "ShearY_BBox",
    "TranslateX_BBox",
    "TranslateY_BBox",
    "Cutout",
    "SolarizeAdd",
)


def _draw_in_turn(
    operations: Sequence[RandomOperation], image: np.ndarray, boxes: np.ndarray | None
) -> TransformList:
    """Draw from each operation, with the boxes the one before leaves. None changes the image's size."""
    transforms = []
    for operation in operations:
        transform = operation.get_transform(image, boxes)
        transforms.append(transform)
        boxes = None if boxes is None else transform.apply_box(boxes)
    return TransformList(transforms)


class AutoAugment(Augmentation):
    """One of a policy's sub-policies, drawn uniformly (Cubuk et al. 2018; Zoph et al. 2019)."""

    def __init__(
        self,
        policy: Sequence[Sequence[tuple[str, float, float]]],
        settings: OperationSettings = DEFAULT_SETTINGS,
    ):
        """
        Args:
            policy: sub-policies, each operations of (name, probability, level) done in turn, as in
                ``AUTOAUGMENT_POLICIES``.
            settings: what else the operations must know; its lengths are replaced by AutoAugment's.

        Raises:
            InputError: for an unknown operation, probability or level, or an empty policy.
        """
        super().__init__()
        if not policy:
            raise InputError("An AutoAugment policy needs at least one sub-policy.")
        self.policy = policy
        self.settings = replace(settings, lengths=AUTOAUGMENT_LENGTHS)
        self._sub_policies = [
            [RandomOperation(name, prob, level, self.settings) for name, prob, level in sub_policy]
            for sub_policy in policy
        ]

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None = None) -> Transform:
        """Draw the transform for an image (H, W) or (H, W, C) with boxes (N, 4) XYXY or None."""
        return _draw_in_turn(self._sub_policies[np.random.randint(len(self._sub_policies))], image, boxes)


class RandAugment(Augmentation):
    """A number of operations, each drawn uniformly, all of one magnitude (Cubuk et al. 2019)."""

    def __init__(
        self,
        layers: int = 1,
        magnitude: float = 10.0,
        settings: OperationSettings = DEFAULT_SETTINGS,
        names: Sequence[str] = RANDAUGMENT_OPERATIONS,
    ):
        """
        Args:
            layers: how many operations are drawn for an image, with repetition.
            magnitude: their level, from 0; values above 10 are allowed.
            settings: what else the operations must know; its lengths are replaced by RandAugment's.
            names: the operations to draw from.

        Raises:
            InputError: for a negative number of layers or magnitude, or an unknown operation.
        """
        super().__init__()
        if layers < 0 or int(layers) != layers or not names:
            raise InputError(f"RandAugment needs 0 or more layers and at least one operation, not {layers}.")
        self.layers, self.magnitude, self.names = layers, magnitude, names
        self.settings = replace(settings, lengths=RANDAUGMENT_LENGTHS)
        self._operations = [RandomOperation(name, 1.0, magnitude, self.settings) for name in names]

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None = None) -> Transform:
        """Draw the transform for an image (H, W) or (H, W, C) with boxes (N, 4) XYXY or None."""
        drawn = np.random.randint(len(self._operations), size=self.layers)
        return _draw_in_turn([self._operations[i] for i in drawn], image, boxes)
