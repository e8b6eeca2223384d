"""Pseudo labels as a dataset that stays small: columns in memory, a dict only when it is asked for.

Letters in shapes: N images, B boxes of all images one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from detectron2.structures import BoxMode

from selftrain_d2.data.pseudo_labels.shards import box_counts, flat_values


class PseudoImageDataset(Sequence):
    """detectron2 dataset dicts of pseudo-labeled images: an immutable sequence that makes each when asked.

    Loader workers share the columns: forked ones as they are, spawned ones in shared memory, once for all.
    Subclasses add the labels.

    Args:
        columns: see :func:`join_columns`.
        image_root: folder of the images.
        positions: which images, by their place in the columns; all by default.
    """

    def __init__(self, columns: dict[str, np.ndarray], image_root: str, positions: range | None = None):
        self._columns = columns
        # For pickling: multiprocessing moves tensors, not arrays, to shared memory. The arrays keep their own.
        self._tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        self._positions = range(len(columns["sizes"])) if positions is None else positions
        self.image_root = image_root

    def _labels(self, position: int, name: str, size: list[int]) -> dict[str, Any]:
        """What the dict of an image has besides.

        Args:
            position: in the columns.
            name: of the image, relative to the image root.
            size: height and width in pixels.
        """
        raise NotImplementedError

    def _further_arguments(self) -> tuple:
        """Arguments of a subclass that follow those here."""
        return ()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int | slice) -> dict[str, Any] | PseudoLabelDataset:
        """The dict of one image, or a dataset of a slice of them, which shares all memory."""
        if isinstance(index, slice):
            return type(self)(
                self._columns, self.image_root, self._positions[index], *self._further_arguments()
            )
        position = self._positions[index]
        name = self._text("names", "name_offsets", position)
        height, width = self._columns["sizes"][position].tolist()
        return {
            "file_name": os.path.join(self.image_root, name),
            "image_id": name,
            "height": height,
            "width": width,
            "label_source": "pseudo",
            **self._labels(position, name, [height, width]),
        }

    def __eq__(self, other: object) -> bool:
        """Whether another sequence has equal dicts in the same order."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other))

    __hash__ = None

    def __reduce__(self):
        arguments = self.image_root, self._positions, *self._further_arguments()
        return _rebuild, (type(self), self._tensors, *arguments)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} images of {self.image_root}, {self._amount()})"

    def described(self, class_names: Sequence[str]) -> str:
        """The labels in a few words, class by class."""
        raise NotImplementedError

    def _amount(self) -> str:
        raise NotImplementedError

    @property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32: height and width in pixels."""
        return self._columns["sizes"][self._indices()]

    def _indices(self) -> np.ndarray:
        return np.arange(self._positions.start, self._positions.stop, self._positions.step)

    def _items(self, offsets: str) -> np.ndarray:
        """Places in the columns of all that belongs to the images, image by image."""
        counts = np.diff(self._columns[offsets])[self._indices()]
        before = np.cumsum(counts) - counts
        starts = self._columns[offsets][:-1][self._indices()]
        return np.repeat(starts - before, counts) + np.arange(counts.sum())

    def _text(self, column: str, offsets: str, position: int) -> str:
        start, end = self._columns[offsets][position : position + 2].tolist()
        return self._columns[column][start:end].tobytes().decode()


def _rebuild(kind: type, tensors: dict[str, torch.Tensor], *arguments: Any) -> PseudoImageDataset:
    return kind({name: tensor.numpy() for name, tensor in tensors.items()}, *arguments)


class PseudoLabelDataset(PseudoImageDataset):
    """Images with pseudo boxes: an image takes 24 bytes and its name, a box 24 bytes and its mask.

    Boxes to ignore, if they were asked for, are columns of their own, and take 24 bytes each; weights of boxes 4 bytes.
    """

    def _labels(self, position: int, name: str, size: list[int]) -> dict[str, Any]:
        labels = {"annotations": self._annotations(position, size)}
        return {**labels, "ignore_crowd": True} if "ignored_offsets" in self._columns else labels

    def described(self, class_names: Sequence[str]) -> str:
        numbers = np.bincount(self.category_ids, minlength=len(class_names))
        shown = ", ".join(f"{name} {number}" for name, number in zip(class_names, numbers))
        return f"{numbers.sum()} pseudo boxes: {shown}{self._ignored_in_words()}"

    def _amount(self) -> str:
        return f"{self.box_counts.sum()} boxes{self._ignored_in_words()}"

    def _ignored_in_words(self) -> str:
        return f"; {self.ignored_counts.sum()} more are ignored" if "ignored_offsets" in self._columns else ""

    @property
    def box_counts(self) -> np.ndarray:
        """(N,) int64: boxes of each image, without those to ignore."""
        return np.diff(self._columns["box_offsets"])[self._indices()]

    @property
    def ignored_counts(self) -> np.ndarray:
        """(N,) int64: boxes of each image that are to be ignored."""
        if "ignored_offsets" not in self._columns:
            return np.zeros(len(self), np.int64)
        return np.diff(self._columns["ignored_offsets"])[self._indices()]

    @property
    def category_ids(self) -> np.ndarray:
        """(B,) int32: classes of all boxes but those to ignore, image by image."""
        return self._columns["category_ids"][self._items("box_offsets")]

    @property
    def weights(self) -> np.ndarray:
        """(B,) float32 in [0, 1]: how much these boxes count."""
        if "weights" not in self._columns:
            return np.ones(self.box_counts.sum(), np.float32)
        return self._columns["weights"][self._items("box_offsets")]

    def _annotations(self, position: int, size: list[int]) -> list[dict[str, Any]]:
        start, annotations = self._boxes(position, "box_offsets")
        if "weights" in self._columns:
            for box, annotation in enumerate(annotations, start):
                annotation["weight"] = self._columns["weights"][box].item()
        if "masks" in self._columns:
            for box, annotation in enumerate(annotations, start):
                counts = self._text("masks", "mask_offsets", box)
                if counts:
                    annotation["segmentation"] = {"size": size, "counts": counts}
        if "ignored_offsets" in self._columns:
            _, ignored = self._boxes(position, "ignored_offsets", "ignored_")
            annotations += [{**annotation, "iscrowd": 1} for annotation in ignored]
        return annotations

    def _boxes(self, position: int, offsets: str, prefix: str = "") -> tuple[int, list[dict[str, Any]]]:
        """Where the boxes of an image begin in the columns of this prefix, and their annotations."""
        start, end = self._columns[offsets][position : position + 2].tolist()
        values = (
            self._columns[prefix + name][start:end].tolist() for name in ("boxes", "category_ids", "scores")
        )
        return start, [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category_id, "score": score}
            for box, category_id, score in zip(*values)
        ]


def shard_columns(
    table: pa.Table, kept: np.ndarray, ignored: np.ndarray | None = None, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What a dataset takes from one shard, for :func:`join_columns`.

    Args:
        table: of the store's schema. Skipped images are left out.
        kept: bool, which of all boxes in the table.
        ignored: likewise, which are neither objects nor background. None: there are no columns of them.
        weights: float32, of all boxes in the table. None: there is no column of them.
    """
    labeled = table["skipped"].is_null().to_numpy()
    counts = box_counts(table)
    rows = np.repeat(np.arange(table.num_rows), counts)
    names = pc.filter(table["file_name"], pa.array(labeled))
    masks = pc.list_flatten(table["masks"])
    mask_lengths = np.zeros(len(rows), np.int32)  # zero where a row has no masks
    has_mask = np.repeat(pc.list_value_length(table["masks"]).to_numpy() > 0, counts)
    mask_lengths[has_mask] = pc.binary_length(masks).to_numpy()
    boxes = {
        "boxes": flat_values(table, "boxes").reshape(-1, 4),
        "scores": flat_values(table, "scores"),
        "category_ids": flat_values(table, "category_ids"),
    }
    columns = {
        "names": characters(names),
        "name_lengths": pc.binary_length(names).to_numpy(),
        "sizes": np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1)[labeled],
        "box_lengths": np.bincount(rows[kept], minlength=table.num_rows)[labeled],
        **{name: values[kept] for name, values in boxes.items()},
        "masks": characters(pc.filter(masks, pa.array(kept[has_mask]))),
        "mask_lengths": mask_lengths[kept],
    }
    if weights is not None:
        columns["weights"] = weights[kept]
    if ignored is not None:
        columns["ignored_lengths"] = np.bincount(rows[ignored], minlength=table.num_rows)[labeled]
        columns.update({f"ignored_{name}": values[ignored] for name, values in boxes.items()})
    return columns


def join_columns(shards: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The columns of all shards, one after the other.

    Returns:
        ``names`` (UTF-8) and ``name_offsets`` (N + 1,); ``sizes`` (N, 2), height and width; ``box_offsets``
        (N + 1,); ``boxes`` (B, 4) XYXY in pixels, ``scores`` (B,), ``category_ids`` (B,); if asked for ``weights``
        (B,); and if there are masks ``masks`` (ASCII) and ``mask_offsets`` (B + 1,). Boxes to ignore, if asked for,
        likewise: ``ignored_offsets``,
        ``ignored_boxes``, ``ignored_scores``, ``ignored_category_ids``. What belongs to item i reaches from the i-th
        offset to the next one.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for shard in shards:
        for name, values in shard.items():
            parts.setdefault(name, []).append(values)
    columns = {}
    for name in list(parts):
        column = np.concatenate(parts.pop(name))
        if name.endswith("_lengths"):
            name = name.replace("_lengths", "_offsets")
            column = np.concatenate([[0], np.cumsum(column, dtype=np.int64)])
        columns[name] = column
    if not len(columns.get("masks", "none")):
        del columns["masks"], columns["mask_offsets"]
    return columns


def characters(texts: pa.ChunkedArray) -> np.ndarray:
    """All strings, one after the other, in UTF-8."""
    return np.frombuffer("".join(texts.to_pylist()).encode(), np.uint8)
