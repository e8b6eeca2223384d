"""Reads an image, augments it with its labels, and says where the labels come from."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask

from selftrain_d2.data.augmentation import build_augmentations
from selftrain_d2.data.augmentation.box_only import BoxOnlyTransform
from selftrain_d2.data.augmentation.geometric import CanvasTransform, move_regions
from selftrain_d2.data.image_files import UNREADABLE, read_image
from selftrain_d2.data.label_maps import read_label_map
from selftrain_d2.data.pseudo_labels.masks import read_mask
from selftrain_d2.errors import InputError


class SelfTrainingDatasetMapper(DatasetMapper):
    """detectron2's DatasetMapper with this plugin's policies, faster, and aware of the label source.

    Takes a dataset dict and returns it with ``image`` (C, H, W) uint8, ``label_source`` ("human" unless
    the dict says otherwise) and, in training, ``instances`` with ``gt_boxes`` (N, 4) XYXY in pixels,
    ``gt_classes`` (N,), and ``gt_masks`` and ``gt_keypoints`` where the config asks for them; ``sem_seg``
    (H, W) where the dict names a file, and ``valid_pixel_share``, the share of its pixels that are not ignored.
    Crowd annotations are left out of the instances; where they are to be ignored (``ignore_crowd``, of the mapper or
    the dict) their boxes are ``ignored_boxes``, ``Boxes`` (M, 4) XYXY in pixels. Images without any box stay. With
    ``score_weighted`` boxes of pseudo labels have ``gt_weights`` (N,) in [0, 1], which ``load_pseudo_labels`` says;
    with ``soft_labels`` they have ``gt_scores`` (N,) in [0, 1], the teacher's.

    Other than detectron2's mapper it hands boxes to the augmentations, which the operations inside boxes
    need, and moves all boxes of an image at once.
    """

    @configurable
    def __init__(
        self,
        *args: Any,
        ignore_value: int = 255,
        ignore_crowd: bool = False,
        score_weighted: bool = False,
        soft_labels: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            args, kwargs: of ``DatasetMapper``.
            ignore_value: label of pixels without loss.
            ignore_crowd: whether crowd annotations are neither objects nor background, not only those of dicts that
                say so themselves.
            score_weighted: whether boxes of pseudo-labeled images weigh their ``weight`` (1 where there is none).
            soft_labels: whether their ``score`` (1 where there is none) is what they teach of their class.
        """
        super().__init__(*args, **kwargs)
        self.ignore_value = ignore_value
        self.ignore_crowd = ignore_crowd
        self.score_weighted = score_weighted
        self.soft_labels = soft_labels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        for key, value in (
            ("MODEL.LOAD_PROPOSALS", cfg.MODEL.LOAD_PROPOSALS),
            ("INPUT.CROP.ENABLED", cfg.INPUT.CROP.ENABLED),
        ):
            if value:
                raise InputError(
                    f"{key} does not work with the policies of INPUT.AUGMENTATION; set it to False."
                )
        if not is_train:  # nothing of a test image is mirrored, so that DATASETS.TRAIN need not be there
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.KEYPOINT_ON = False
        arguments = super().from_config(cfg, is_train)
        arguments["augmentations"] = build_augmentations(cfg, is_train)
        arguments["ignore_value"] = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        arguments["ignore_crowd"] = cfg.SELFTRAIN.IGNORE_CROWD
        arguments["score_weighted"] = cfg.SELFTRAIN.SCORE_WEIGHTED
        arguments["soft_labels"] = cfg.SELFTRAIN.SOFT_LABELS
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one dataset dict, which is not changed.

        Raises:
            InputError: for an image that cannot be read or has another size than its dict says, missing
                annotations, and annotations that cannot be used (named by file and image id).
        """
        sample = dict(dataset_dict)
        sample.setdefault("label_source", "human")
        image = self._read(sample)
        # Images for semantic segmentation alone have a mask and no annotations.
        has_objects = self.is_train and not ("sem_seg_file_name" in sample and "annotations" not in sample)
        every_annotation = self._training_annotations(sample) if has_objects else []
        annotations = [annotation for annotation in every_annotation if not annotation.get("iscrowd", 0)]
        sem_seg = None
        if "sem_seg_file_name" in sample:
            sem_seg = _label_map(sample, image)

        boxes = boxes_of(annotations, sample)
        augmented = T.AugInput(image, boxes=boxes, sem_seg=sem_seg)
        transforms = self.augmentations(augmented)

        sample["image"] = image_to_tensor(augmented.image)
        if augmented.sem_seg is not None:
            self._add_mask(sample, augmented.sem_seg)
        sample.pop("annotations", None)
        if has_objects:
            self._add_objects(sample, every_annotation, augmented.boxes, transforms)
        else:
            sample.pop("ignore_crowd", None)
        return sample

    def _add_mask(self, sample: dict[str, Any], sem_seg: np.ndarray) -> None:
        """Add the labels of the augmented image's pixels (H, W)."""
        sample["sem_seg"] = torch.as_tensor(sem_seg.astype(np.int64))
        # Counted in the loader's process: 64 masks of 512 pixels took the training process 66 ms a step.
        sample["valid_pixel_share"] = np.count_nonzero(sem_seg != self.ignore_value) / sem_seg.size

    def _add_objects(
        self,
        sample: dict[str, Any],
        annotations: list[dict[str, Any]],
        boxes: np.ndarray,
        transforms: T.TransformList,
    ) -> None:
        """Add ``instances``, and ``ignored_boxes`` where crowds are ignored.

        Args:
            sample: has the augmented ``image``.
            annotations: in pixels of the file, crowds among them.
            boxes: (N, 4) XYXY in pixels of the augmented image, of the N that are no crowds.
            transforms: what the image was augmented by.
        """
        image_size = tuple(sample["image"].shape[1:])
        objects, crowds = (
            [annotation for annotation in annotations if bool(annotation.get("iscrowd", 0)) is crowd]
            for crowd in (False, True)
        )
        if sample.pop("ignore_crowd", False) or self.ignore_crowd:
            sample["ignored_boxes"] = _moved(boxes_of(crowds, sample), transforms, image_size)
        instances = Instances(image_size)
        instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        classes = [annotation["category_id"] for annotation in objects]
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        for key, asked in (("weight", self.score_weighted), ("score", self.soft_labels)):
            if asked and sample["label_source"] == "pseudo":
                values = [annotation.get(key, 1.0) for annotation in objects]
                instances.set(f"gt_{key}s", torch.tensor(values, dtype=torch.float32))
        if self.use_instance_mask:
            instances.gt_masks = self._masks(objects, transforms, image_size, sample)
        if self.use_keypoint:
            instances.gt_keypoints = self._keypoints(objects, transforms, image_size, sample)
        sample["instances"] = utils.filter_empty_instances(instances)

    def _read(self, sample: dict[str, Any]) -> np.ndarray:
        try:
            image = read_image(sample["file_name"], self.image_format)
        except UNREADABLE as error:
            raise InputError(f"{_name(sample)} cannot be read ({error}); repair or remove it.") from error
        try:
            utils.check_image_size(sample, image)
        except utils.SizeMismatchError as error:
            raise InputError(
                f"{_name(sample)} is {image.shape[1]} x "
                f"{image.shape[0]} pixels, but its annotations say {sample.get('width')} x "
                f"{sample.get('height')}; correct width and height there."
            ) from error
        return image

    def _training_annotations(self, sample: dict[str, Any]) -> list[dict[str, Any]]:
        if "annotations" not in sample:
            raise InputError(
                f"{_name(sample)} has no annotations to train on; "
                "give it a list (empty if it shows no object), or label it first."
            )
        if "proposal_boxes" in sample:
            raise InputError(
                f"{_name(sample)} carries precomputed proposals, "
                "which the augmentation policies cannot move; remove them."
            )
        return sample["annotations"]

    def _masks(self, annotations, transforms, image_size, sample) -> PolygonMasks | BitMasks:
        segmentations = []
        for annotation in annotations:
            segmentation = annotation.get("segmentation")
            if isinstance(segmentation, list):
                polygons = transforms.apply_polygons([np.reshape(p, (-1, 2)) for p in segmentation])
                if self.instance_mask_format == "polygon":
                    segmentations.append([p.reshape(-1) for p in polygons])
                else:
                    polygons = [p.reshape(-1) for p in polygons]
                    segmentations.append(polygons_to_bitmask(polygons, *image_size))
            elif isinstance(segmentation, dict) and self.instance_mask_format == "bitmask":
                try:
                    mask = mask_util.decode(segmentation).astype(bool)
                except ValueError as error:
                    raise InputError(
                        f"{_name(sample)} has a mask in run lengths that cannot be read ({error}); remove it."
                    ) from error
                segmentations.append(transforms.apply_segmentation(mask))
            else:
                raise InputError(
                    f"{_name(sample)} has an annotation without a "
                    f"usable mask ({type(segmentation).__name__}); INPUT.MASK_FORMAT 'polygon' needs lists of "
                    "polygons, 'bitmask' takes these and RLE, and MODEL.MASK_ON False needs none."
                )
        if self.instance_mask_format == "polygon":
            return PolygonMasks(segmentations)
        stacked = np.stack(segmentations) if segmentations else np.zeros((0, *image_size), dtype=bool)
        return BitMasks(torch.from_numpy(np.ascontiguousarray(stacked)))

    def _keypoints(self, annotations, transforms, image_size, sample) -> Keypoints:
        """(N, K, 3): x, y, visibility; all zero where a point is not visible any more."""
        count = len(self.keypoint_hflip_indices)
        if any(len(annotation.get("keypoints", ())) != 3 * count for annotation in annotations):
            raise InputError(
                f"{_name(sample)} has an annotation without {count} keypoints of 3 numbers, which the data "
                "set's keypoint_names ask for; set MODEL.KEYPOINT_ON to False or complete it."
            )
        keypoints = np.array([a["keypoints"] for a in annotations], dtype=np.float64).reshape(-1, 3)
        points, visible = keypoints[:, :2].copy(), keypoints[:, 2] > 0
        mirrored = np.zeros(len(annotations), dtype=bool)
        for transform in transforms.transforms:
            points = transform.apply_coords(points)
            if isinstance(transform, CanvasTransform):
                visible &= transform.contains(points)
            if isinstance(transform, BoxOnlyTransform):
                mirrored ^= transform.mirrored_boxes(len(annotations))
            else:
                mirrored ^= isinstance(transform, T.HFlipTransform) or getattr(transform, "mirrors", False)
        visible &= ((points >= 0) & (points <= image_size[::-1])).all(axis=1)
        keypoints[:, :2] = points
        keypoints[~visible] = 0
        keypoints = keypoints.reshape(-1, count, 3)
        keypoints[mirrored] = keypoints[mirrored][:, self.keypoint_hflip_indices]
        return Keypoints(keypoints)


def _label_map(sample: dict[str, Any], image: np.ndarray) -> np.ndarray:
    """The mask of an image, (H, W) uint8; takes its keys out of the sample."""
    file_name = sample.pop("sem_seg_file_name")
    if "sem_seg_least_percent" in sample:
        labels = read_mask(file_name, sample.pop("sem_seg_sha256")).at(sample.pop("sem_seg_least_percent"))
    else:
        labels = read_label_map(file_name)
    if labels.shape != image.shape[:2]:
        raise InputError(
            f"Mask {file_name} is {labels.shape[1]} x {labels.shape[0]} pixels, but its image {image.shape[1]} x "
            f"{image.shape[0]}: they must have one size."
        )
    return labels


def _name(sample: dict[str, Any]) -> str:
    return f"Image {sample['file_name']} (id {sample.get('image_id')})"


def boxes_of(annotations: list[dict[str, Any]], sample: dict[str, Any]) -> np.ndarray:
    """The annotations' boxes, (N, 4) XYXY in pixels, float64."""
    boxes = np.zeros((len(annotations), 4))
    for box, annotation in zip(boxes, annotations):
        mode = annotation["bbox_mode"]
        if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
            raise InputError(
                f"{_name(sample)} has a box of mode "
                f"{BoxMode(mode).name}; only XYXY_ABS and XYWH_ABS can be augmented."
            )
        box[:] = annotation["bbox"]
        if mode == BoxMode.XYWH_ABS:
            box[2:] += box[:2]
    return boxes


def _moved(boxes: np.ndarray, transforms: T.TransformList, image_size: tuple[int, int]) -> Boxes:
    """What is left of boxes (N, 4) inside the augmented image, whose size is (height, width)."""
    moved = Boxes(torch.as_tensor(move_regions(transforms, boxes), dtype=torch.float32))
    moved.clip(image_size)
    return moved[moved.nonempty()]


def image_to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W), (H, W, C) -> contiguous (C, H, W)."""
    planes = np.empty((image.size // (image.shape[0] * image.shape[1]), *image.shape[:2]), dtype=image.dtype)
    cv2.split(image, list(planes))  # several times faster than numpy's transposition
    return torch.from_numpy(planes)
