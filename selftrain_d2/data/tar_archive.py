"""Images inside uncompressed tar files (WebDataset shards among them), as paths of detectron2's PathManager.

``tar:///data/shard-000.tar/0001.jpg`` is the member ``0001.jpg`` of ``/data/shard-000.tar``, and
``tar:///data/photos/0001.jpg``, without an archive on the way, the file itself: archives and folders can have one root.
The archive may lie in object storage: ``tar://s3://bucket/shard-000.tar/0001.jpg``.
Importing this module teaches that to the PathManager, so that whatever reads images through it reads these too.
"""

from __future__ import annotations

import bisect
import functools
import io
import os
import posixpath
import re
import tarfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from selftrain_d2.data.image_formats import has_image_extension, printable
from selftrain_d2.errors import InputError
from selftrain_d2.storage import is_address, is_file, is_folder, open_file, read_range

PREFIX = "tar://"

_END_OF_ARCHIVE = bytes(tarfile.BLOCKSIZE)
# First bytes -> the program that unpacks it.
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class TarIndex:
    """Where the images of one tar file are. Under 80 bytes an image, for names of 30 letters.

    Attributes:
        damage: why the archive could not be read to its end, or None. What comes before is indexed.

    Raises:
        InputError: the file is not there, compressed, or not a tar.
    """

    def __init__(self, path: str):
        self.path = path
        self.damage: str | None = None
        places: dict[str, tuple[int, int]] = {}  # name -> offset and size of its data
        links: dict[str, str] = {}
        try:
            with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                try:
                    self._scan(archive, places, links)
                    file.seek(archive.offset)
                    # tarfile takes a broken header for the end.
                    if file.read(tarfile.BLOCKSIZE) != _END_OF_ARCHIVE:
                        self.damage = "it ends without a tar's end mark"
                except tarfile.TarError as error:
                    self.damage = str(error)
        except OSError as error:
            raise InputError(f"Archive {path} cannot be opened: {error.strerror or error}.") from error
        except tarfile.TarError as error:
            raise InputError(_not_a_tar(path, error)) from error
        for name, target in links.items():
            places[name] = places.get(target, (-1, 0))
        names = sorted(places)
        self._names = _Names(names)
        self._places = np.array([places[name] for name in names], dtype=np.int64).reshape(-1, 2)

    @staticmethod
    def _scan(archive: tarfile.TarFile, places: dict[str, tuple[int, int]], links: dict[str, str]) -> None:
        for member in iter(archive.next, None):
            archive.members = []  # tarfile would keep every member it has seen
            name = _normalized(member.name)
            if not has_image_extension(name):
                continue
            if member.issym() or member.islnk():
                folder = posixpath.dirname(name) if member.issym() else ""
                links[name] = _normalized(posixpath.join(folder, member.linkname))
            elif member.isreg():  # of two members of the same name the last counts, as when unpacked
                places[name] = (-1, 0) if member.issparse() else (member.offset_data, member.size)

    def names(self) -> list[str]:
        """All images, in the order of their data."""
        return [self._names[i] for i in np.argsort(self._places[:, 0], kind="stable")]

    def place(self, name: str) -> tuple[int, int]:
        """Offset and size of one image's data, in bytes.

        Raises:
            OSError: there is no such image, or it has no data of its own.
        """
        i = bisect.bisect_left(self._names, name)
        if i == len(self._names) or self._names[i] != name:
            raise FileNotFoundError(f"{self.path} has no image {name}")
        offset, size = (int(number) for number in self._places[i])
        if offset < 0:
            raise OSError(f"{name} is a broken link or a sparse file in {self.path}")
        return offset, size

    def read(self, name: str) -> bytes:
        """The bytes of one image.

        Every call opens the file anew: threads and forked processes share no position in it. Of an archive at an
        address only these bytes are asked for.

        Raises:
            OSError: there is no such image, or its bytes are not all there.
        """
        if not name:
            raise OSError(f"{self.path} cannot be read to its end: {self.damage}")
        offset, size = self.place(name)
        data = read_range(self.path, offset, size)
        if len(data) < size:
            raise OSError(f"{self.path} is cut short: {name} has {len(data)} of {size} bytes")
        return data


class _Names(Sequence):
    """Strings in one block of memory."""

    def __init__(self, names: list[str]):
        self._array = pa.array(names, pa.string())

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> str:
        return self._array[index].as_py()


def _normalized(name: str) -> str:
    return printable(posixpath.normpath(name).lstrip("/"))


def _not_a_tar(path: str, error: Exception) -> str:
    start = read_range(path, 0, 8)
    for magic, program in _COMPRESSED.items():
        if start.startswith(magic):
            return (
                f"Archive {path} is compressed, which leaves no way to read one image without all before it: "
                f"unpack it with {program}, images are compressed already."
            )
    return f"{path} is not a tar file: {error}."


def tar_index(path: str | os.PathLike) -> TarIndex:
    """The index of a tar file, built once in each process for as long as the file does not change.

    An archive at an address is taken not to change while a process runs.

    Raises:
        InputError: see :class:`TarIndex`.
    """
    path = os.fspath(path)
    if is_address(path):
        return _tar_index(path, -1, -1)
    try:
        state = os.stat(path)
    except OSError as error:
        raise InputError(f"Archive {path} cannot be opened: {error.strerror}.") from error
    return _tar_index(path, state.st_size, state.st_mtime_ns)


@functools.cache
def _tar_index(path: str, size: int, modified: int) -> TarIndex:
    return TarIndex(path)


class TarPathHandler(PathHandler):
    """Opens ``tar://`` paths for reading."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[bytes]:
        if mode != "rb":
            raise OSError(f"{path} can only be opened with mode rb, not {mode}")
        try:
            archive, name = split(path)
        except InputError as error:
            raise OSError(str(error)) from error
        if archive is None:
            return open_file(name)
        try:
            return io.BytesIO(tar_index(archive).read(name))
        except InputError as error:
            raise OSError(str(error)) from error

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        try:
            with self._open(path, "rb"):
                return True
        except OSError:
            return False

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        archive, name = split(path)
        return is_folder(name) if archive is None else not has_image_extension(name)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isdir(path) or self._isfile(path)


def split(path: str) -> tuple[str | None, str]:
    """The archive and the member of a ``tar://`` path. The first ``*.tar`` that is a file is the archive; where there
    is none, None and the path of the file itself.

    Raises:
        InputError: an address that cannot be asked.
    """
    path = path[len(PREFIX) :]
    for match in re.finditer(r"\.tar(?=/|$)", path, re.IGNORECASE):
        if _is_archive(path[: match.end()]):
            return path[: match.end()], path[match.end() + 1 :]
    return None, path


def _is_archive(path: str) -> bool:
    return _is_remote_archive(path) if is_address(path) else os.path.isfile(path)


@functools.cache
def _is_remote_archive(address: str) -> bool:
    """Asked once, not for each image."""
    return is_file(address)


PathManager.register_handler(TarPathHandler(), allow_override=True)
