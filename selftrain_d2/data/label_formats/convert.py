"""Labels written in a format; each is what :func:`~selftrain_d2.data.label_formats.detect.read_labels` reads back."""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import yaml

from selftrain_d2.data.label_formats.label_set import LabelSet, logger
from selftrain_d2.errors import InputError
from selftrain_d2.files import write_json, write_text, writing

FORMATS = ("coco", "yolo", "voc")


def format_of(destination: str | os.PathLike, named: str | None = None) -> str:
    """The format to write.

    Raises:
        InputError: it is neither named nor told by the path's ending.
    """
    told = {".json": "coco", ".yaml": "yolo", ".yml": "yolo"}.get(Path(destination).suffix.lower())
    if named is None and told is None:
        raise InputError(f"{destination} does not tell its format: give --to {', '.join(FORMATS)}.")
    if told is not None and named not in (None, told):
        raise InputError(f"{destination} ends as a file of {told} does, but --to is {named}: change one.")
    return named or told


def write_labels(
    labels: LabelSet, destination: str | os.PathLike, to: str, *, copy_images: bool = False
) -> Counter:
    """Write labels.

    Args:
        destination: COCO: the JSON file. YOLO: a folder, or ``data.yaml`` in it. VOC: a folder.
        to: one of FORMATS.
        copy_images: copy the images into the folder of YOLO or VOC; by default they are linked.

    Returns:
        How many ``images`` and ``boxes`` were written, and of what else nothing was.

    Raises:
        InputError: the folder is there and not empty, names collide, or the disk cannot be written.
    """
    destination = Path(destination)
    counts: Counter = Counter(images=len(labels.file.content["images"]))
    if to == "coco":
        with writing(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
        write_json(destination, labels.file.content)
        counts["boxes"] = len(labels.file.annotations)
        return counts
    folder = destination.parent if destination.suffix.lower() in (".yaml", ".yml") else destination
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: choose another folder.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    objects = defaultdict(list)
    for annotation in labels.file.annotations:
        objects[annotation["image_id"]].append(annotation)
    _check_stems(labels, to == "voc")
    write = {"yolo": _write_yolo, "voc": _write_voc}[to]
    write(labels, folder, objects, counts)
    _place_images(labels, folder / ("images" if to == "yolo" else "JPEGImages"), to == "voc", copy_images)
    if to == "yolo":  # last: what has it is complete
        names = dict(enumerate(labels.file.class_names))
        content = {"train": "images", "names": names}
        write_text(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return counts


def _check_stems(labels: LabelSet, flat: bool) -> None:
    seen: dict[str, str] = {}
    for image in labels.file.content["images"]:
        name = image["file_name"]
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise InputError(
                f"{labels.file.path}: image {name} lies outside the image folder; name it inside."
            )
        other = seen.setdefault(os.path.splitext(_flat_name(name) if flat else name)[0], name)
        if other != name:
            raise InputError(
                f"{labels.file.path}: {other} and {name} would share one file of labels: rename one."
            )


def _write_yolo(labels: LabelSet, folder: Path, objects: Mapping[Any, list], counts: Counter) -> None:
    places = {
        c["id"]: i for i, c in enumerate(sorted(labels.file.content["categories"], key=lambda c: c["id"]))
    }
    kept = [a for a in labels.file.annotations if not a["iscrowd"]]
    # Ultralytics takes boxes or polygons, not both in one set.
    polygons = bool(kept) and all(_is_polygon(a.get("segmentation")) for a in kept)
    if not polygons:
        counts["masks left out"] = sum(bool(a.get("segmentation")) for a in kept)
    for image in labels.file.content["images"]:
        lines = []
        for annotation in objects[image["id"]]:
            if annotation["iscrowd"]:
                counts["crowd regions left out"] += 1
                continue
            size = image["width"], image["height"]
            x, y, w, h = annotation["bbox"]
            points = annotation["segmentation"][0] if polygons else [x + w / 2, y + h / 2, w, h]
            words = [str(places[annotation["category_id"]])]
            words += [f"{value / size[i % 2]:.10g}" for i, value in enumerate(points)]
            if annotation.get("score") is not None:
                words.append(f"{annotation['score']:.9g}")
            lines.append(" ".join(words) + "\n")
            counts["boxes"] += 1
        file = (folder / "labels" / image["file_name"]).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(lines))


def _is_polygon(segmentation: Any) -> bool:
    return isinstance(segmentation, list) and len(segmentation) == 1 and len(segmentation[0]) >= 6


def _write_voc(labels: LabelSet, folder: Path, objects: Mapping[Any, list], counts: Counter) -> None:
    names = {c["id"]: c["name"] for c in labels.file.content["categories"]}
    (folder / "Annotations").mkdir()
    for image in labels.file.content["images"]:
        flat = _flat_name(image["file_name"])
        root = Element("annotation")
        SubElement(root, "folder").text = "JPEGImages"
        SubElement(root, "filename").text = flat
        size = SubElement(root, "size")
        for key, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
            SubElement(size, key).text = str(value)
        for annotation in objects[image["id"]]:
            item = SubElement(root, "object")
            SubElement(item, "name").text = names[annotation["category_id"]]
            SubElement(item, "difficult").text = str(annotation["iscrowd"])
            if annotation.get("score") is not None:
                SubElement(item, "score").text = f"{annotation['score']:.9g}"
            box = SubElement(item, "bndbox")
            for key, value in _whole_pixels(annotation["bbox"], image).items():
                SubElement(box, key).text = str(value)
            counts["boxes"] += 1
            counts["masks left out"] += bool(annotation.get("segmentation"))
        indent(root)
        file = (folder / "Annotations" / flat).with_suffix(".xml")
        write_text(file, tostring(root, encoding="unicode") + "\n")


def _whole_pixels(bbox: list[float], image: Mapping[str, Any]) -> dict[str, int]:
    """VOC's corners: whole pixels from 1, the last included, at least one of them."""
    corners = {}
    for i, (axis, length) in enumerate((("x", image["width"]), ("y", image["height"]))):
        first = min(max(round(bbox[i]), 0), length - 1) + 1
        corners[f"{axis}min"] = first
        corners[f"{axis}max"] = max(min(round(bbox[i] + bbox[i + 2]), length), first)
    return {key: corners[key] for key in ("xmin", "ymin", "xmax", "ymax")}


def _flat_name(name: str) -> str:
    return name.replace("/", "_")  # VOC has one folder


def _place_images(labels: LabelSet, folder: Path, flat: bool, copy: bool) -> None:
    if labels.image_root is None:
        logger.warning(f"The folder of the images is not known (--images): put them into {folder}.")
        return
    for image in labels.file.content["images"]:
        name = image["file_name"]
        source = os.path.abspath(os.path.join(labels.image_root, name))
        if not os.path.isfile(source):
            raise InputError(f"{labels.file.path}: image {source} does not exist: correct --images.")
        target = folder / (_flat_name(name) if flat else name)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copyfile if copy else os.symlink)(source, target)
