"""Images that get their pseudo labels in the training step: as a teacher sees them, and as the student does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T

from selftrain_d2.data.mapper import SelfTrainingDatasetMapper, boxes_of, image_to_tensor
from selftrain_d2.data.scaled_images import scale_augmentations, scaled_images

# Of the dict of an image.
_KEPT = ("file_name", "image_id", "height", "width")


class UnlabeledImageMapper(SelfTrainingDatasetMapper):
    """Reads an image in two views; moves labels of the one, once they are known, into the other.

    Takes a dataset dict, whose annotations are not looked at, and returns ``file_name``, ``image_id``, ``height`` and
    ``width`` (pixels of the file), ``label_source`` "pseudo", ``image`` (C, H, W) uint8 as the student sees it,
    ``images``, (C, h, w) uint8 as a test image at each of SELFTRAIN.TTA.SCALES, and ``transforms``, what the student's
    was augmented by.
    :meth:`label` makes of that and of labels the sample that :class:`SelfTrainingDatasetMapper` makes of an image with
    these labels and the same random numbers.

    No boxes are known when the augmentation is drawn: AutoAugment's operations inside boxes (S2, S3) do nothing.
    """

    @configurable
    def __init__(self, *args: Any, scale_augmentations: Sequence[T.AugmentationList], **kwargs: Any):
        """
        Args:
            args, kwargs: of ``SelfTrainingDatasetMapper``.
            scale_augmentations: of a test image, for each scale that the teacher sees it at.
        """
        super().__init__(*args, **kwargs)
        self.scale_augmentations = scale_augmentations

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        arguments = super().from_config(cfg, is_train)
        return {**arguments, "scale_augmentations": scale_augmentations(cfg)}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one dataset dict, which is not changed.

        Raises:
            InputError: for an image that cannot be read or has another size than its dict says.
        """
        sample = {key: dataset_dict[key] for key in _KEPT if key in dataset_dict}
        image = self._read(sample)
        sample["height"], sample["width"] = image.shape[:2]
        augmented = T.AugInput(image, boxes=np.zeros((0, 4)))
        transforms = self.augmentations(augmented)  # first: test augmentations may draw numbers too
        return {
            **sample,
            "label_source": "pseudo",
            "image": image_to_tensor(augmented.image),
            "images": scaled_images(image, self.scale_augmentations),
            "transforms": transforms,
        }

    def plain(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """An image as a test image alone: ``height``, ``width`` and ``images``."""
        image = self._read(dict(dataset_dict))
        images = scaled_images(image, self.scale_augmentations)
        return {"height": image.shape[0], "width": image.shape[1], "images": images}

    def label(
        self,
        sample: dict[str, Any],
        labels: list[dict[str, Any]] | np.ndarray,
        *,
        ignore_crowd: bool = False,
    ) -> dict[str, Any]:
        """The training sample of an image and its labels.

        Args:
            sample: what a call returned; it is not changed.
            labels: annotations of detectron2's dataset dicts, or the classes of all pixels (H, W); of the file.
            ignore_crowd: whether annotations with ``iscrowd`` 1 are neither objects nor background.
        """
        sample = dict(sample)
        transforms = sample.pop("transforms")
        del sample["images"]
        if isinstance(labels, np.ndarray):
            self._add_mask(sample, transforms.apply_segmentation(labels))
        else:
            sample["ignore_crowd"] = ignore_crowd
            boxes = boxes_of([a for a in labels if not a.get("iscrowd", 0)], sample)
            self._add_objects(sample, labels, transforms.apply_box(boxes), transforms)
        return sample
