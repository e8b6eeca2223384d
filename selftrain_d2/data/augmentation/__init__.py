"""Box-aware AutoAugment and RandAugment, and the policies S1 to S4 made of them."""

from selftrain_d2.data.augmentation.registry import AUGMENTATION_REGISTRY, build_augmentations

__all__ = ["AUGMENTATION_REGISTRY", "build_augmentations"]
