"""Which files are pictures, and how their names are written down."""

from __future__ import annotations

import functools
import os

from PIL import Image

# What people call pictures, and Pillow does not read or does not know by these names. They are listed as well, so
# that nobody's pictures are missing without a word: what cannot be read is skipped, with its reason.
_CAMERA_RAW = (
    "3fr arw bay cap cr2 cr3 crw dcr dcs dng eip erf fff gpr iiq k25 kdc mdc mef mos mrw nef nrw orf pef ptx raf raw "
    "rw2 rwl rwz sr2 srf srw x3f"
)
_OTHER_PICTURES = (
    "heic heics heif heifs hif "  # HEIF: telephones
    "avif avifs jxl jxr wdp hdp j2c j2k jls jp2 jpf jpx webp "  # JPEG's successors; some builds of Pillow lack them
    "jps mpo pjp pjpeg "  # JPEG under other names
    "btf geotiff gtiff tf8 "  # TIFF under other names
    "ecw ntf nitf sid "  # aerial photographs
    "czi dcm dicom ndpi svs "  # medicine
    "exr fpx psb svg svgz xcf"
)
# Not pictures, though Pillow has a name for them: videos, and tables of numbers that it cannot decode.
_NO_PICTURES = "bufr grib h5 hdf iim mpeg mpg"


def _extensions(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


_RAW_EXTENSIONS = _extensions(_CAMERA_RAW)


@functools.cache
def image_extensions() -> frozenset[str]:
    """Lower-case file extensions (".jpg", ...) of pictures, whether Pillow, hence detectron2, can read them or not."""
    read = frozenset(ext for ext, name in Image.registered_extensions().items() if name in Image.OPEN)
    return (read | _extensions(f"{_CAMERA_RAW} {_OTHER_PICTURES}")) - _extensions(_NO_PICTURES)


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def has_image_extension(name: str) -> bool:
    """Whether a file's name ends as a picture's does, in upper or lower case."""
    return _extension(name) in image_extensions()


def is_camera_raw(name: str) -> bool:
    """Whether a file's name ends as those of a camera's raw files do."""
    return _extension(name) in _RAW_EXTENSIONS


def printable(name: str) -> str:
    r"""A file name as UTF-8 can have it: bytes of other encodings become ``\udcXX``, as in Python's ``ascii``.

    Pseudo labels are stored as UTF-8. A file renamed so by this is not found, and skipped with that reason.
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
