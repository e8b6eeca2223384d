"""PASCAL VOC: an XML file an image, pixels counted from 1, the last one included.

A box of ``xmin`` 1 and ``xmax`` 1 is one pixel wide: in COCO's terms its x is xmin - 1 and its width
xmax - xmin + 1 (VOC devkit, VOCevaldet.m: overlaps are of xmax - xmin + 1). ``difficult`` objects are neither objects
nor background, which here is ``iscrowd`` 1. A ``score`` is not VOC's; our own files have it for pseudo labels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax import SAXParseException
from xml.sax.handler import ContentHandler

from selftrain_d2.data.image_sources import list_images
from selftrain_d2.data.label_formats.label_set import (
    CocoBuilder,
    LabelSet,
    image_size,
    inside,
    logger,
    read_text,
)
from selftrain_d2.errors import InputError

# Lists in ImageSets/Main for a split, the first that is there.
_LISTS = {"train": ("train.txt", "trainval.txt"), "val": ("val.txt",), "test": ("test.txt",)}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Value(NamedTuple):
    text: str
    line: int


class _Reader(ContentHandler):
    """Collects what of an XML file is needed, with the lines that it is in."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.text = ""
        self.top: dict[str, _Value] = {}  # "filename", "size/width", ...
        self.objects: list[dict[str, _Value]] = []  # "name", "bndbox/xmin", ...
        self.root = ""

    def setDocumentLocator(self, locator: Any) -> None:
        self.locator = locator

    def startElement(self, name: str, attributes: Any) -> None:
        self.root = self.root or name
        self.path.append(name)
        self.text = ""
        if self.path[1:] == ["object"]:
            self.objects.append({"": _Value("", self.locator.getLineNumber())})

    def characters(self, content: str) -> None:
        self.text += content

    def endElement(self, name: str) -> None:
        value = _Value(self.text.strip(), self.locator.getLineNumber())
        if self.path[1:2] == ["object"]:
            self.objects[-1].setdefault("/".join(self.path[2:]), value)
        else:
            self.top.setdefault("/".join(self.path[1:]), value)
        self.path.pop()
        self.text = ""


def is_labels(folder: Path) -> bool:
    """Whether a folder has XML files, itself or in ``Annotations``."""
    return any(_annotations(folder).glob("*.xml"))


def read(path: Path, split: str, images: str | None, classes: Sequence[str] | None, empty: bool) -> LabelSet:
    """A folder of XML files, one with ``Annotations``, or a list in its ``ImageSets/Main``.

    Args:
        split: where there are lists, the one that counts; without, all files do.
        images: folder of the images; default: JPEGImages or images beside Annotations, else the folder itself.
        classes: names in the order of training; default: those found in any of the XML files, sorted.
        empty: whether images without an XML file show no object, as in a folder of predictions.

    Raises:
        InputError: a file has a fault, named with its line; or an image is missing.
    """
    folder = path.parents[2] if path.is_file() else path
    annotations = _annotations(folder)
    files = sorted(annotations.glob("*.xml"))
    listed = path if path.is_file() else _list_of(folder, split)
    if listed is None and split != "train":
        raise InputError(f"{path} has no split {split!r}: there is no ImageSets/Main/{_LISTS[split][0]}.")
    read_files = {file.stem: (file, parse(file)) for file in files}
    if classes is None:
        classes = sorted({_name(file, found) for file, xml in read_files.values() for found in xml.objects})
    stems = list(read_files) if listed is None else _stems(listed, read_files)
    if listed is not None and len(stems) < len(read_files):
        logger.info(f"{path}: the {len(stems)} images of {listed}, of {len(read_files)} XML files.")
    root = Path(images) if images else _image_folder(annotations)
    names = list_images(root)
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(Path(name).stem, []).append(name)
    builder = CocoBuilder(os.fspath(path), list(classes), os.path.abspath(root))
    for stem in stems:
        file, xml = read_files[stem]
        image = root / _image_name(file, xml, by_stem.get(stem, []), set(names), root)
        size = _size(file, xml, image)
        builder.add(image.absolute(), size, [_object(file, found, size, classes) for found in xml.objects])
    others = [name for name in names if Path(name).stem not in read_files]
    if empty:
        for name in others:
            builder.add((root / name).absolute(), image_size(root / name), [])
    elif others:
        logger.info(f"{path}: {len(others)} images without an XML file are not labeled and left out.")
    labels = builder.finish()
    labels.has_validation = path.is_dir() and split == "train" and _list_of(folder, "val") is not None
    if labels.has_validation and listed is not None and listed.name == "trainval.txt":
        labels.has_validation = False  # it is in there
    return labels


def parse(file: Path) -> _Reader:
    """Read an XML file that a stranger may have made.

    Raises:
        InputError: with the line: it is cut short, no XML, has entities (which may fill the memory), or is not VOC's.
    """
    try:
        import defusedxml
        import defusedxml.sax
    except ImportError as error:
        raise InputError(
            "Labels in XML are read through the package defusedxml: pip install 'selftrain_d2[labels]'."
        ) from error
    reader = _Reader()
    try:
        defusedxml.sax.parseString(file.read_bytes(), reader)
    except SAXParseException as error:
        raise InputError(
            f"{file}, line {error.getLineNumber()}: not valid XML ({error.getMessage()})."
        ) from error
    except defusedxml.DefusedXmlException as error:
        line = reader.locator.getLineNumber()
        raise InputError(
            f"{file}, line {line}: it declares XML entities, which labels do not need and which can do harm: remove "
            "them."
        ) from error
    if reader.root != "annotation":
        raise InputError(f"{file}, line 1: its root is <{reader.root}>, not VOC's <annotation>.")
    return reader


def _annotations(folder: Path) -> Path:
    inner = folder / "Annotations"
    return inner if inner.is_dir() else folder


def _image_folder(annotations: Path) -> Path:
    beside = [annotations.parent / name for name in ("JPEGImages", "images")]
    return next((folder for folder in beside if folder.is_dir()), annotations)


def _list_of(folder: Path, split: str) -> Path | None:
    lists = (folder / "ImageSets" / "Main" / name for name in _LISTS[split])
    return next((file for file in lists if file.is_file()), None)


def _stems(listed: Path, known: Any) -> list[str]:
    stems: dict[str, int] = {}
    for number, line in enumerate(read_text(listed).splitlines(), start=1):
        if line.strip():
            stem = line.split()[0]
            if stem not in known:
                raise InputError(f"{listed}, line {number}: {stem} has no XML file; correct the list.")
            stems.setdefault(stem, number)
    return list(stems)


def _image_name(file: Path, xml: _Reader, same_stem: list[str], names: set[str], root: Path) -> str:
    said = xml.top.get("filename", _Value("", 1))
    if len(same_stem) == 1:
        return same_stem[0]
    if said.text in (same_stem or names):
        return said.text
    if same_stem:
        raise InputError(
            f"{same_stem[0]} and {same_stem[1]} in {root} differ in folder or ending alone, and {file}, line "
            f"{said.line}, does not tell which it labels: correct its <filename>."
        )
    raise InputError(
        f"{file}, line {said.line}: its image {said.text or file.stem} is not in {root}; add it, or remove the file."
    )


def _size(file: Path, xml: _Reader, image: Path) -> tuple[int, int]:
    """The image's (height, width), which is what the XML says unless that is 0 or missing."""
    size = image_size(image)
    for key, actual in zip(("height", "width"), size):
        said = xml.top.get(f"size/{key}")
        if said is not None and said.text not in ("", "0", str(actual)):
            raise InputError(
                f"{file}, line {said.line}: it says that the {key} of {image} is {said.text}, but it is {actual}; "
                "correct it."
            )
    return size


def _name(file: Path, found: dict[str, _Value]) -> str:
    if not found.get("name", _Value("", 0)).text:
        raise InputError(f"{file}, line {found[''].line}: the object has no <name>.")
    return found["name"].text


def _object(
    file: Path, found: dict[str, _Value], size: tuple[int, int], classes: Sequence[str]
) -> dict[str, Any]:
    name = _name(file, found)
    if name not in classes:
        raise InputError(
            f"{file}, line {found['name'].line}: the class {name!r} is none of {', '.join(classes)}; correct it, or "
            "--classes."
        )
    xmin, ymin, xmax, ymax = (_number(file, found, f"bndbox/{key}") for key in _CORNERS)
    where = f"{file}, line {found['bndbox/xmin'].line}"
    # Many tools count from 0: a box may begin one pixel before VOC's first.
    result: dict[str, Any] = {
        "category_id": list(classes).index(name),
        "bbox": inside((xmin - 1, ymin - 1, xmax, ymax), size, where),
        "iscrowd": 0,
    }
    if found.get("difficult", _Value("0", 0)).text not in ("", "0"):
        result["iscrowd"] = 1
    if "score" in found:
        result["score"] = _number(file, found, "score")
        if not 0 <= result["score"] <= 1:
            raise InputError(f"{file}, line {found['score'].line}: the score is no number from 0 to 1.")
    return result


def _number(file: Path, found: dict[str, _Value], key: str) -> float:
    value = found.get(key)
    if value is None:
        raise InputError(f"{file}, line {found[''].line}: the object has no <{key.split('/')[-1]}>.")
    try:
        number = float(value.text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{file}, line {value.line}: {value.text!r} is no finite number.")
    return number
