"""YOLO: a text file an image, a line an object, positions in fractions of the image's size.

``class x y width height`` is a box by its centre, ``class x1 y1 x2 y2 x3 y3 ...`` a polygon; an odd number behind
those (six words, or eight, ten, ...) is the score, which predictions have. Layouts as Ultralytics documents them
(docs.ultralytics.com/datasets/detect): ``data.yaml`` with ``path``, ``train``, ``val``, ``test`` and ``names``; the
labels of ``.../images/a/b.jpg`` are ``.../labels/a/b.txt``, or beside the image where no folder is named images.

One difference: an image without a text file is not labeled, and is left out, where Ultralytics takes it to show
nothing. So the unlabeled images may lie among the labeled ones. An empty text file says that there is no object.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from selftrain_d2.data.image_formats import has_image_extension
from selftrain_d2.data.image_sources import list_images
from selftrain_d2.data.label_formats.label_set import (
    CocoBuilder,
    LabelSet,
    image_size,
    inside,
    logger,
    read_text,
    without_doubles,
)
from selftrain_d2.errors import InputError

DATA_YAML = ("data.yaml", "data.yml", "dataset.yaml")
CLASSES_TXT = "classes.txt"  # of LabelImg and Label Studio
# Text files of other programs beside labels.
_NO_LABELS = {CLASSES_TXT, "train.txt", "val.txt", "test.txt", "notes.txt"}


def read_yaml(
    file: Path, split: str, images: str | None, empty: bool, classes: Sequence[str] | None
) -> LabelSet:
    """A split of the data set that a ``data.yaml`` describes.

    Args:
        file: the data.yaml.
        split: train, val or test.
        images: folder of the images, in place of that in the file.
        empty: whether images without a text file show no object, as in a folder of predictions.
        classes: names in place of the file's.

    Raises:
        InputError: a file has a fault, named with its line.
    """
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is no YOLO data set: it must have the keys 'names' and 'train'.")
    names = list(classes or _names(file, content))
    if not content.get(split):
        raise InputError(f"{file} has no split {split!r}: name its images there.")
    root = file.parent
    if content.get("path") and (root / str(content["path"])).is_dir():
        root = root / str(content["path"])
    places = content[split] if isinstance(content[split], list) else [content[split]]
    found = [Path(images)] if images else [_existing(file, root, split, place) for place in places]
    labels = _read(str(file), [(place, None) for place in found], names, empty)
    labels.has_validation = bool(content.get("val")) and split == "train"
    return labels


def read_folder(
    folder: Path,
    images: str | None,
    classes: Sequence[str] | None,
    empty: bool,
    other_classes: Sequence[str] | None = None,
) -> LabelSet:
    """A folder of text files, or one with the folders images and labels.

    Args:
        other_classes: names of other labels, for a folder that has none.

    Raises:
        InputError: see :func:`read_yaml`; or the classes' names are missing.
    """
    texts = folder / "labels" if (folder / "labels").is_dir() else folder
    if classes is None:
        file = next((p / CLASSES_TXT for p in (texts, folder) if (p / CLASSES_TXT).is_file()), None)
        if file is None and other_classes is None:
            raise InputError(
                f"{folder} has YOLO labels without names of classes: give --classes NAME ... in the order of the ids, "
                f"or write them to {texts / CLASSES_TXT}, one a line."
            )
        lines = other_classes if file is None else read_text(file).splitlines()
        classes = [line.strip() for line in lines if line.strip()]
    place = Path(images) if images else _images_beside(texts)
    return _read(str(folder), [(place, texts)], list(classes), empty)


def is_labels(folder: Path) -> bool:
    """Whether a folder holds text files of labels, or a folder of them."""
    texts = folder / "labels" if (folder / "labels").is_dir() else folder
    return any(file.name not in _NO_LABELS for file in texts.rglob("*.txt"))


def _images_beside(texts: Path) -> Path:
    """``images/a`` of ``labels/a``; else the folder itself."""
    beside = _beside(texts, "labels", "images")
    return beside if beside.is_dir() else texts


def _beside(folder: Path, own: str, other: str) -> Path:
    """The path of a folder, absolute, with ``other`` in place of the last ``own`` in it, if there is one."""
    parts = list(folder.absolute().parts)
    for at in range(len(parts) - 1, 0, -1):
        if parts[at] == own:
            parts[at] = other
            break
    return Path(*parts)


def _names(file: Path, content: dict[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise InputError(f"{file}: its 'names' must be a list, or name each id from 0.")
    if content.get("nc", len(names)) != len(names):
        raise InputError(f"{file}: its 'nc' is {content['nc']}, but 'names' has {len(names)}; correct one.")
    return [str(name) for name in names]


def _existing(file: Path, root: Path, split: str, place: Any) -> Path:
    """The folder, or the list of images, that a data.yaml names."""
    place = str(place)
    # Roboflow's files say ../train/images of what lies beside them.
    tried = [root / place, file.parent / place, file.parent / place.removeprefix("../")]
    for path in tried:
        if path.exists():
            return path
    raise InputError(f"{file}: its {split!r} names {place}, and {tried[0]} does not exist; correct the path.")


def _read(source: str, places: Sequence[tuple[Path, Path | None]], names: list[str], empty: bool) -> LabelSet:
    """Read images with their labels.

    Args:
        places: folders or lists of images, each with the folder of their text files, if that is known.
    """
    pairs: list[tuple[Path, Path]] = []
    for place, texts in places:
        pairs += _pairs(place, texts)
    labeled = [(image, text) for image, text in pairs if empty or text.is_file()]
    if not labeled or not any(text.is_file() for _, text in labeled):
        image, text = pairs[0]
        raise InputError(
            f"{source}: none of its {len(pairs)} images has a file of labels, e.g. {text} for {image}; "
            "check the folders."
        )
    if len(labeled) < len(pairs):
        logger.info(
            f"{source}: {len(labeled)} labeled images; {len(pairs) - len(labeled)} without a text file are not "
            "labeled and left out (an empty text file says that there is no object)."
        )
    if len(places) == 1 and places[0][0].is_dir():
        root = os.path.abspath(places[0][0])
    else:
        root = os.path.commonpath([os.path.abspath(image.parent) for image, _ in labeled])
    builder = CocoBuilder(source, names, root)
    for image, text in labeled:
        size = image_size(image)
        builder.add(image.absolute(), size, _objects(text, size, names) if text.is_file() else [])
    return builder.finish()


def _pairs(place: Path, texts: Path | None) -> list[tuple[Path, Path]]:
    if place.is_file():
        images = _listed(place)
    else:
        images = [place / name for name in list_images(place) if has_image_extension(name)]
    images = without_doubles(images, "text file of labels")
    if texts is not None:
        pairs = [(image, (texts / image.relative_to(place)).with_suffix(".txt")) for image in images]
    else:
        pairs = [(image, _text_of(image)) for image in images]
    if place.is_dir():
        _check_orphans(place, texts, {text.absolute() for _, text in pairs})
    return pairs


def _check_orphans(place: Path, texts: Path | None, known: set[Path]) -> None:
    folder = texts if texts is not None else _text_of(place / "x.jpg").parent
    files = sorted(folder.rglob("*.txt")) if folder.is_dir() else []
    orphans = [f for f in files if f.name not in _NO_LABELS and f.absolute() not in known]
    if orphans:
        raise InputError(
            f"{len(orphans)} files of labels have no image in {place}, e.g. {orphans[0]}: add the images, or remove "
            "these files."
        )


def _listed(file: Path) -> list[Path]:
    images = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if line.strip():
            image = file.parent / line.strip()
            if not image.is_file():
                raise InputError(f"{file}, line {number}: image {image} does not exist; correct the list.")
            images.append(image)
    if not images:
        raise InputError(f"{file} names no image.")
    return images


def _text_of(image: Path) -> Path:
    return (_beside(image.parent, "images", "labels") / image.name).with_suffix(".txt")


def _objects(file: Path, size: tuple[int, int], names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        _object(line.split(), size, names, f"{file}, line {number}")
        for number, line in enumerate(read_text(file).splitlines(), start=1)
        if line.strip()
    ]


def _object(words: list[str], size: tuple[int, int], names: Sequence[str], where: str) -> dict[str, Any]:
    if len(words) < 5:
        raise InputError(
            f"{where}: it has {len(words)} columns; a box has 5 (class, x, y, width, height), with a score 6, a "
            "polygon 7 or more."
        )
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise InputError(f"{where}: {error}; correct it.") from error
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{where}: it has a number that is not finite; correct it.")
    category, *numbers = numbers
    if not category.is_integer() or not 0 <= category < len(names):
        raise InputError(
            f"{where}: the class {words[0]} is none of the {len(names)} named ones, whose ids are 0 to "
            f"{len(names) - 1}."
        )
    found: dict[str, Any] = {"category_id": int(category), "iscrowd": 0}
    if len(words) == 6 or (len(words) > 7 and len(words) % 2 == 0):
        found["score"] = numbers.pop()
        if not 0 <= found["score"] <= 1:
            raise InputError(f"{where}: the score {words[-1]} is no number from 0 to 1.")
    height, width = size
    if len(numbers) == 4:
        x, y, w, h = numbers
        box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
    else:
        xs, ys = [x * width for x in numbers[::2]], [y * height for y in numbers[1::2]]
        box = (min(xs), min(ys), max(xs), max(ys))
    if max(map(abs, numbers)) > 2:
        raise InputError(
            f"{where}: positions must be fractions of the image's size, from 0 to 1, not pixels."
        )
    found["bbox"] = inside(box, size, where)
    if len(numbers) > 4:
        points = zip((min(max(x, 0.0), width) for x in xs), (min(max(y, 0.0), height) for y in ys))
        found["segmentation"] = [[v for point in points for v in point]]
    return found
