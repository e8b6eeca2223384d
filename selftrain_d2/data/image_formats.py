"""Which files are images, and how their names are written down."""

from __future__ import annotations

import functools
import os

from PIL import Image


@functools.cache
def image_extensions() -> frozenset[str]:
    """Lower-case file extensions (".jpg", ...) of all formats that Pillow, hence detectron2, can read."""
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in Image.OPEN)


def has_image_extension(name: str) -> bool:
    """Whether a file's name ends as an image's does, in upper or lower case."""
    return os.path.splitext(name)[1].lower() in image_extensions()


def printable(name: str) -> str:
    r"""A file name as UTF-8 can have it: bytes of other encodings become ``\udcXX``, as in Python's ``ascii``.

    Pseudo labels are stored as UTF-8. A file renamed so by this is not found, and skipped with that reason.
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
