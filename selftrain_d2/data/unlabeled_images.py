"""Unlabeled images from several places, without those that people labeled."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from tqdm import tqdm

from selftrain_d2 import storage
from selftrain_d2.data import tar_archive
from selftrain_d2.data.image_formats import has_image_extension
from selftrain_d2.data.image_sources import (
    ImageSource,
    images_of_archives,
    images_of_coco_json,
    images_of_folder,
    images_of_list,
)
from selftrain_d2.errors import InputError

logger = logging.getLogger(__name__)

_THREADS = 8
_CHUNK, _PART = 4096, 64  # paths held at a time, and looked at by one thread
# From the middle of a file: uncompressed pictures of one size begin alike.
_SAMPLE_BYTES = 4096
_PROGRESS_AFTER_SECONDS = 5


class UnlabeledImages(NamedTuple):
    """Images to label, as in :class:`ImageSource`.

    Attributes:
        left_out: images that were listed and are not among them, by the reason.
    """

    image_root: str
    file_names: list[str]
    left_out: dict[str, int]


def collect_images(
    places: Sequence[str],
    image_root: str | None = None,
    arguments: tuple[str, str] = ("--unlabeled-images", "--unlabeled-root"),
) -> ImageSource:
    """The images of several places, each path once.

    Args:
        places: folders, image files, COCO files (``*.json``), tar archives (``*.tar``, also with ``{000..012}``, ``*``
            or ``?``), and lists (any other file; see :func:`images_of_list`).
        image_root: what paths in lists and COCO files are relative to; by default the folder of each file.
        arguments: what places and root are called on the command line, for messages.

    Returns:
        Of one place what the function for it gives, of several one root that all share.

    Raises:
        InputError: see :mod:`~selftrain_d2.data.image_sources`; or a place is not there.
    """
    by_kind: dict[Callable[..., ImageSource], list[str]] = {}
    for place in places:
        by_kind.setdefault(_kind(place, arguments[0]), []).append(place)
    if image_root is not None and by_kind.keys().isdisjoint(_WITH_ROOT):
        raise InputError(f"{arguments[1]} goes with lists and COCO files alone: leave it out.")
    sources = []
    for kind, of_kind in by_kind.items():
        if kind in (images_of_archives, _images_of_files):
            sources.append(kind(of_kind))
        elif kind in _WITH_ROOT:
            sources += [kind(place, image_root or storage.folder_of(place)) for place in of_kind]
        else:
            sources += map(kind, of_kind)
    return sources[0] if len(sources) == 1 else _joined(sources)


_WITH_ROOT = {images_of_list, images_of_coco_json}


def _kind(place: str, argument: str) -> Callable[..., ImageSource]:
    # An object may be a file and a folder: it is a file first.
    if storage.is_folder(place) and not (storage.is_address(place) and storage.is_file(place)):
        return images_of_folder
    if re.search(
        r"\.tar(\.\w+)?$", place, re.IGNORECASE
    ):  # those that are compressed are refused by their reader
        return images_of_archives
    if not storage.is_file(place):
        raise InputError(
            f"{argument} {place} does not exist: give folders, lists, COCO files or tar archives, and put "
            "another --argument, or --, before KEY VALUE pairs."
        )
    if place.lower().endswith(".json"):
        return images_of_coco_json
    return _images_of_files if has_image_extension(place) else images_of_list


def _images_of_files(files: Sequence[str]) -> ImageSource:
    paths = list(map(storage.absolute_root, files))
    root = storage.common_folder(map(storage.folder_of, paths))
    return ImageSource(root, [storage.below(path, root) if root else path for path in paths])


def _joined(sources: Sequence[ImageSource]) -> ImageSource:
    """Several sources under the folder that their roots share. Under ``tar://`` there are plain files, too."""
    in_archives = any(source.image_root.startswith(tar_archive.PREFIX) for source in sources)
    folders = [source.image_root.replace(tar_archive.PREFIX, "", 1) for source in sources]
    root = storage.common_folder(folders) if all(folders) else ""
    names = []
    for folder, source in zip(folders, sources):
        paths = (os.path.join(folder, name) for name in source.file_names)
        names += [storage.below(path, root) for path in paths] if root else paths
    distinct = list(dict.fromkeys(names))
    if len(distinct) < len(names):
        logger.info(f"Unlabeled images: {len(names) - len(distinct)} come more than once, and count once.")
    return ImageSource(tar_archive.PREFIX + root if in_archives else root, distinct)


def without_known(source: ImageSource, known: Mapping[str, Iterable[str]]) -> UnlabeledImages:
    """Leave out the images whose file, or a copy of it, is known.

    A file is known by where it lies, links resolved, and by its bytes. Read are only files of a size in bytes that a
    known one has: first 4 KiB from their middle, and the whole if these are the same. Addresses whose handler does not
    tell sizes (see ``storage.size_of``) are known by the address alone.

    Args:
        known: paths of known images, by what they are: "labeled", say.

    Raises:
        InputError: none is left.
    """
    files, left_out = _KnownFiles(known), dict.fromkeys(known, 0)
    names = []
    for name, kind in files.kinds_of(source):
        if kind is None:
            names.append(name)
        else:
            left_out[kind] += 1
    left_out = {kind: number for kind, number in left_out.items() if number}
    if left_out:
        parts = " and ".join(f"{number} that are {kind}" for kind, number in left_out.items())
        number = len(source.file_names)
        if not names:
            raise InputError(
                f"None of the {number} unlabeled images is left: {parts}, or copies; give others."
            )
        logger.info(
            f"Unlabeled images: {len(names)} of {number}; left out are {parts}, or copies of such files."
        )
    return UnlabeledImages(source.image_root, names, left_out)


class _KnownFiles:
    def __init__(self, known: Mapping[str, Iterable[str]]):
        self._by_place: dict[Any, str] = {}
        # size -> files; and once that size was met: size -> hash of the sample -> hash of the file -> kind
        self._by_size: dict[int, dict[str, str]] = {}
        self._by_content: dict[int, dict[bytes, dict[bytes, str]]] = {}
        for kind, paths in known.items():
            for path, state in _with_states(paths):
                if state is not None and state[0] not in self._by_place:
                    place, size = state
                    self._by_place[place] = kind
                    self._by_size.setdefault(size, {})[path] = kind
        self._by_size.pop(0, None)  # empty files are no copies of each other

    def kinds_of(self, source: ImageSource) -> Iterator[tuple[str, str | None]]:
        """Each image's name, and what it is known as, or None."""
        root, names = source.image_root, source.file_names
        threads = _THREADS if os.path.isabs(root) else storage.REQUESTS
        states = tqdm(
            _with_states((os.path.join(root, name) for name in names), threads),
            desc="unlabeled images compared with labeled ones",
            unit="image",
            total=len(names),
            delay=_PROGRESS_AFTER_SECONDS,
        )
        for (path, state), name in zip(states, names):
            yield name, None if state is None else self._kind_of(path, *state)

    def _kind_of(self, path: str, place: Any, size: int) -> str | None:
        if place in self._by_place:
            return self._by_place[place]
        if size not in self._by_size:
            return None
        try:
            sample = _hash(path, size, sample=True)
            if size not in self._by_content:
                self._by_content[size] = self._contents(size)
            same = self._by_content[size].get(sample)
            return None if same is None else same.get(_hash(path, size))
        except OSError:  # told when it is labeled
            return None

    def _contents(self, size: int) -> dict[bytes, dict[bytes, str]]:
        contents: dict[bytes, dict[bytes, str]] = {}
        for path, kind in self._by_size[size].items():
            contents.setdefault(_hash(path, size, sample=True), {})[_hash(path, size)] = kind
        return contents


def _with_states(
    paths: Iterable[str], threads: int = _THREADS
) -> Iterator[tuple[str, tuple[Any, int] | None]]:
    """Each path with what tells its file from others and its size in bytes (0 where it is not known); with None if
    there is no file."""
    with ThreadPoolExecutor(threads) as pool:
        rest = iter(paths)
        while chunk := list(itertools.islice(rest, _CHUNK)):
            states = pool.map(_states, (chunk[i : i + _PART] for i in range(0, len(chunk), _PART)))
            yield from zip(chunk, itertools.chain.from_iterable(states))


def _states(paths: Sequence[str]) -> list[tuple[Any, int] | None]:
    return list(map(_state, paths))


def _state(path: str) -> tuple[Any, int] | None:
    try:
        if not path.startswith(tar_archive.PREFIX):
            if storage.is_address(path):
                return (path,), storage.size_of(path) or 0
            state = os.stat(path)
            return (state.st_dev, state.st_ino), state.st_size
        archive, name = tar_archive.split(path)
        if archive is None:
            return _state(name)
        offset, size = tar_archive.tar_index(archive).place(name)
        if storage.is_address(archive):
            return (archive, offset), size
        state = os.stat(archive)
        return (state.st_dev, state.st_ino, offset), size
    except OSError:
        return None


def _hash(path: str, size: int, sample: bool = False) -> bytes:
    """SHA-256 of a file of ``size`` bytes, or of a sample from its middle."""
    digest = hashlib.sha256()
    if sample:
        digest.update(storage.read_range(path, max(0, (size - _SAMPLE_BYTES) // 2), _SAMPLE_BYTES))
    else:
        with storage.open_file(path) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.digest()
