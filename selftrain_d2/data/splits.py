"""Labeled fractions of a COCO file: one order of all images, of which each fraction is the beginning.

So fractions are nested (the 10 % contain the 5 %), drawn without replacement, and the same whichever other
fractions are asked for. Two orders:

- plain: by the SHA-256 of the seed and the image's file name. Not by its id or its place in the file, which
  change when a file is merged or written anew; and not by a random generator, whose draws shift for all images
  when one is added. So the order of two images depends on the seed and their names alone.
- stratified: greedily, on top of the plain order. The class of which the smallest share of objects was taken is
  next (of several, the rarest); of the next ``CANDIDATES`` images with that class, the one that keeps the shares
  of all classes closest to equal. Images without objects count as one more class. With as many images as there
  are classes, every class is present; very rare classes are therefore over-represented in very small fractions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from selftrain_d2.data.image_sources import list_line
from selftrain_d2.data.label_formats.detect import read_labels as read_any_labels
from selftrain_d2.data.label_formats.label_set import LabelSet
from selftrain_d2.data.prepared_folder import find_manifest, prepare_folder, write_manifest
from selftrain_d2.errors import InputError
from selftrain_d2.files import check_unchanged

TITLE = "Labeled fractions of a COCO file"
# Raise it whenever the same input would give other splits: finished folders are then made anew.
FORMAT = 2
CANDIDATES = 16


def make_splits(
    json_file: Path,
    output: Path,
    fractions: Sequence[float | str],
    *,
    seed: int = 0,
    stratified: bool = False,
    images: str | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Write labeled fractions of a COCO file; does nothing if they are there, whole and of these settings.

    For each fraction F (percent, as short as it can be written: ``10``, ``0.5``) the folder gets
    ``labeled_F.json``, the source with fewer images and annotations (crowd regions included) and all else as it
    was, and ``unlabeled_F.txt``, the sorted file names of the images left out, one a line as ``list_line`` writes
    them (none for 100). What is wrong with the source is repaired first, see :mod:`selftrain_d2.data.coco_file`.
    Images are written in the order of sampling, so the files do not depend on the order in the source either.

    Args:
        json_file: detections in COCO format, or another that ``data.label_formats`` reads.
        output: folder to make. It may exist if it is empty or an earlier output of this function.
        fractions: percent of the images, more than 0 to 100; the number of images is rounded, halves up.
        seed: of the sample.
        stratified: keep the shares of the classes equal, see above.
        images, classes: see :func:`selftrain_d2.data.label_formats.detect.read_labels`.

    Returns:
        The manifest: source, settings, images and objects of each class per fraction, SHA-256 of every file.

    Raises:
        InputError: the source is missing, no COCO file, or names an image file twice (see
            :func:`selftrain_d2.data.coco_file.read_coco`); a fraction is out of
            range, given twice, or less than half an image; ``output`` holds other files or was made with
            other settings.
    """
    percents = parse_fractions(fractions)
    json_file, output = Path(json_file), Path(output).absolute()
    labels = read_labels(json_file, images, classes)
    coco = labels.file.content
    data = json_file.read_bytes() if labels.is_coco else json.dumps(coco).encode()
    settings = {
        "source_sha256": hashlib.sha256(data).hexdigest(),
        "fractions": list(percents),
        "seed": seed,
        "stratified": stratified,
    }
    earlier = find_manifest(output, TITLE)
    if earlier:
        check_unchanged(output, earlier.get("settings", {}), settings)
    sizes = split_sizes(percents, len(coco["images"]), json_file)

    def write(folder: Path) -> dict:
        order = image_order(coco, seed, stratified)
        counts = {
            name: _write_split(folder, name, coco, order[:size], order[size:]) for name, size in sizes.items()
        }
        source = {"file": json_file.name, **_count(coco)}
        content = {"title": TITLE, "format": FORMAT, "description": __doc__, "settings": settings}
        versions = {"numpy": np.__version__}
        return write_manifest(folder, {**content, "source": source, "splits": counts, "versions": versions})

    return prepare_folder(output, TITLE, lambda manifest: manifest.get("format") == FORMAT, write)


def parse_fractions(fractions: Sequence[float | str]) -> dict[str, Decimal]:
    """Percentages by the name of their files, ascending: ``["5", 0.50]`` gives the keys ``0.5, 5``.

    Raises:
        InputError: none, one that is not a number over 0 up to 100, or the same one twice.
    """
    if not fractions:
        raise InputError("No fraction was given: name at least one percentage, e.g. --fractions 1 10 100.")
    percents: dict[str, Decimal] = {}
    for fraction in fractions:
        try:
            percent = Decimal(str(fraction))
        except InvalidOperation:
            percent = Decimal("nan")
        if not percent.is_finite() or not 0 < percent <= 100:
            raise InputError(f"Fraction {fraction} is not a percentage: give numbers over 0 and up to 100.")
        name = format(percent.normalize(), "f")
        if name in percents:
            raise InputError(f"Fraction {name} was given twice: give each once.")
        percents[name] = percent
    return dict(sorted(percents.items(), key=lambda item: item[1]))


def image_order(coco: Mapping[str, Any], seed: int, stratified: bool = False) -> list[dict[str, Any]]:
    """All images of a COCO file in the order of sampling, whatever their order in the file."""
    images = sorted(coco["images"], key=lambda image: _rank(seed, image["file_name"]))
    if not stratified:
        return images
    return [images[i] for i in stratified_order(_objects_per_class(coco, images))]


def stratified_order(objects: np.ndarray) -> list[int]:
    """An order of which every beginning has about the same share of each class.

    Args:
        objects: ``(N, C)`` numbers of objects, a row an image, a column a class.

    Returns:
        The N rows. Equally good ones keep their order.
    """
    empty = ~objects.any(axis=1)
    by_rarity = np.argsort(objects.sum(axis=0), kind="stable")
    objects = np.column_stack([objects[:, by_rarity], empty])
    totals = np.maximum(objects.sum(axis=0), 1)
    waiting = [deque(np.flatnonzero(column).tolist()) for column in objects.T]
    taken, is_taken = np.zeros(len(totals)), np.zeros(len(objects), bool)
    order: list[int] = []
    while len(order) < len(objects):
        open_classes = [number for number, queue in enumerate(waiting) if queue]
        # Of equal shares argmin takes the first: the rarest class; and images without objects last of all.
        queue = waiting[open_classes[int(np.argmin(taken[open_classes]))]]
        candidates: list[int] = []
        while queue and len(candidates) < CANDIDATES:
            image = queue.popleft()
            if not is_taken[image]:
                candidates.append(image)
        if not candidates:
            continue
        goal = (len(order) + 1) / len(objects)
        distances = ((taken + objects[candidates] / totals - goal) ** 2).sum(axis=1)
        best = candidates.pop(int(np.argmin(distances)))
        queue.extendleft(reversed(candidates))
        taken += objects[best] / totals
        is_taken[best] = True
        order.append(best)
    return order


def _rank(seed: int, file_name: str) -> str:
    return hashlib.sha256(f"{seed}\n{file_name}".encode("utf-8", "surrogatepass")).hexdigest()


def _objects_per_class(coco: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """``(N, C)`` int32: objects that are no crowd; classes by ascending id."""
    rows = {image["id"]: row for row, image in enumerate(images)}
    columns = {c: column for column, c in enumerate(sorted(c["id"] for c in coco["categories"]))}
    objects = np.zeros((len(rows), len(columns)), np.int32)
    for annotation in coco["annotations"]:
        if not annotation.get("iscrowd", 0):
            objects[rows[annotation["image_id"]], columns[annotation["category_id"]]] += 1
    return objects


def split_sizes(percents: Mapping[str, Decimal], number: int, json_file: Path) -> dict[str, int]:
    """Images of each fraction of ``number`` images; InputError where that is none."""
    return {name: _size(percent, number, json_file) for name, percent in percents.items()}


def _size(percent: Decimal, number: int, json_file: Path) -> int:
    size = int((percent * number / 100).quantize(Decimal(1), ROUND_HALF_UP))
    if size < 1:
        raise InputError(
            f"{percent} % of the {number} images of {json_file} is no image: give at least {100 / number:.3g}."
        )
    return size


def _write_split(
    folder: Path,
    name: str,
    coco: Mapping[str, Any],
    chosen: Sequence[dict[str, Any]],
    rest: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    place = {image["id"]: number for number, image in enumerate(chosen)}
    annotations = [a for a in coco["annotations"] if a["image_id"] in place]
    annotations.sort(key=lambda a: (place[a["image_id"]], a["id"]))
    split = {**coco, "images": list(chosen), "annotations": annotations}
    (folder / f"labeled_{name}.json").write_text(json.dumps(split) + "\n", encoding="utf-8")
    if rest:
        names = "".join(f"{list_line(name)}\n" for name in sorted(image["file_name"] for image in rest))
        (folder / f"unlabeled_{name}.txt").write_text(names, encoding="utf-8")
    return _count(split)


def _count(coco: Mapping[str, Any]) -> dict[str, Any]:
    crowd = [a for a in coco["annotations"] if a.get("iscrowd", 0)]
    objects = Counter(a["category_id"] for a in coco["annotations"] if not a.get("iscrowd", 0))
    return {
        "images": len(coco["images"]),
        "annotations": len(coco["annotations"]),
        "crowd_regions": len(crowd),
        "objects": {c["name"]: objects[c["id"]] for c in coco["categories"]},
    }


def read_labels(
    path: str | os.PathLike, images: str | None = None, classes: Sequence[str] | None = None
) -> LabelSet:
    """Labels to split, see :func:`selftrain_d2.data.label_formats.detect.read_labels`.

    Raises:
        InputError: it cannot be used, or has no list of annotations.
    """
    labels = read_any_labels(path, images=images, classes=classes)
    if "annotations" not in labels.file.content:
        raise InputError(f"{path} is not a COCO file of labels: it has no 'annotations'.")
    return labels
