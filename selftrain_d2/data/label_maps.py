"""Semantic label maps in image files: a class id a pixel, as grey level, palette index, or PASCAL VOC's colour."""

from __future__ import annotations

import functools
import os

import numpy as np
from numpy.typing import DTypeLike

from selftrain_d2.data.image_files import UNREADABLE, open_image, upright
from selftrain_d2.errors import InputError
from selftrain_d2.storage import open_file

#: PASCAL VOC's label of pixels at object borders and of difficult objects, and the ignore label everywhere here.
VOID = 255


@functools.cache
def voc_colours() -> np.ndarray:
    """PASCAL VOC's colour of each class id, (256, 3) uint8 RGB: the bits of the id, dealt out from the highest."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> channel & 1) << (7 - bit)).astype(np.uint8)
        ids = ids >> 3
    return colours


def read_label_map(file_name: str | os.PathLike, dtype: DTypeLike = np.uint8) -> np.ndarray:
    """Read a label map without changing an id.

    Fits ``SemSegEvaluator(sem_seg_loading_fn=...)``, whose own function fails with numpy 2. (detectron2's
    ``read_image`` turns palette images, as PASCAL VOC has them, into the grey levels of their colours.)

    Args:
        file_name: a path that detectron2's PathManager knows. Palette images hold their indices, grey images (1, 8
            or 16 bit) their levels; in RGB images each colour must be one of PASCAL VOC's.
        dtype: of the result.

    Returns:
        (H, W), ids of 0 to 255, upright as ``read_image`` turns images.

    Raises:
        InputError: the file is missing or no image, has an id above 255, a colour that is not PASCAL VOC's, or
            another mode.
    """
    try:
        file_name = os.fspath(file_name)
        with open_file(file_name) as file, open_image(file, file_name) as image:
            mode = image.mode
            pixels = upright(np.asarray(image, dtype=np.float32 if mode == "F" else np.int32), image)
    except UNREADABLE as error:
        raise InputError(f"Mask {file_name} cannot be read ({error}); repair or remove it.") from error
    if mode == "RGB":
        pixels = _ids_of_colours(pixels, file_name)
    elif mode not in ("1", "P", "L") and not mode.startswith("I"):
        raise InputError(f"Mask {file_name} has the mode {mode}: save class ids as a grey or palette PNG.")
    if pixels.max(initial=0) > VOID or pixels.min(initial=0) < 0:
        raise InputError(f"Mask {file_name} has the class id {pixels.max()}: ids are 0 to {VOID}.")
    return pixels.astype(dtype)


def _ids_of_colours(pixels: np.ndarray, file_name: str | os.PathLike) -> np.ndarray:
    place = np.array([1 << 16, 1 << 8, 1])
    known = voc_colours() @ place
    order = np.argsort(known)
    codes = pixels @ place
    ids = order[np.searchsorted(known, codes, sorter=order).clip(max=VOID)]
    wrong = np.argwhere(known[ids] != codes)
    if len(wrong):
        y, x = wrong[0]
        raise InputError(
            f"Mask {file_name} has the colour {tuple(pixels[y, x].tolist())} at x {x}, y {y}, which is no class of "
            "PASCAL VOC: save class ids as a grey or palette PNG."
        )
    return ids
