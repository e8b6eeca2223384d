"""Predictions as files: COCO results, a table, and PNG masks of a segmentor; written image by image.

``predictions.json`` is a list as COCO's results are: ``image_id``, ``category_id``, ``bbox`` (XYWH, pixels),
``score``, ``segmentation`` (run lengths) where there are masks; besides ``file_name`` and ``category_name``. The ids
are those of a COCO file where one named the images; else ``image_id`` is the file name, and ``category_id`` counts
classes from 1. A segmentor has an entry for each class of an image, with neither box nor score.

``predictions.csv``: ``file_name, category, score, x_min, y_min, x_max, y_max`` (pixels), a row a box; of a segmentor
``file_name, category, pixels, share``.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import Instances

from selftrain_d2.data.coco_file import run_lengths
from selftrain_d2.data.pseudo_labels.masks import PixelLabels, write_mask
from selftrain_d2.files import whole_file, writing

JSON, CSV = "predictions.json", "predictions.csv"
_BOX_COLUMNS = ("file_name", "category", "score", "x_min", "y_min", "x_max", "y_max")
_MASK_COLUMNS = ("file_name", "category", "pixels", "share")


class PredictionFiles:
    """Writes what a model says of images; a context. Files are there whole when it ends, or as they were.

    Args:
        folder: made if it is not there.
        class_names: by id of the model.
        image_ids: COCO's by file name; others are the file names.
        category_ids: COCO's by class name; None: from 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        class_names: Sequence[str],
        *,
        pixels: bool = False,
        image_ids: Mapping[str, Any] | None = None,
        category_ids: Mapping[str, int] | None = None,
    ):
        self.folder = Path(folder)
        self.class_names = class_names
        self.number = 0  # of boxes, or of classes of images
        self._columns = _MASK_COLUMNS if pixels else _BOX_COLUMNS
        self._image_ids = image_ids or {}
        self._category_ids = category_ids or {name: i for i, name in enumerate(class_names, start=1)}

    def __enter__(self) -> PredictionFiles:
        with contextlib.ExitStack() as stack:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            paths = [stack.enter_context(whole_file(self.folder / name)) for name in (JSON, CSV)]
            self._json, table = (
                stack.enter_context(open(path, "w", encoding="utf-8", newline="")) for path in paths
            )
            self._table = csv.writer(table)
            self._table.writerow(self._columns)
            self._json.write("[")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        if exception[0] is None:
            self._json.write("\n]\n")
        return self._stack.__exit__(*exception)

    def add(self, file_name: str, prediction: Instances | PixelLabels) -> None:
        """Write one image's predictions."""
        entries = self._pixels if isinstance(prediction, PixelLabels) else self._boxes
        for class_id, entry, columns in entries(file_name, prediction):
            name = self.class_names[class_id]
            entry = {
                "image_id": self._image_ids.get(file_name, file_name),
                "category_id": self._category_ids[name],
                **entry,
                "file_name": file_name,
                "category_name": name,
            }
            self._json.write(",\n" * (self.number > 0) or "\n")
            json.dump(entry, self._json)
            self._table.writerow([file_name, name, *columns])
            self.number += 1

    @staticmethod
    def _boxes(_: str, instances: Instances) -> Iterator[tuple[int, dict[str, Any], list]]:
        boxes = instances.pred_boxes.tensor.tolist()
        masks = instances.pred_masks if instances.has("pred_masks") else None
        for i, (box, score, class_id) in enumerate(
            zip(boxes, instances.scores.tolist(), instances.pred_classes.tolist())
        ):
            x, y, right, bottom = box
            entry = {"bbox": [x, y, right - x, bottom - y], "score": score}
            if masks is not None:
                entry["segmentation"] = run_lengths(masks[i].numpy())
            yield class_id, entry, [score, *box]

    def _pixels(self, file_name: str, labels: PixelLabels) -> Iterator[tuple[int, dict[str, Any], list]]:
        write_mask(self.folder, file_name, labels)
        for class_id in np.unique(labels.classes).tolist():
            inside = labels.classes == class_id
            pixels = int(inside.sum())
            yield class_id, {"segmentation": run_lengths(inside)}, [pixels, pixels / inside.size]
