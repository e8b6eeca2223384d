"""Pixels and sizes of image files: one reader for training, labeling, evaluation, masks and figures."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
from typing import IO

import cv2
import numpy as np
from detectron2.data import detection_utils as utils
from PIL import Image, UnidentifiedImageError

from selftrain_d2.data import tar_archive  # noqa: F401  (paths that begin with tar://)
from selftrain_d2.data.image_formats import is_camera_raw
from selftrain_d2.storage import open_file, read_bytes

#: What reading a file may raise that is the file's fault.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)

# In the place of Pillow's limit, which refuses twice as many pixels. OpenCV, which reads JPEG, refuses more than these.
_LARGE_IMAGE = 2**30

_ORIENTATION = 0x0112  # of EXIF and TIFF
# Orientation -> how an array (H, W, ...) is turned upright: transposed or not, then cv2.flip's code.
_TURNS = {
    2: (False, 1),
    3: (False, -1),
    4: (False, 0),
    5: (True, None),
    6: (True, 1),
    7: (True, -1),
    8: (True, 0),
}
# Formats of which Pillow knows the size, before orientation, without decoding; icons, say, hold several sizes.
_SIZE_IN_HEADER = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def read_image(file_name: str | os.PathLike, image_format: str, large: bool = False) -> np.ndarray:
    """Read an image as detectron2's ``read_image`` does, with three differences.

    Orientation is applied once, wherever the file states it (EXIF, a TIFF tag, XMP), and as
    ``PIL.ImageOps.exif_transpose`` would; 16-bit grey is divided by 256, as Pillow and OpenCV do with 16-bit colour,
    where detectron2 cuts it off at 255; and most JPEG files are read faster.

    Args:
        file_name: a path that detectron2's PathManager knows.
        image_format: as detectron2 has it: RGB, BGR, L, ...
        large: read images of a billion pixels; by default Pillow's limit against files that say to be huge holds, 179
            million.

    Returns:
        (H, W, C) uint8, upright.

    Raises:
        OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError (``UNREADABLE``): the file is missing,
            no image, broken, a camera's raw file, or has 32-bit grey levels, which may mean anything.
    """
    file_name = os.fspath(file_name)
    try:
        data = read_bytes(file_name)
        # Pillow looks at the size when it opens an image.
        with _limit_lifted() if large else contextlib.nullcontext():
            opened = open_image(io.BytesIO(data), file_name)
        with opened as image:
            pixels = None
            # What is not plain three-channel JPEG is left to Pillow. A file cut short has no end marker, and OpenCV
            # would fill it up with grey instead of refusing it.
            if image_format in ("RGB", "BGR") and image.mode == "RGB" and _is_whole_jpeg(data):
                flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
                pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
            if pixels is None:
                pixels = utils.convert_PIL_to_numpy(_in_eight_bits(image), image_format)
            elif image_format == "RGB":
                pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
            return upright(pixels, image)
    except UNREADABLE:
        raise
    except Exception as error:  # Pillow's readers raise anything on a broken file
        raise OSError(f"{type(error).__name__}: {error}") from error


_limit_lock = threading.Lock()


@contextlib.contextmanager
def _limit_lifted():
    """Let Pillow open larger images: in all threads, since its limit is one of the module."""
    with _limit_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, _LARGE_IMAGE
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def read_image_size(file_name: str | os.PathLike) -> tuple[int, int]:
    """(height, width) in pixels of what :func:`read_image` returns, for the usual formats from the header alone.

    Raises:
        OSError: the file is not a readable image.
    """
    file_name = os.fspath(file_name)
    try:
        with open_file(file_name) as file, open_image(file, file_name) as image:
            _check_mode(image)
            width, height = image.size
            if image.format == "TIFF":  # some versions of Pillow have applied the orientation here, some not
                width, height = image.tag_v2[256], image.tag_v2[257]
                orientation = image.getexif().get(_ORIENTATION)
            elif image.format == "PNG":
                orientation = _png_orientation(file, image)
            else:
                if image.format not in _SIZE_IN_HEADER:
                    image.load()
                    width, height = image.size
                orientation = _orientation(image)
    except Exception as error:  # see read_image
        raise OSError(str(error)) from error
    transposed, _ = _TURNS.get(orientation, (False, None))
    return (width, height) if transposed else (height, width)


def open_image(file: IO[bytes], file_name: str) -> Image.Image:
    """Pillow's image of an open file, not decoded yet.

    Args:
        file_name: for its ending: Pillow takes a camera's raw file for a TIFF, which is its small preview.

    Raises:
        OSError: a format that is not read; and whatever Pillow raises.
    """
    if is_camera_raw(file_name):
        raise OSError("camera raw files are not read: develop them to JPEG, PNG or TIFF")
    try:
        return Image.open(file)
    except UnidentifiedImageError:  # its message has the address of a buffer
        raise UnidentifiedImageError("not an image in a format that Pillow reads") from None


def upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Turn the pixels of an image as its file says.

    Args:
        pixels: (H, W) or (H, W, C), of a type that OpenCV knows.
        image: where they are from. It was decoded, or is a JPEG.
    """
    # Pillow turns TIFF itself when it decodes; older versions leave the tag in place.
    orientation = None if image.format == "TIFF" else _orientation(image)
    transposed, flip = _TURNS.get(orientation, (False, None))
    shape = pixels.shape[2:]
    pixels = np.ascontiguousarray(pixels)
    if transposed:
        pixels = cv2.transpose(pixels)
    if flip is not None:
        pixels = cv2.flip(pixels, flip, dst=pixels if transposed else None)  # one allocation is enough
    return pixels.reshape(*pixels.shape[:2], *shape)  # OpenCV drops a single channel


def _orientation(image: Image.Image) -> int | None:
    try:
        return Image.Image.getexif(image).get(_ORIENTATION)
    except Exception:  # broken metadata do not make an image unreadable
        return None


def _is_whole_jpeg(data: bytes) -> bool:
    return data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9"


def _png_orientation(file: IO[bytes], image: Image.Image) -> int | None:
    """Metadata may follow a PNG's pixels, and Pillow would decode these to reach it: give it a PNG without pixels."""
    file.seek(0)
    parts, kind = [file.read(8)], b""
    while kind != b"IEND":
        head = file.read(8)
        if len(head) < 8:  # cut short, perhaps among the pixels
            image.load()
            return _orientation(image)
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IDAT", b"fdAT"):
            file.seek(length + 4, os.SEEK_CUR)
        else:
            parts.append(head + file.read(length + 4))
    try:
        with Image.open(io.BytesIO(b"".join(parts))) as metadata:
            return _orientation(metadata)
    except (OSError, SyntaxError):  # Pillow forgives faults behind the pixels, not before them
        image.load()
        return _orientation(image)


def _is_sixteen_bit(image: Image.Image) -> bool:
    # Older versions of Pillow have 16-bit PNG as I, and all have PGM so.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _check_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F") and not _is_sixteen_bit(image):
        kind = "signed or 32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise OSError(
            f"its grey levels are {kind}, of which nobody knows which is white: save it with 8 or 16 bits"
        )


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """The image itself, or one of 8 bits in the place of 16-bit grey."""
    _check_mode(image)
    if not _is_sixteen_bit(image):
        return image
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]  # 12 in some TIFF
    levels = (np.asarray(image).astype(np.int32) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow heeds this for 8 bits alone
        levels = 255 - levels
    return Image.fromarray(levels)
