"""Faults of images that their headers and last bytes show, told before hours of work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detectron2.data import DatasetCatalog

from selftrain_d2.data.image_files import read_image, read_image_size
from selftrain_d2.errors import InputError
from selftrain_d2.storage import open_file

_THREADS = 8

# First bytes of a file -> what its last ones are. A file without them is cut short, or has something behind its end.
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82"}


def check_images(names: Iterable[str]) -> None:
    """Check the images of registered datasets, decoding none but those that look cut short.

    Raises:
        InputError: naming the first image that cannot be read or has another size than its labels say, and how many
            there are.
    """
    for name in names:
        with ThreadPoolExecutor(_THREADS) as pool:
            faults = [fault for fault in pool.map(_fault, DatasetCatalog.get(name)) if fault]
        if faults:
            more = f" ({len(faults)} of its images have such faults)" if len(faults) > 1 else ""
            raise InputError(f"Dataset {name!r}{more}: {faults[0]}.")


def _fault(sample: Mapping[str, Any]) -> str | None:
    """What is wrong with an image, and what to do; None if all is well as far as can be seen."""
    file = sample["file_name"]
    try:
        size = read_image_size(file)
        if _looks_cut_short(file):
            read_image(file, "RGB")
    except Exception as error:  # Pillow's readers raise anything on a broken file
        return f"image {file} cannot be read ({error}); repair or remove it"
    labeled = (sample.get("height", size[0]), sample.get("width", size[1]))
    if labeled != size:
        return (
            f"image {file} is {size[1]} x {size[0]} pixels, but its annotations say {labeled[1]} x {labeled[0]}; "
            "correct width and height there"
        )
    return None


def _looks_cut_short(file: str) -> bool:
    with open_file(file) as stream:
        start = stream.read(4)
        end = next((end for first, end in _ENDS.items() if start.startswith(first)), None)
        if end is None:
            return False
        stream.seek(-len(end), os.SEEK_END)
        return stream.read() != end
