"""Datasets for semantic segmentation: PASCAL VOC 2012, and any folder of images with a folder of masks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from selftrain_d2.data.datasets import list_images, read_image_size, register_dataset
from selftrain_d2.data.label_maps import VOID, read_label_map, voc_colours
from selftrain_d2.errors import InputError
from selftrain_d2.storage import is_address

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# Split -> folder of its masks. trainaug has those of SBD (Hariharan et al. 2011) besides VOC's own.
VOC_MASKS = {"train": "SegmentationClass", "val": "SegmentationClass", "trainaug": "SegmentationClassAug"}
VOC_NAME = "voc_2012_sem_seg_{}"

_THREADS = 8


def load_voc_2012(root: str | os.PathLike, split: str) -> list[dict[str, Any]]:
    """Dataset dicts of PASCAL VOC 2012 segmentation.

    The folder is the usual one::

        JPEGImages/*.jpg
        SegmentationClass/*.png                              VOC's own
        SegmentationClassAug/*.png                           with SBD's, for trainaug
        ImageSets/Segmentation/{train,val,trainaug}.txt      trainaug.txt comes with SBD's masks

    Args:
        root: the folder ``VOC2012``.
        split: train (1,464 images), val (1,449), trainaug (10,582), or aug: the images of trainaug that are not in
            train, without their masks, to be pseudo-labeled.

    Returns:
        dicts with ``file_name, image_id, height, width``, and ``sem_seg_file_name`` (not for aug).

    Raises:
        InputError: an unknown split, a missing file, or a mask of another size than its image.
    """
    root = Path(root)
    if split == "aug":
        labeled = set(_voc_ids(root, "train"))
        return _image_dicts(
            (root / "JPEGImages" / f"{i}.jpg", i, None)
            for i in _voc_ids(root, "trainaug")
            if i not in labeled
        )
    if split not in VOC_MASKS:
        raise InputError(f"PASCAL VOC 2012 has no split {split!r}: use {', '.join(VOC_MASKS)} or aug.")
    folder = root / VOC_MASKS[split]
    if not folder.is_dir():
        raise InputError(
            f"{folder} does not exist: "
            + (
                "put the masks of SBD for PASCAL VOC's images there, named like the images."
                if split == "trainaug"
                else "it comes with PASCAL VOC 2012 (VOCtrainval_11-May-2012.tar)."
            )
        )
    return _image_dicts(
        (root / "JPEGImages" / f"{i}.jpg", i, folder / f"{i}.png") for i in _voc_ids(root, split)
    )


def voc_2012_places() -> list[Path]:
    """Where PASCAL VOC 2012 may be: ``VOC2012`` or ``VOCdevkit/VOC2012`` below detectron2's folder of datasets.

    That is the environment variable DETECTRON2_DATASETS, or ``datasets`` in the working directory.
    """
    datasets = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    return [datasets / "VOC2012", datasets / "VOCdevkit" / "VOC2012"]


def voc_2012_root() -> Path:
    """The first of :func:`voc_2012_places` that is there.

    Raises:
        InputError: none is.
    """
    places = voc_2012_places()
    for place in places:
        if place.is_dir():
            return place
    raise InputError(
        f"PASCAL VOC 2012 is neither in {places[0]} nor in {places[1]}: unpack it there, or set DETECTRON2_DATASETS."
    )


def register_voc_2012() -> None:
    """Register voc_2012_sem_seg_{train,val,trainaug,aug}. Nothing is read until one is used.

    Importing ``selftrain_d2`` does this, as importing detectron2 registers its datasets.
    """
    for split in (*VOC_MASKS, "aug"):
        name = VOC_NAME.format(split)
        if name not in DatasetCatalog:
            register_dataset(name, lambda split=split: load_voc_2012(voc_2012_root(), split))
            _set_metadata(name, VOC_CLASSES, "none" if split == "aug" else "sem_seg")
            MetadataCatalog.get(name).stuff_colors = voc_colours()[: len(VOC_CLASSES)].tolist()


def load_segmentation_folder(
    images: str | os.PathLike,
    masks: str | os.PathLike,
    classes: Sequence[str],
    names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Dataset dicts of a folder of images, nested or not, and one of masks, all of them checked.

    The mask of ``images/a/b.jpg`` is ``masks/a/b.png``; see ``read_label_map`` for what it may hold.

    Args:
        images, masks: the folders.
        classes: names; the first is that of id 0. Pixels of id 255 are ignored.
        names: of the images in use, relative to their folder; all by default.

    Returns:
        dicts with ``file_name, image_id, height, width, sem_seg_file_name``; ``image_id`` is the path relative to
        the folder of images.

    Raises:
        InputError: naming the first file: a folder or mask that is missing, an unreadable file, a mask of another
            size than its image, a class id without a name, or two images of one mask. Or two classes have one name.
    """
    if is_address(images):
        raise InputError(
            f"Image folder {images}: images with masks beside them are read from a file system alone."
        )
    if not Path(masks).is_dir():
        raise InputError(f"Mask folder {masks} does not exist or is not a folder.")
    if not 1 <= len(classes) <= VOID:
        raise InputError(f"{len(classes)} classes are named: masks can have 1 to {VOID}.")
    if len(set(classes)) < len(classes):
        repeated = next(name for i, name in enumerate(classes) if name in classes[:i])
        raise InputError(f"The class {repeated!r} is named twice: each class id has a name of its own.")
    names = list_images(images) if names is None else names
    owner: dict[str, str] = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        if stem in owner:
            raise InputError(f"{images} has both {owner[stem]} and {name}, which share the mask {stem}.png.")
        owner[stem] = name
    dicts = _image_dicts(
        (Path(images, name), name, Path(masks, f"{stem}.png")) for stem, name in owner.items()
    )
    with ThreadPoolExecutor(_THREADS) as pool:  # Pillow decodes without Python's lock
        for sample, largest in zip(dicts, pool.map(_largest_id, (d["sem_seg_file_name"] for d in dicts))):
            if largest >= len(classes):
                raise InputError(
                    f"Mask {sample['sem_seg_file_name']} has the class id {largest}, but only {len(classes)} classes "
                    f"are named (ids 0 to {len(classes) - 1}, and {VOID} to ignore a pixel)."
                )
    return dicts


def register_segmentation_folder(
    name: str, images: str | os.PathLike, masks: str | os.PathLike, classes: Sequence[str]
) -> None:
    """Register a folder of images with a folder of masks, once all of them were checked.

    Args:
        name: for DATASETS.TRAIN or DATASETS.TEST.
        images, masks, classes: see :func:`load_segmentation_folder`.

    Raises:
        InputError: see there; or the name is taken.
    """
    dicts = load_segmentation_folder(images, masks, classes)
    register_dataset(name, lambda: [dict(d) for d in dicts])
    _set_metadata(name, classes, "sem_seg")
    MetadataCatalog.get(name).set(image_root=str(images), sem_seg_root=str(masks))


def _set_metadata(name: str, classes: Sequence[str], evaluator_type: str) -> None:
    MetadataCatalog.get(name).set(
        stuff_classes=list(classes), ignore_label=VOID, evaluator_type=evaluator_type
    )


def _voc_ids(root: Path, split: str) -> list[str]:
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        ids = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The list {path} cannot be read ({error}): it names the images of the split, one a line."
        ) from error
    if not ids:
        raise InputError(f"The list {path} is empty: it names the images of the split, one a line.")
    return ids


def _image_dicts(entries: Iterable[tuple[Path, str, Path | None]]) -> list[dict[str, Any]]:
    """From (path of the image, id, path of the mask or None), in their order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda entry: _image_dict(*entry), entries))


def _image_dict(file: Path, image_id: str, mask: Path | None) -> dict[str, Any]:
    size = _size("Image", file)
    sample = {"file_name": str(file), "image_id": image_id, "height": size[0], "width": size[1]}
    if mask is None:
        return sample
    if not mask.is_file():
        raise InputError(f"Image {file} has no mask: {mask} does not exist.")
    mask_size = _size("Mask", mask)
    if mask_size != size:
        raise InputError(
            f"Mask {mask} is {mask_size[1]} x {mask_size[0]} pixels, but its image {file} {size[1]} x {size[0]}: "
            "they must have one size."
        )
    return {**sample, "sem_seg_file_name": str(mask)}


def _size(what: str, file: Path) -> tuple[int, int]:
    try:
        return read_image_size(file)
    except OSError as error:
        raise InputError(f"{what} {file} cannot be read ({error}); repair or remove it.") from error


def _largest_id(file: str) -> int:
    """The largest class id in a mask; -1 if all of it is ignored."""
    labels = read_label_map(file, np.int16)
    return int(labels.max(initial=-1, where=labels != VOID))


register_voc_2012()
