"""Box-aware AutoAugment and RandAugment, and the policies S1 to S4 made of them."""

from selftrain_d2.data.augmentation.ops import RandomOperation
from selftrain_d2.data.augmentation.policies import AutoAugment, RandAugment
from selftrain_d2.data.augmentation.registry import (
    AUGMENTATION_REGISTRY,
    auto_augment,
    build_augmentations,
    flip_jitter_crop,
    operation_settings,
    rand_augment,
    resize_only,
    set_test_size,
)

__all__ = [
    "AUGMENTATION_REGISTRY",
    "AutoAugment",
    "RandAugment",
    "RandomOperation",
    "auto_augment",
    "build_augmentations",
    "flip_jitter_crop",
    "operation_settings",
    "rand_augment",
    "resize_only",
    "set_test_size",
]
