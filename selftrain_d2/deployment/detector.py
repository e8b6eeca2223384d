"""A trained model at work: images in, detections out, by the numbers of its evaluation."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Union

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image, ImageOps

from selftrain_d2.data.image_files import UNREADABLE, read_image
from selftrain_d2.data.pseudo_labels.masks import PixelLabels
from selftrain_d2.data.scaled_images import scale_augmentations
from selftrain_d2.data.tiles import Tiles
from selftrain_d2.deployment.run import run_config
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.generate import known_classes
from selftrain_d2.labeling.inference import Sample, Teacher, label_in_order, make_sample, read_ahead
from selftrain_d2.labeling.segment import SegmentationTeacher, makes_masks
from selftrain_d2.labeling.tiles import check_tiles, label_tiles_in_order, read_pictures
from selftrain_d2.labeling.views import see_once
from selftrain_d2.modeling.checkpoint import load_weights, require_complete, require_same_anchors

logger = logging.getLogger(__name__)

#: A path, a PIL image, or (H, W, 3) uint8 in the detector's ``channel_order``.
ImageLike = Union[str, os.PathLike, Image.Image, np.ndarray]
#: Of a detector; of a segmentor.
Prediction = Union[Instances, PixelLabels]

_ORDERS = ("RGB", "BGR")


class Detector:
    """A trained detector or segmentor, for images.

    ``Detector("output/student")("photo.jpg")`` gives an image's ``Instances``: ``pred_boxes`` (N, 4) XYXY in pixels of
    the image, ``scores`` (N,), ``pred_classes`` (N,) into ``class_names``, with masks ``pred_masks`` (N, H, W); on the
    CPU, the best first, down to the config's SCORE_THRESH_TEST. A segmentor gives
    :class:`~selftrain_d2.data.pseudo_labels.masks.PixelLabels`.

    Images are resized, and calculated on, as in evaluation, in float32 and without test-time augmentation, which
    SELFTRAIN.TTA asks of teachers alone.
    """

    def __init__(
        self,
        run: str | os.PathLike | CfgNode,
        *,
        batch_size: int = 8,
        channel_order: str = "RGB",
        class_names: Sequence[str] | None = None,
        tiles: Tiles | None = None,
        allow_unsafe: bool = False,
    ):
        """
        Args:
            run: folder of a finished run (see run_config for which of its weights), or a config with MODEL.WEIGHTS.
            batch_size: images of one shape per forward pass.
            channel_order: of arrays: "RGB", or "BGR" as OpenCV reads them.
            class_names: by id, for weights that do not carry them.
            tiles: look at images tile by tile: for those that are larger than the network's input.
            allow_unsafe: load files that can run code.

        Raises:
            InputError: there is no finished run; the weights are not those of the config's whole model; unknown
                classes; another channel order; tiles for a model of masks.
        """
        if channel_order not in _ORDERS:
            raise InputError(f"The channel order must be {' or '.join(_ORDERS)}, not {channel_order!r}.")
        if batch_size < 1:
            raise InputError(f"The batch size must be at least 1, not {batch_size}.")
        self.channel_order, self.batch_size = channel_order, batch_size
        self.cfg = cfg = _as_in_evaluation(run if isinstance(run, CfgNode) else run_config(run, allow_unsafe))
        model = build_model(cfg)
        report = load_weights(model, cfg.MODEL.WEIGHTS, allow_unsafe)
        require_complete(report, cfg.MODEL.WEIGHTS)
        require_same_anchors(report, cfg)
        self.class_names = known_classes(cfg, class_names, report.classes)
        if tiles is not None:
            check_tiles(tiles, model)
        self.tiles = tiles
        self.makes_masks = makes_masks(model)
        self._predict = SegmentationTeacher(cfg, model) if self.makes_masks else Teacher(cfg, model)
        self._resizing = scale_augmentations(cfg)

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Prediction | list[Prediction]:
        """Detections of one image, or of each of a list.

        Raises:
            InputError: an image cannot be read, or is no (H, W, 3) uint8.
        """
        if not isinstance(images, (list, tuple)):
            return next(self.stream([images]))
        return list(self.stream(images))

    def stream(self, images: Iterable[ImageLike]) -> Iterator[Prediction]:
        """Detections in the order of the images, of which a few batches are in memory at a time.

        Raises:
            InputError: see :meth:`__call__`.
        """
        pictures = ({"file_name": "", "pixels": self._pixels(image)} for image in images)
        if self.tiles is None:
            pictures = (make_sample("", picture["pixels"], self._resizing) for picture in pictures)
        for _, prediction in self._in_order(pictures):
            yield prediction

    def files(self, image_root: str, file_names: Sequence[str]) -> Iterator[tuple[Sample, Prediction | str]]:
        """Samples of files (``file_name``, ``height``, ``width``) and their detections, in the order of the names.

        Files are read by DATALOADER.NUM_WORKERS processes, with tiles by a thread; of one that cannot be read comes the
        reason instead.
        """
        if self.tiles is None:
            yield from self._in_order(read_ahead(self.cfg, image_root, file_names, self.batch_size))
        else:
            yield from self._in_order(read_pictures(image_root, file_names, self.cfg.INPUT.FORMAT))

    def _in_order(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Any]]:
        label = label_in_order
        if self.tiles is not None:
            label = functools.partial(
                label_tiles_in_order, tiles=self.tiles, augmentations=self._resizing, progress=True
            )
        return label(
            samples,
            self._predict,
            self.batch_size,
            labeled_row=lambda sample, prediction: (
                {key: sample[key] for key in ("file_name", "height", "width")},
                prediction,
            ),
            skipped_row=lambda name, skipped: ({"file_name": name}, skipped),
        )

    def _pixels(self, image: ImageLike) -> np.ndarray:
        """(H, W, C) uint8 in the order of INPUT.FORMAT."""
        wanted = self.cfg.INPUT.FORMAT
        if isinstance(image, (str, os.PathLike)):
            try:
                return read_image(image, wanted, large=self.tiles is not None)
            except UNREADABLE as error:
                raise InputError(f"Image {os.fspath(image)} cannot be read: {error}.") from error
        if isinstance(image, Image.Image):
            array, order = np.asarray(ImageOps.exif_transpose(image).convert("RGB")), "RGB"
        else:
            array, order = np.asarray(image), self.channel_order
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
            raise InputError(
                f"An image must be (H, W, 3) uint8, this is {array.shape} {array.dtype}: convert it before."
            )
        if wanted not in _ORDERS:  # grey
            return np.asarray(Image.fromarray(array if order == "RGB" else array[..., ::-1]).convert("L"))[
                ..., None
            ]
        return np.ascontiguousarray(array if order == wanted else array[..., ::-1])


def _as_in_evaluation(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    see_once(cfg)
    cfg.SELFTRAIN.LABEL_PRECISION = "float32"
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No CUDA device: MODEL.DEVICE is cpu.")
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg
