"""COCO files in detectron2's catalog, read as :mod:`selftrain_d2.data.coco_file` does, whoever registered them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from selftrain_d2.data.coco_file import CocoFile, contiguous_ids, dataset_dicts, read_coco
from selftrain_d2.errors import InputError


class CocoDataset:
    """A COCO JSON in detectron2's catalog: called, it gives the dataset dicts, repaired.

    A box whose mask cannot be read stays, without the mask; with ``masks`` it is left out.

    Attributes:
        checked: whether the file was read when it was registered.
    """

    def __init__(self, name: str, json_file: str, image_root: str, checked: bool = False):
        self.name = name
        self.json_file = json_file
        self.image_root = image_root
        self.checked = checked

    def __call__(self, masks: bool = False) -> list[dict[str, Any]]:
        return dataset_dicts(self.read(masks), self.image_root)

    def read(self, masks: bool = False) -> CocoFile:
        """The file, with which the metadata is completed.

        Raises:
            InputError: see :func:`selftrain_d2.data.coco_file.read_coco`; or the metadata says otherwise.
        """
        points = MetadataCatalog.get(self.name).get("keypoint_names")
        file = read_coco(self.json_file, masks=masks, keypoints=len(points) if points else None)
        self.describe(file)
        return file

    def describe(self, file: CocoFile) -> None:
        """Complete the metadata, as ``load_coco_json`` does, and with the file's keypoints."""
        metadata = MetadataCatalog.get(self.name)
        facts: dict[str, Any] = {
            "thing_classes": file.class_names,
            "thing_dataset_id_to_contiguous_id": contiguous_ids(file),
        }
        for key, value in facts.items():
            known = metadata.get(key)
            if known is None:
                metadata.set(**{key: value})
            elif type(value)(known) != value:
                raise InputError(
                    f"{self.json_file} has other {key} than the metadata of {self.name!r}: {value} against {known}."
                )
        names = metadata.get("keypoint_names") or file.keypoint_names
        if names:
            if metadata.get("keypoint_names") is None:
                metadata.keypoint_names = names
            if metadata.get("keypoint_flip_map") is None:
                metadata.keypoint_flip_map = mirrored_keypoints(names)


def mirrored_keypoints(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of keypoints that change places in a mirror: those whose names differ in "left" and "right" alone."""
    pairs = ((name, name.replace("left", "right")) for name in names if "left" in name)
    return [(left, right) for left, right in pairs if right in names]


def coco_dataset(name: str) -> CocoDataset | None:
    """A registered COCO file, ours or of detectron2's ``register_coco_instances``; None for another dataset."""
    load = DatasetCatalog[name]
    if isinstance(load, CocoDataset):
        return load
    if getattr(load, "__module__", None) != register_coco_instances.__module__:
        return None
    metadata = MetadataCatalog.get(name)
    return CocoDataset(name, str(metadata.json_file), str(metadata.image_root))


@contextlib.contextmanager
def reading_coco(names: Iterable[str], masks: bool = False) -> Iterator[None]:
    """Within the block ``DatasetCatalog.get`` reads COCO files as this package does, whoever registered them.

    Args:
        masks: see :func:`selftrain_d2.data.coco_file.read_coco`.
    """
    datasets = {name: coco_dataset(name) for name in names}
    with catalog_with({n: functools.partial(d, masks) for n, d in datasets.items() if d is not None}):
        yield


@contextlib.contextmanager
def catalog_with(loaders: Mapping[str, Callable[[], Any]]) -> Iterator[None]:
    """Within the block registered datasets are loaded by other functions."""
    before = {name: DatasetCatalog[name] for name in loaders}
    DatasetCatalog.update(loaders)
    try:
        yield
    finally:
        DatasetCatalog.update(before)
