"""The policies S1 to S4 of the paper (Table 1), by name, and the registry for others.

Order [TF]: AutoAugment or RandAugment on the original image, flip, resize by a random scale, crop or pad.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.common.registry import Registry
from PIL import Image

from selftrain_d2.data.augmentation.jitter import FitLongerSide, ScaleJitterCrop
from selftrain_d2.data.augmentation.ops import OperationSettings
from selftrain_d2.data.augmentation.policies import AUTOAUGMENT_POLICIES, AutoAugment, RandAugment
from selftrain_d2.errors import InputError

AUGMENTATION_REGISTRY = Registry("AUGMENTATION")
AUGMENTATION_REGISTRY.__doc__ = """
Augmentation policies: functions ``f(cfg, is_train) -> list[Augmentation]`` by name.
``INPUT.AUGMENTATION.POLICY`` chooses one.
"""

_SMALL_JITTER = (0.8, 1.2)
_LARGE_JITTER = (0.5, 2.0)


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Build the policy that ``INPUT.AUGMENTATION.POLICY`` names.

    Args:
        cfg: a config with this plugin's keys.
        is_train: for training; else for testing, where images are only resized.

    Raises:
        InputError: for a name that is not registered, or settings the policy cannot use.
    """
    name = cfg.INPUT.AUGMENTATION.POLICY
    if name not in AUGMENTATION_REGISTRY:
        known = ", ".join(sorted(registered for registered, _ in AUGMENTATION_REGISTRY))
        raise InputError(
            f"INPUT.AUGMENTATION.POLICY is {name!r}, which is not registered; known are {known}."
        )
    return AUGMENTATION_REGISTRY.get(name)(cfg, is_train)


def set_test_size(cfg: CfgNode) -> bool:
    """Make INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, in place, what the policy does to test images.

    These keys are all that detectron2's DefaultPredictor, demo and test loader know; with them they see the images of
    our evaluation and labeling.

    Returns:
        Whether they can say it: not for a policy that does more than one ResizeShortestEdge to a fixed size.
    """
    resizing = build_augmentations(cfg, is_train=False)
    if not resizing:
        cfg.INPUT.MIN_SIZE_TEST = 0  # images stay as they are
        return True
    resize = resizing[0]
    if (
        len(resizing) > 1
        or not isinstance(resize, T.ResizeShortestEdge)
        or len(set(resize.short_edge_length)) > 1
        or resize.interp != Image.BILINEAR
    ):
        return False
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = resize.short_edge_length[0], resize.max_size
    return True


@AUGMENTATION_REGISTRY.register()
def S1(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Flip, scale 0.8 to 1.2, crop."""
    return flip_jitter_crop(cfg, _SMALL_JITTER) if is_train else resize_only(cfg)


@AUGMENTATION_REGISTRY.register()
def S2(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """AutoAugment, flip, scale 0.8 to 1.2, crop."""
    return [auto_augment(cfg), *flip_jitter_crop(cfg, _SMALL_JITTER)] if is_train else resize_only(cfg)


@AUGMENTATION_REGISTRY.register()
def S3(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """AutoAugment, flip, scale 0.5 to 2, crop."""
    return [auto_augment(cfg), *flip_jitter_crop(cfg, _LARGE_JITTER)] if is_train else resize_only(cfg)


@AUGMENTATION_REGISTRY.register()
def S4(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """RandAugment, flip, scale 0.5 to 2, crop."""
    return [rand_augment(cfg), *flip_jitter_crop(cfg, _LARGE_JITTER)] if is_train else resize_only(cfg)


def resize_only(cfg: CfgNode) -> list[T.Augmentation]:
    """Resize the longer side to ``IMAGE_SIZE``; the model pads."""
    return [FitLongerSide(cfg.INPUT.AUGMENTATION.IMAGE_SIZE)]


def flip_jitter_crop(cfg: CfgNode, scale_range: tuple[float, float]) -> list[T.Augmentation]:
    """Flip, resize by a random scale, crop or pad to ``IMAGE_SIZE``.

    Args:
        cfg: its ``SCALE_RANGE``, if not (0, 0), goes before the policy's.
        scale_range: the policy's own smallest and largest scale, relative to ``IMAGE_SIZE``.
    """
    settings = operation_settings(cfg)
    configured = tuple(cfg.INPUT.AUGMENTATION.SCALE_RANGE)
    crop = ScaleJitterCrop(
        cfg.INPUT.AUGMENTATION.IMAGE_SIZE,
        configured if any(configured) else scale_range,
        pad_value=tuple(cfg.MODEL.PIXEL_MEAN),
        min_area_fraction=settings.min_area_fraction,
        ignore_label=settings.ignore_label,
    )
    return [T.RandomFlip(prob=0.5), crop]


def auto_augment(cfg: CfgNode) -> AutoAugment:
    """AutoAugment for detection, in the version the config names."""
    version = cfg.INPUT.AUGMENTATION.AUTOAUGMENT
    if version not in AUTOAUGMENT_POLICIES:
        raise InputError(
            f"INPUT.AUGMENTATION.AUTOAUGMENT is {version!r}; known are {', '.join(AUTOAUGMENT_POLICIES)}."
        )
    return AutoAugment(AUTOAUGMENT_POLICIES[version], operation_settings(cfg))


def rand_augment(cfg: CfgNode) -> RandAugment:
    """RandAugment with the config's layers and magnitude."""
    augmentation = cfg.INPUT.AUGMENTATION
    return RandAugment(
        augmentation.RANDAUGMENT_LAYERS, augmentation.RANDAUGMENT_MAGNITUDE, operation_settings(cfg)
    )


def operation_settings(cfg: CfgNode) -> OperationSettings:
    """What the config says to every operation.

    Raises:
        InputError: for an image format or a share of area that cannot be used.
    """
    if cfg.INPUT.FORMAT not in ("RGB", "BGR", "L"):
        raise InputError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, but the augmentation policies need RGB, BGR or L."
        )
    fraction = cfg.INPUT.AUGMENTATION.MIN_BOX_AREA_FRACTION
    if not 0 <= fraction <= 1:
        raise InputError(f"INPUT.AUGMENTATION.MIN_BOX_AREA_FRACTION is {fraction}: give a share of 0 to 1.")
    return OperationSettings(
        image_format=cfg.INPUT.FORMAT,
        min_area_fraction=fraction,
        ignore_label=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        scale_lengths=cfg.INPUT.AUGMENTATION.SCALE_PIXEL_LENGTHS,
    )
