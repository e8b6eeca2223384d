"""Pseudo masks as a dataset: columns in memory, a dict only when it is asked for, PNGs read by the mapper.

Letters in shapes: N images, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from selftrain_d2.data.pseudo_labels.dataset import PseudoImageDataset, characters
from selftrain_d2.data.pseudo_labels.masks import PERCENTS, mask_path
from selftrain_d2.data.pseudo_labels.shards import flat_values, list_lengths


class PseudoMaskDataset(PseudoImageDataset):
    """Images with pseudo masks: an image takes 56 bytes and its name, and 12 bytes for each class that it shows.

    Args:
        columns: see ``join_columns``, of :func:`mask_columns`.
        image_root: folder of the images.
        positions: which images, by their place in the columns; all by default.
        folder: the pseudo-label folder, with the PNGs.
        least_percent: C numbers: pixels of less confidence are ignored.
    """

    def __init__(
        self,
        columns: dict[str, np.ndarray],
        image_root: str,
        positions: range | None = None,
        folder: str = "",
        least_percent: tuple[int, ...] = (),
    ):
        super().__init__(columns, image_root, positions)
        self.folder = folder
        self.least_percent = least_percent

    @property
    def pixels(self) -> int:
        """Of all images, with those that are ignored."""
        return int(self.sizes.astype(np.int64).prod(axis=1).sum())

    @property
    def pixels_by_class(self) -> np.ndarray:
        """(C,) int64: pixels of each class that are confident enough, over all images."""
        items = self._items("class_offsets")
        classes, numbers = (self._columns[name][items] for name in ("classes", "class_pixels"))
        return np.bincount(classes, numbers, len(self.least_percent)).astype(np.int64)

    @property
    def class_counts(self) -> np.ndarray:
        """(N,) int64: how many classes each image shows; 0 where all of it is ignored."""
        return np.diff(self._columns["class_offsets"])[self._indices()]

    def described(self, class_names: Sequence[str]) -> str:
        pixels, total = self.pixels_by_class, max(self.pixels, 1)
        shown = ", ".join(f"{name} {number / total:.2%}" for name, number in zip(class_names, pixels))
        return f"{1 - pixels.sum() / total:.1%} of the pixels ignored, {shown}"

    def _amount(self) -> str:
        return "masks"

    def _further_arguments(self) -> tuple:
        return self.folder, self.least_percent

    def _labels(self, position: int, name: str, size: list[int]) -> dict[str, Any]:
        return {
            "sem_seg_file_name": os.path.join(self.folder, mask_path(name)),
            "sem_seg_sha256": self._columns["png_sha256"][position].tobytes(),
            "sem_seg_least_percent": self.least_percent,
        }


def mask_columns(table: pa.Table, least_percent: Sequence[int]) -> dict[str, np.ndarray]:
    """What a dataset takes from one shard, for ``join_columns``.

    Args:
        table: of ``MASK_SCHEMA``. Skipped images are left out.
        least_percent: C numbers: pixels of less confidence do not count.
    """
    table = table.filter(table["skipped"].is_null())
    classes, percents = np.divmod(flat_values(table, "bins"), PERCENTS)
    rows = np.repeat(np.arange(table.num_rows), list_lengths(table, "bins"))
    kept = percents >= np.asarray(least_percent, np.int32)[classes]
    # Bins rise: those of one image and class follow one another.
    keys, first = np.unique(rows[kept] * len(least_percent) + classes[kept], return_index=True)
    pixels = flat_values(table, "pixels")[kept].astype(np.int64)
    names = table["file_name"]
    return {
        "names": characters(names),
        "name_lengths": pc.binary_length(names).to_numpy(),
        "sizes": np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1),
        "png_sha256": np.frombuffer(b"".join(table["png_sha256"].to_pylist()), np.uint8).reshape(-1, 32),
        "class_lengths": np.bincount(keys // len(least_percent), minlength=table.num_rows),
        "classes": (keys % len(least_percent)).astype(np.int32),
        "class_pixels": np.add.reduceat(pixels, first) if len(first) else pixels,
    }
