"""Pseudo masks: a PNG an image, which has a class and a confidence for every pixel, and a row in a shard.

A PNG has two channels (grey and alpha, lossless): the most probable class, 255 where even that one is under the score
floor, and its probability in whole percent, rounded down. So thresholds of whole percents are exact, any other one
acts as the next whole percent, and the paper's 0.5 is applied when masks are loaded, as it is to boxes.

Letters in shapes: N images, C classes, H x W pixels.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from selftrain_d2.data.label_maps import VOID
from selftrain_d2.data.pseudo_labels.shards import LabelKind, flat_values, list_lengths
from selftrain_d2.errors import InputError
from selftrain_d2.files import process_name, writing
from selftrain_d2.storage import read_bytes, size_of

#: Folder of the PNGs in a pseudo-label folder.
FOLDER = "masks"
#: Start of the names of PNGs that are being written, in the pseudo-label folder itself.
TEMPORARY = ".mask."
PERCENTS = 101  # 0 to 100

#: One row an image.
MASK_SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),  # relative to the manifest's image_root
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("png_sha256", pa.binary()),  # of the PNG at mask_path(file_name); null where skipped
        ("png_bytes", pa.int64()),
        ("bins", pa.list_(pa.int32())),  # class * 101 + percent, of pixels that have a class; rising
        ("pixels", pa.list_(pa.int32())),  # how many pixels each of these bins has
        ("skipped", pa.string()),  # why the image could not be labeled, else null
    ]
)

_ADVICE = "run the command that wrote the folder again, it redoes only what is damaged"
_THREADS = 8


class PixelLabels(NamedTuple):
    """Classes of the pixels of one image (H, W) uint8, 255 for none, and their confidence (H, W) uint8, in percent."""

    classes: np.ndarray
    percents: np.ndarray

    def at(self, least_percent: Sequence[int]) -> np.ndarray:
        """Classes (H, W) of the pixels that reach the percentage of their class; 255 elsewhere.

        Args:
            least_percent: C numbers, see :func:`least_percents`.
        """
        least = np.full(VOID + 1, PERCENTS, np.uint8)
        least[: len(least_percent)] = least_percent
        return np.where(self.percents >= least[self.classes], self.classes, np.uint8(VOID))


def least_percents(thresholds: Sequence[float]) -> tuple[int, ...]:
    """The least whole percentage that reaches each threshold in [0, 1]."""
    # Rounding in binary: 0.57 * 100 is 56.99999999999999, as float32 it is 57.00000017.
    return tuple(math.ceil(100 * float(threshold) - 1e-4) for threshold in thresholds)


def mask_path(file_name: str) -> str:
    """Where the PNG of an image is, relative to the pseudo-label folder: always below it.

    ``a/b.jpg`` has ``masks/a/b.jpg.png``: ``a/b.png`` may be another image.
    """
    parts = ["%2E%2E" if part == ".." else part for part in file_name.split("/")]
    if not parts[0]:  # an absolute path
        parts[0] = "%2F"
    return "/".join((FOLDER, *parts)) + ".png"


def make_mask_row(
    file_name: str,
    height: int = 0,
    width: int = 0,
    png_sha256: bytes | None = None,
    png_bytes: int = 0,
    histogram: np.ndarray | None = None,
    skipped: str | None = None,
) -> dict[str, Any]:
    """One row of ``MASK_SCHEMA``.

    Args:
        histogram: (C * 101,) pixels by class and percent.
        skipped: the reason, if the image could not be labeled.
    """
    bins = np.flatnonzero(histogram) if histogram is not None else np.empty(0, int)
    return {
        "file_name": file_name,
        "height": height,
        "width": width,
        "png_sha256": png_sha256,
        "png_bytes": png_bytes,
        "bins": bins.astype(np.int32),
        "pixels": histogram[bins].astype(np.int32) if len(bins) else [],
        "skipped": skipped,
    }


def write_mask(folder: str | os.PathLike, file_name: str, labels: PixelLabels) -> dict[str, Any]:
    """Write the PNG of one image, whole or not at all.

    Args:
        folder: the pseudo-label folder.
        file_name: of the image, relative to the image root.

    Returns:
        Its row of ``MASK_SCHEMA``.

    Raises:
        InputError: the disk is full.
    """
    buffer = io.BytesIO()
    Image.fromarray(np.dstack(labels)).save(buffer, "PNG")  # (H, W, 2) is grey and alpha
    content = buffer.getvalue()
    file = Path(folder) / mask_path(file_name)
    temporary = Path(folder) / f"{TEMPORARY}{process_name()}"
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, file)
    valid = labels.classes != VOID
    bins = PERCENTS * labels.classes[valid].astype(np.int32) + labels.percents[valid]
    digest = hashlib.sha256(content).digest()
    return make_mask_row(file_name, *labels.classes.shape, digest, len(content), np.bincount(bins))


def read_mask(file: str | os.PathLike, sha256: bytes | None = None) -> PixelLabels:
    """Read the PNG of one image.

    Args:
        sha256: of its bytes, to check them; None for not.

    Raises:
        InputError: it is missing, damaged, or no pseudo mask.
    """
    try:
        content = read_bytes(file)
    except OSError as error:
        raise InputError(
            f"Pseudo mask {file} cannot be read ({error.strerror or error}); {_ADVICE}."
        ) from error
    if sha256 is not None and hashlib.sha256(content).digest() != sha256:
        raise InputError(
            f"Pseudo mask {file} is damaged: it has another SHA-256 than its shard says; {_ADVICE}."
        )
    with Image.open(io.BytesIO(content)) as image:
        if image.mode != "LA":
            raise InputError(f"{file} has the mode {image.mode}: a pseudo mask has LA, class and percent.")
        pixels = np.asarray(image)
    return PixelLabels(pixels[..., 0], pixels[..., 1])


def check_mask_table(table: pa.Table, num_classes: int) -> None:
    """Check the rows of a shard.

    Raises:
        InputError: a pixel has a class without a name.
    """
    bins = flat_values(table, "bins")
    if len(bins) and bins.max() >= PERCENTS * num_classes:
        raise InputError(
            f"A pixel has the class id {bins.max() // PERCENTS}, but there are {num_classes} class names: give one for "
            "each class that the segmentor knows, in the order of training."
        )


def damaged_mask(folder: str | os.PathLike, table: pa.Table) -> str | None:
    """The first image of a shard whose PNG is missing or has other bytes than were written; None if all are well."""
    table = _labeled(table)

    def is_damaged(name: str, sha256: bytes) -> bool:
        try:
            content = read_bytes(os.path.join(folder, mask_path(name)))
        except OSError:
            return True
        return hashlib.sha256(content).digest() != sha256

    names = table["file_name"].to_pylist()
    with ThreadPoolExecutor(_THREADS) as pool:
        damaged = pool.map(is_damaged, names, table["png_sha256"].to_pylist())
        return next((name for name, wrong in zip(names, damaged) if wrong), None)


def check_masks_are_there(folder: str | os.PathLike, table: pa.Table) -> None:
    """Check that every PNG of a shard exists with its size: fast. Its bytes are checked when it is read.

    Raises:
        InputError: naming the first that is missing or of another size.
    """
    table = _labeled(table)
    files = [os.path.join(folder, mask_path(name)) for name in table["file_name"].to_pylist()]

    def size(file: str) -> int | None:
        try:
            return size_of(file, read=True)
        except OSError:
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        for file, found, expected in zip(files, pool.map(size, files), table["png_bytes"].to_pylist()):
            if found != expected:
                what = "is missing" if found is None else f"is damaged: {found} bytes instead of {expected}"
                raise InputError(f"Pseudo mask {file} {what}; {_ADVICE}.")


def pixel_counts(table: pa.Table) -> np.ndarray:
    """Pixels of each row that have a class, (rows,) int64."""
    rows = np.repeat(np.arange(table.num_rows), list_lengths(table, "pixels"))
    return np.bincount(rows, flat_values(table, "pixels"), minlength=table.num_rows).astype(np.int64)


def _labeled(table: pa.Table) -> pa.Table:
    return table.filter(table["skipped"].is_null())


#: Labels that a segmentor makes.
MASKS = LabelKind(
    name="pixels",
    classes_key="stuff_classes",
    schema=MASK_SCHEMA,
    check=check_mask_table,
    counts=pixel_counts,
    count_columns=("pixels",),
)
