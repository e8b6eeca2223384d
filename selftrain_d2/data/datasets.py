"""Datasets of detectron2's catalog: folders of images, human labels in COCO JSON, pseudo-label folders."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from selftrain_d2.data.image_files import read_image_size
from selftrain_d2.data.image_sources import list_images
from selftrain_d2.data.label_maps import VOID
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.pseudo_labels.selection import ScoreThreshold, resolve_thresholds
from selftrain_d2.errors import InputError
from selftrain_d2.files import read_json

logger = logging.getLogger(__name__)

# How far (pixels) a box may stick out of its image. COCO's own files do so by rounding.
_BORDER_TOLERANCE = 1.0


def load_image_folder(folder: str | os.PathLike) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Dataset dicts of all images below a folder, without annotations.

    Returns:
        The dicts (``file_name, image_id, height, width``; ``image_id`` is the path relative to the folder),
        and the unreadable files with their reasons.

    Raises:
        InputError: the folder is missing, or has no readable image.
    """
    dicts, unreadable = [], {}
    for name in list_images(folder):
        path = os.path.join(folder, name)
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
                f"Image folder {folder} has no readable image: {len(unreadable)} cannot be read, e.g. {first}: "
                f"{reason}."
            )
        logger.warning(f"{folder}: skipped {len(unreadable)} unreadable images, e.g. {first}: {reason}")
    return dicts, unreadable


def register_image_folder(name: str, folder: str | os.PathLike) -> None:
    """Register a plain folder of images, nested or not, as an unlabeled dataset.

    Unreadable files are skipped with a warning; once the dataset was loaded,
    ``MetadataCatalog.get(name).unreadable_files`` maps each to its reason.

    Raises:
        InputError: the folder is missing or empty, or the name is taken.
    """
    list_images(folder)  # a wrong path is told now, not hours later

    def load() -> list[dict[str, Any]]:
        dicts, unreadable = load_image_folder(folder)
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
) -> None:
    """Register a folder of pseudo labels (see ``generate_pseudo_labels``) as a dataset.

    ``DatasetCatalog.get(name)`` gives a :class:`PseudoLabelDataset`, a sequence that makes each dict when asked.

    Args:
        name: for ``DATASETS.PSEUDO_TRAIN``.
        folder: what ``generate_pseudo_labels`` wrote.
        score_thresh: boxes below this score are left out, pixels ignored: one number, or one by class name. The
            paper uses 0.5.
        image_root: where the images are now, if they were moved since.
        top_k, boxes_per_image: see ``load_pseudo_labels``.

    Raises:
        InputError: no finished pseudo labels are there, a threshold lies under the floor of what was
            written or is for an unknown class, or the name is taken.
    """
    manifest = read_manifest(folder)
    resolve_thresholds(manifest, score_thresh, top_k, boxes_per_image)  # a mistake is told now
    selection = {"score_thresh": score_thresh, "top_k": top_k, "boxes_per_image": boxes_per_image}
    register_dataset(name, lambda: load_pseudo_labels(folder, image_root=image_root, **selection))
    metadata = MetadataCatalog.get(name).set(pseudo_label_folder=str(folder), evaluator_type="none")
    if "stuff_classes" in manifest:
        metadata.set(stuff_classes=list(manifest["stuff_classes"]), ignore_label=VOID)
    else:
        metadata.set(thing_classes=list(manifest["thing_classes"]))


def register_human_labels(name: str, json_file: str | os.PathLike, image_root: str | os.PathLike) -> None:
    """Check a COCO JSON with ``check_coco_json``, then register it as detectron2 does.

    Like ``register_coco_instances``, but a mistake in the file is told now and in one sentence, and the
    class names are known to the catalog before the dataset is loaded.

    Raises:
        InputError: see :func:`check_coco_json`; or the name is taken.
    """
    coco = check_coco_json(json_file, image_root)
    json_file, image_root = str(json_file), str(image_root)
    register_dataset(name, lambda: load_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=coco_class_names(coco),
    )


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


def coco_class_names(coco: dict[str, Any]) -> list[str]:
    """Class names in the order of detectron2's contiguous ids, that is by category id."""
    return [c["name"] for c in sorted(coco["categories"], key=lambda c: c["id"])]


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
        The parsed file.

    Raises:
        InputError: naming the file and the first offender: not JSON, no categories or images, an image file
            that does not exist, an unknown category or image id, or a box that is NaN, of negative size (without
            ``allow_flat`` also of zero area), or outside its image.
    """
    path = Path(json_file)
    if not path.is_file():
        raise InputError(f"COCO JSON {path} does not exist.")
    if "://" not in str(image_root) and not Path(image_root).is_dir():
        raise InputError(f"Image folder {image_root} (for {path}) does not exist or is not a folder.")
    coco = read_json(path)
    if not isinstance(coco, dict):
        raise InputError(
            f"{path} is not a COCO file: its top level is a {type(coco).__name__}, not an object."
        )
    for key in ("categories", "images"):
        if not isinstance(coco.get(key), list) or not coco[key]:
            raise InputError(f"{path} is not a COCO file to train or evaluate on: it has no {key!r}.")
    try:
        for image in coco["images"] if mend_image else ():
            mend_image(image)
        _check_entries(path, coco, image_root, allow_flat)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a COCO file: an entry lacks or has the wrong kind of {error}."
        ) from error
    return coco


def _check_entries(path: Path, coco: dict[str, Any], image_root: str | os.PathLike, allow_flat: bool) -> None:
    _check_unique(path, "categories", coco["categories"])
    _check_unique(path, "images", coco["images"])
    names = [c["name"] for c in coco["categories"]]
    if len(set(names)) < len(names):
        raise InputError(f"{path} has two categories of the same name: {_first_repeated(names)!r}.")
    isfile = PathManager.isfile if "://" in str(image_root) else os.path.isfile
    missing = [i["file_name"] for i in coco["images"] if not isfile(os.path.join(image_root, i["file_name"]))]
    if missing:
        raise InputError(
            f"{path} names {len(missing)} images that are not in {image_root}, e.g. {missing[0]}: "
            "check the image folder."
        )
    images = {image["id"]: image for image in coco["images"]}
    categories = {category["id"] for category in coco["categories"]}
    flat = []
    for annotation in coco.get("annotations", []):
        where = f"{path}, annotation {annotation.get('id')}, image {annotation['image_id']}"
        if annotation["image_id"] not in images:
            raise InputError(f"{where}: no image has that id.")
        if annotation["category_id"] not in categories:
            raise InputError(f"{where}: no category has the id {annotation['category_id']}.")
        problem = _box_problem(annotation["bbox"], images[annotation["image_id"]])
        if problem:
            raise InputError(f"{where}: the box {annotation['bbox']} (x, y, width, height) {problem}.")
        if 0 in annotation["bbox"][2:]:
            if not allow_flat:
                raise InputError(f"{where}: the box {annotation['bbox']} (x, y, width, height) has no area.")
            flat.append(annotation)
    if flat:
        logger.warning(
            f"{path}: {len(flat)} boxes without area will be left out in training, e.g. {flat[0]['bbox']} "
            f"(x, y, width, height) of image {flat[0]['image_id']}."
        )


def _box_problem(box: Sequence[float], image: dict[str, Any]) -> str | None:
    if len(box) != 4 or not all(math.isfinite(v) for v in box):
        return "is not four finite numbers"
    x, y, width, height = box
    if width < 0 or height < 0:
        return "has a negative size"
    excess = max(-x, -y, x + width - image["width"], y + height - image["height"])
    if excess > _BORDER_TOLERANCE:
        return f"lies {excess:g} pixels outside its image of {image['width']} x {image['height']}"
    return None


def _check_unique(path: Path, key: str, entries: list[dict[str, Any]]) -> None:
    ids = [entry["id"] for entry in entries]
    if len(set(ids)) < len(ids):
        raise InputError(f"{path} has two {key} of the same id: {_first_repeated(ids)}.")


def _first_repeated(values: list) -> Any:
    seen = set()
    return next(v for v in values if v in seen or seen.add(v))


def class_names(name: str) -> list[str] | None:
    """Names of a registered dataset's classes, of objects or else of pixels; None where it has none."""
    metadata = MetadataCatalog.get(name)
    return metadata.get("thing_classes") or metadata.get("stuff_classes")


def check_same_classes(
    expected: Sequence[str], found: Sequence[str], where: str, reference: str, advice: str = ""
) -> None:
    """Raise InputError unless two datasets have the same classes in the same order.

    Args:
        expected, found: class names by contiguous id.
        where, reference: what has ``found`` and ``expected``, for the message.
        advice: what to do where the names are the same and their order is not, for the message.
    """
    if list(expected) != list(found):
        advice = f"; {advice}" if advice and sorted(expected) == sorted(found) else ""
        raise InputError(
            f"{where} has other classes than {reference}: {_shortened(found)} against {_shortened(expected)}{advice}."
        )


def _shortened(names: Sequence[str]) -> str:
    return f"[{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}] ({len(names)})"
