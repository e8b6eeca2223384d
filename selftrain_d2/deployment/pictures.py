"""Images with what a model found drawn over them, by detectron2's Visualizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image

from selftrain_d2.data.label_maps import voc_colours
from selftrain_d2.data.pseudo_labels.masks import PixelLabels, mask_path
from selftrain_d2.files import whole_file, writing

FOLDER = "pictures"
#: Pixels of a picture's longer side; of images with boxes alone, which may have come in tiles.
LONGEST_SIDE = 4096


def drawn(
    image: np.ndarray,
    prediction: Instances | PixelLabels,
    class_names: Sequence[str],
    score_thresh: float = 0.5,
) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 RGB with its boxes (and masks), or the colours of its pixels' classes.

    An image with boxes alone is made smaller, where it has a side longer than LONGEST_SIDE.

    Args:
        score_thresh: boxes of a lower score are left out.
    """
    colours = voc_colours().tolist()  # 0 is black: the background's
    metadata = Metadata(
        thing_classes=list(class_names),
        thing_colors=[colours[1 + i % 255] for i in range(len(class_names))],
        stuff_classes=list(class_names),
        stuff_colors=colours[: len(class_names)],
    )
    if isinstance(prediction, Instances):
        prediction = prediction[prediction.scores >= score_thresh]
        if max(image.shape[:2]) > LONGEST_SIDE and not prediction.has("pred_masks"):
            image, prediction = _smaller(image, prediction)
    # SEGMENTATION: colours as they are given, not varied by chance.
    visualizer = Visualizer(image, metadata, instance_mode=ColorMode.SEGMENTATION)
    if isinstance(prediction, PixelLabels):
        output = visualizer.draw_sem_seg(prediction.classes)
    else:
        output = visualizer.draw_instance_predictions(prediction)
    return output.get_image()


def _smaller(image: np.ndarray, instances: Instances) -> tuple[np.ndarray, Instances]:
    height, width = image.shape[:2]
    scale = LONGEST_SIDE / max(height, width)
    size = max(round(scale * height), 1), max(round(scale * width), 1)
    resized = Instances(size, **instances.get_fields())
    resized.pred_boxes = instances.pred_boxes.clone()
    resized.pred_boxes.scale(size[1] / width, size[0] / height)
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), resized


def write_picture(folder: str | os.PathLike, file_name: str, picture: np.ndarray) -> Path:
    """Write ``pictures/<file name>.jpg`` below a folder: always below it, and one for each name.

    Args:
        picture: (H, W, 3) uint8 RGB.
    """
    relative = Path(FOLDER, *Path(mask_path(file_name)).parts[1:]).with_suffix(".jpg")
    file = Path(folder) / relative
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        Image.fromarray(picture).save(temporary, format="JPEG", quality=92)
    return file
