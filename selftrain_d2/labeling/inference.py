"""A teacher over many images: reading ahead, full batches of one shape, results in the order of the list."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import nn
from torch.utils.data import Dataset

from selftrain_d2.data.coco_file import run_lengths
from selftrain_d2.data.image_files import read_image
from selftrain_d2.data.loader import use_one_thread
from selftrain_d2.data.packed_loader import PackedLoader
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.scaled_images import scale_augmentations, scaled_images
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.views import build_merge, localization_scores, mirrored, views
from selftrain_d2.modeling.torch_flags import torch_flag

#: Batches that may be under way at once, so that images of one shape find each other.
LOOK_AHEAD = 8

_PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: One image: ``file_name``, and either ``skipped`` (the reason) or ``height``, ``width`` (pixels of the file)
#: and ``images``, the image at each scale, (C, H, W) uint8.
Sample = dict


class Network:
    """A model that looks at images, at SELFTRAIN.LABEL_PRECISION and in the views of SELFTRAIN.TTA.

    Raises:
        InputError: for an unknown precision.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        if cfg.SELFTRAIN.LABEL_PRECISION not in _PRECISIONS:
            raise InputError(
                f"SELFTRAIN.LABEL_PRECISION is {cfg.SELFTRAIN.LABEL_PRECISION!r}; "
                f"known are {', '.join(_PRECISIONS)}."
            )
        self.dtype = _PRECISIONS[cfg.SELFTRAIN.LABEL_PRECISION]
        self.model = model.eval()
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.views = views(cfg)

    def outputs(
        self, samples: Sequence[Sample], scale: int, flipped: bool, *, at_file_size: bool
    ) -> list[dict[str, Any]]:
        """What the model says in one view.

        Args:
            samples: images that have the same shape at each scale.
            scale: its number.
            flipped: mirror the images.
            at_file_size: in pixels of the files, else of what the network sees.
        """
        inputs = []
        for sample in samples:
            image = sample["images"][scale].to(self.device, non_blocking=True)
            size = {"height": sample["height"], "width": sample["width"]} if at_file_size else {}
            inputs.append({"image": image.flip(-1) if flipped else image, **size})
        with contextlib.ExitStack() as stack:
            if self.dtype == torch.float32:
                # GPUs round the factors of convolutions to 10 bits (TensorFloat-32) unless told otherwise.
                for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
                    stack.enter_context(torch_flag(backend, "allow_tf32", False))
            else:
                stack.enter_context(torch.autocast(self.device.type, self.dtype))
            return self.model(inputs)


class Teacher(Network):
    """A detector's boxes for images.

    Raises:
        InputError: for an unknown precision.
    """

    def __init__(self, cfg: CfgNode, detector: nn.Module):
        super().__init__(cfg, detector)
        self.merge = build_merge(cfg, detector)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[Instances]:
        """Detections in pixels of the files, on the CPU; with several views they have ``localization_scores``.

        Args:
            samples: images that have the same shape at each scale.

        Raises:
            InputError: the detector makes no boxes.
        """
        found: list[list[Instances]] = [[] for _ in samples]
        for scale, flipped in self.views:
            for detections, instances in zip(found, self._detect(samples, scale, flipped)):
                detections.append(mirrored(instances) if flipped else instances)
        return [(d[0] if len(d) == 1 else self._merged(d)).to("cpu") for d in found]

    def _merged(self, seen: list[Instances]) -> Instances:
        merged = self.merge(seen)
        merged.localization_scores = localization_scores(merged, seen)
        return merged

    def _detect(self, samples: Sequence[Sample], scale: int, flipped: bool) -> list[Instances]:
        outputs = self.outputs(samples, scale, flipped, at_file_size=True)
        if "instances" not in outputs[0]:
            raise InputError(
                f"The teacher is a {type(self.model).__name__}, which makes no boxes: give a detector."
            )
        return [_in_float32(output["instances"]) for output in outputs]


def _in_float32(instances: Instances) -> Instances:
    """What pseudo labels are made of; boxes and scores in full precision."""
    result = Instances(instances.image_size, pred_classes=instances.pred_classes)
    result.pred_boxes = type(instances.pred_boxes)(instances.pred_boxes.tensor.float())
    result.scores = instances.scores.float()
    if instances.has("pred_masks"):
        result.pred_masks = instances.pred_masks
    return result


class ImageReader(Dataset):
    """Makes a sample of a file name: the image at each scale, or the reason why it cannot be read."""

    def __init__(self, image_root: str, augmentations: Sequence[T.AugmentationList], image_format: str):
        self.image_root = image_root
        self.augmentations = augmentations
        self.image_format = image_format

    def __getitem__(self, name: str) -> Sample:
        try:
            image = read_image(os.path.join(self.image_root, name), self.image_format)
            return make_sample(name, image, self.augmentations)
        except Exception as error:  # Pillow's decoders raise anything on a broken file
            return {"file_name": name, "skipped": f"{type(error).__name__}: {error}"}


def make_sample(name: str, image: np.ndarray, augmentations: Sequence[T.AugmentationList]) -> Sample:
    """The sample of an image (H, W, C) uint8 in the channel order of INPUT.FORMAT.

    Args:
        augmentations: the resizing at each scale, as ``scale_augmentations`` gives them.
    """
    images = scaled_images(image, augmentations)
    return {"file_name": name, "height": image.shape[0], "width": image.shape[1], "images": images}


def read_ahead(cfg: CfgNode, image_root: str, file_names: Iterable[str], batch_size: int) -> Iterator[Sample]:
    """Samples of some files in their order, read and resized by DATALOADER.NUM_WORKERS processes.

    Neither the workers nor this hold more than a few batches of images.
    """
    loader = PackedLoader(
        ImageReader(image_root, scale_augmentations(cfg), cfg.INPUT.FORMAT),
        sampler=file_names,  # the names travel to the workers, which so need no list of them
        batch_size=batch_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
        worker_init_fn=use_one_thread,
    )
    for samples in loader:
        yield from samples


def box_row(sample: Sample, instances: Instances) -> dict[str, Any]:
    """The row of the store of an image and its boxes (and masks)."""
    return make_row(
        sample["file_name"],
        sample["height"],
        sample["width"],
        instances.pred_boxes.tensor.numpy(),
        instances.scores.numpy(),
        instances.pred_classes.numpy(),
        _run_lengths(instances.pred_masks) if instances.has("pred_masks") else None,
        localization_scores=instances.localization_scores.numpy()
        if instances.has("localization_scores")
        else None,
    )


def label_in_order(
    samples: Iterable[Sample],
    teacher: Callable[[Sequence[Sample]], Iterable[Any]],
    batch_size: int,
    look_ahead: int = LOOK_AHEAD,
    labeled_row: Callable[[Sample, Any], dict[str, Any]] = box_row,
    skipped_row: Callable[..., dict[str, Any]] = make_row,
) -> Iterator[dict[str, Any]]:
    """Rows of the store, in the order of the samples.

    Images of one shape share batches, which wait for more of them until ``look_ahead`` batches of images
    are under way. Which images share a batch depends on the samples alone: the same samples give the same
    rows to the last bit.

    Args:
        teacher: gives the labels of each of some samples.
        batch_size: images a forward pass.
        labeled_row, skipped_row: make a row of a sample and its labels, and of ``file_name`` and ``skipped=reason``.
    """
    order: deque[Sample] = deque()  # whose rows are not out yet
    waiting: dict[tuple, list[Sample]] = {}  # by shape

    def label(shapes: tuple) -> None:
        batch = waiting.pop(shapes)
        for sample, labels in zip(batch, teacher(batch)):
            del sample["images"]
            sample["row"] = labeled_row(sample, labels)

    def finished(most_under_way: int) -> Iterator[dict[str, Any]]:
        while order and ("row" in order[0] or len(order) >= most_under_way):
            if "row" not in order[0]:
                label(_shapes(order[0]))
            yield order.popleft()["row"]

    for sample in samples:
        order.append(sample)
        if "skipped" in sample:
            sample["row"] = skipped_row(sample["file_name"], skipped=sample["skipped"])
        else:
            batch = waiting.setdefault(_shapes(sample), [])
            batch.append(sample)
            if len(batch) == batch_size:
                label(_shapes(sample))
        yield from finished(look_ahead * batch_size)
    yield from finished(0)


def _shapes(sample: Sample) -> tuple:
    return tuple(image.shape for image in sample["images"])


def _run_lengths(masks: torch.Tensor) -> list[str]:
    """COCO's compressed RLE of masks (N, H, W)."""
    # One mask at a time: pycocotools wants Fortran order, and N of them at image size are large.
    return [run_lengths(mask.numpy())["counts"] for mask in masks]
