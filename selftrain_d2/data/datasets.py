"""Datasets of detectron2's catalog: folders of images, human labels in COCO JSON, pseudo-label folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from selftrain_d2.data.coco_datasets import CocoDataset
from selftrain_d2.data.coco_file import CocoFile, coco_class_names, read_coco  # noqa: F401  (imported from here)
from selftrain_d2.data.image_files import read_image_size
from selftrain_d2.data.image_sources import list_images
from selftrain_d2.data.label_maps import VOID
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.pseudo_labels.selection import ScoreThreshold, resolve_thresholds
from selftrain_d2.errors import InputError
from selftrain_d2.storage import is_folder, missing_files

logger = logging.getLogger(__name__)


def load_image_folder(folder: str | os.PathLike) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Dataset dicts of all images below a folder, without annotations.

    Returns:
        See :func:`load_images`.

    Raises:
        InputError: the folder is missing, or has no readable image.
    """
    return load_images(folder, list_images(folder))


def load_images(
    image_root: str | os.PathLike, names: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Dataset dicts of images, without annotations.

    Args:
        image_root, names: as in :class:`~selftrain_d2.data.image_sources.ImageSource`.

    Returns:
        The dicts (``file_name, image_id, height, width``; ``image_id`` is the name), and the unreadable files with
        their reasons.

    Raises:
        InputError: none can be read.
    """
    dicts, unreadable = [], {}
    for name in names:
        path = os.path.join(image_root, name)
        try:
            height, width = read_image_size(path)
        except OSError as error:
            unreadable[name] = str(error)
            continue
        dicts.append({"file_name": path, "image_id": name, "height": height, "width": width})
    if unreadable:
        first, reason = next(iter(unreadable.items()))
        if not dicts:
            raise InputError(
                f"Image folder {image_root} has no readable image: {len(unreadable)} cannot be read, e.g. {first}: "
                f"{reason}."
            )
        logger.warning(f"{image_root}: skipped {len(unreadable)} unreadable images, e.g. {first}: {reason}")
    return dicts, unreadable


def register_image_folder(name: str, folder: str | os.PathLike, names: Sequence[str] | None = None) -> None:
    """Register a plain folder of images, nested or not, as an unlabeled dataset.

    Unreadable files are skipped with a warning; once the dataset was loaded,
    ``MetadataCatalog.get(name).unreadable_files`` maps each to its reason.

    Args:
        names: images below the folder, or members of its archives; all images of the folder without.

    Raises:
        InputError: the folder is missing or empty, or the name is taken.
    """
    if names is None:
        list_images(folder)  # a wrong path is told now, not hours later

    def load() -> list[dict[str, Any]]:
        dicts, unreadable = load_image_folder(folder) if names is None else load_images(folder, names)
        metadata = MetadataCatalog.get(name)
        if not hasattr(metadata, "unreadable_files"):
            metadata.unreadable_files = unreadable
        return dicts

    register_dataset(name, load)
    MetadataCatalog.get(name).set(image_root=str(folder), evaluator_type="none")


def register_pseudo_labels(
    name: str,
    folder: str | os.PathLike,
    score_thresh: ScoreThreshold = 0.5,
    image_root: str | os.PathLike | None = None,
    *,
    top_k: int | None = None,
    boxes_per_image: float | None = None,
    ignore_score_thresh: ScoreThreshold | None = None,
    localization_thresh: float | None = None,
    score_weighted: bool = False,
) -> None:
    """Register a folder of pseudo labels (see ``generate_pseudo_labels``) as a dataset.

    ``DatasetCatalog.get(name)`` gives a :class:`PseudoLabelDataset`, a sequence that makes each dict when asked.

    Args:
        name: for ``DATASETS.PSEUDO_TRAIN``.
        folder: what ``generate_pseudo_labels`` wrote.
        score_thresh: boxes below this score are left out, pixels ignored: one number, or one by class name. The
            paper uses 0.5.
        image_root: where the images are now, if they were moved since.
        top_k, boxes_per_image, ignore_score_thresh, localization_thresh, score_weighted: see ``load_pseudo_labels``.

    Raises:
        InputError: no finished pseudo labels are there, a threshold lies under the floor of what was
            written or is for an unknown class, or the name is taken.
    """
    manifest = read_manifest(folder)
    selection = {
        "score_thresh": score_thresh,
        "top_k": top_k,
        "boxes_per_image": boxes_per_image,
        "ignore_score_thresh": ignore_score_thresh,
        "localization_thresh": localization_thresh,
        "score_weighted": score_weighted,
    }
    resolve_thresholds(manifest, **selection)  # a mistake is told now
    register_dataset(name, lambda: load_pseudo_labels(folder, image_root=image_root, **selection))
    metadata = MetadataCatalog.get(name).set(pseudo_label_folder=str(folder), evaluator_type="none")
    if "stuff_classes" in manifest:
        metadata.set(stuff_classes=list(manifest["stuff_classes"]), ignore_label=VOID)
    else:
        metadata.set(thing_classes=list(manifest["thing_classes"]))


def register_human_labels(name: str, json_file: str | os.PathLike, image_root: str | os.PathLike) -> None:
    """Check a COCO JSON with ``check_coco_json``, then register it as detectron2 does.

    Like ``register_coco_instances``, but a mistake in the file is told now and in one sentence, what can be is
    repaired, and the names of classes and keypoints are known to the catalog before the dataset is loaded.

    Raises:
        InputError: see :func:`check_coco_json`; or the name is taken.
    """
    file = read_human_coco(json_file, image_root)
    json_file, image_root = str(json_file), str(image_root)
    dataset = CocoDataset(name, json_file, image_root, checked=True)
    register_dataset(name, dataset)
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")
    dataset.describe(file)


def register_dataset(name: str, load) -> None:
    if name in DatasetCatalog:
        raise InputError(f"A dataset named {name!r} is registered already: choose another name.")
    DatasetCatalog.register(name, load)


def unregister(name: str) -> None:
    """Remove a dataset and its metadata from detectron2's catalogs. Nothing happens if it is not there."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)


def check_coco_json(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    allow_flat: bool = True,
    mend_image: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Read a COCO JSON of human labels and check all that would fail later, or train on nonsense.

    Args:
        allow_flat: only warn of boxes without width or height. Training drops them, and COCO's own train2017 has two.
        mend_image: called with each image's entry before it is checked, to correct it in place.

    Returns:
        The parsed file, repaired as :mod:`selftrain_d2.data.coco_file` says.

    Raises:
        InputError: naming the file and the first offender: an image file that does not exist, or see
            :func:`selftrain_d2.data.coco_file.read_coco`.
    """
    return read_human_coco(json_file, image_root, allow_flat=allow_flat, mend_image=mend_image).content


def read_human_coco(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    masks: bool = False,
    allow_flat: bool = True,
    mend_image: Callable[[dict[str, Any]], None] | None = None,
) -> CocoFile:
    """:func:`selftrain_d2.data.coco_file.read_coco`, with a check that the image files are there."""
    if not is_folder(image_root):
        raise InputError(f"Image folder {image_root} (for {json_file}) does not exist or is not a folder.")
    file = read_coco(json_file, masks=masks, allow_flat=allow_flat, mend_image=mend_image)
    missing = missing_files(image_root, (image["file_name"] for image in file.content["images"]))
    if missing:
        raise InputError(
            f"{json_file} names {len(missing)} images that are not in {image_root}, e.g. {missing[0]}: "
            "check the image folder."
        )
    return file


def class_names(name: str) -> list[str] | None:
    """Names of a registered dataset's classes, of objects or else of pixels; None where it has none."""
    metadata = MetadataCatalog.get(name)
    return metadata.get("thing_classes") or metadata.get("stuff_classes")


def check_same_classes(
    expected: Sequence[str], found: Sequence[str], where: str, reference: str, advice: str = ""
) -> None:
    """Raise InputError unless two datasets (or models) have the same classes in the same order.

    Args:
        expected, found: class names by contiguous id.
        where, reference: what has ``found`` and ``expected``, for the message.
        advice: what to do where the names are the same and their order is not, for the message.
    """
    difference = difference_of_classes(expected, found)
    if difference:
        advice = f"; {advice}" if advice and sorted(expected) == sorted(found) else ""
        raise InputError(f"{where} has other classes than {reference}: {difference}{advice}.")


def difference_of_classes(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """What differs between two lists of class names by contiguous id, for the middle of a sentence; None if nothing."""
    if list(expected) == list(found):
        return None
    lacks, more = (
        [n for n in one if n not in other] for one, other in ((expected, found), (found, expected))
    )
    if lacks or more:
        parts = [
            f"{word} {', '.join(names[:5])}" for word, names in (("lacking", lacks), ("with", more)) if names
        ]
        differing = " and ".join(parts)
    else:
        place, one, other = next((i, a, b) for i, (a, b) in enumerate(zip_longest(found, expected)) if a != b)
        differing = (
            f"the same in another order, the first that differs is number {place}, {one!r} for {other!r}"
        )
    return f"{_shortened(found)} against {_shortened(expected)}, {differing}"


def _shortened(names: Sequence[str]) -> str:
    return f"[{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}] ({len(names)})"
