"""Reading what a user names: local paths by the system's own calls, addresses (``s3://bucket/photos``) by PathManager.

An address is what contains ``://`` and detectron2's PathManager has a handler for: a ``tar://`` path, object storage
that fsspec knows (:mod:`selftrain_d2.object_storage`), or a prefix for which a project registered a handler of its own,
of which ``_open`` is needed, ``_isfile``, ``_isdir`` and, to list folders, ``_ls`` are of use. A missing object and a
missing file end in the same OSError or answer, so that callers tell of both in the same sentence.

Only reading goes through here. What is written, locked or renamed needs a file system: :func:`check_local`.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO

from detectron2.utils.file_io import PathManager

from selftrain_d2.errors import InputError

#: Requests at a time: an answer takes tens of milliseconds, and no core.
REQUESTS = 32


def is_address(path: str | os.PathLike) -> bool:
    """Whether a path is for the PathManager.

    Raises:
        InputError: it begins with ``file://``, which would be a second name of a local path.
    """
    path = os.fspath(path)
    if "://" not in path:
        return False
    if path.startswith("file://"):
        raise InputError(f"{path} is a local path: give it without file://, as {path[len('file://') :]}.")
    return True


def open_file(path: str | os.PathLike) -> IO[bytes]:
    """Open for reading bytes, seekable.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    return PathManager.open(os.fspath(path), "rb") if is_address(path) else open(path, "rb")


def read_bytes(path: str | os.PathLike) -> bytes:
    """All bytes of a file; raises as :func:`open_file`."""
    with open_file(path) as file:
        return file.read()


def read_range(path: str | os.PathLike, offset: int, size: int) -> bytes:
    """Some bytes of a file, fewer where it ends before; raises as :func:`open_file`.

    Of an address no more than these are asked for, if its handler gives a stream with a ``raw`` one below.
    """
    with open_file(path) as file:
        stream = getattr(file, "raw", file) if is_address(path) else file
        stream.seek(offset)
        data = stream.read(size)
        while len(data) < size and (more := stream.read(size - len(data))):  # raw streams may give less
            data += more
    return data


def size_of(path: str | os.PathLike, read: bool = False) -> int | None:
    """Bytes of a file; of an object by one request.

    Args:
        read: read an object whose handler gives no ``raw`` stream, which might take all of it. Else its size is None.

    Raises:
        OSError: it is not there, or cannot be asked.
    """
    if not is_address(path):
        return os.path.getsize(path)
    with open_file(path) as file:
        stream = getattr(file, "raw", file if read else None)
        return None if stream is None else stream.seek(0, os.SEEK_END)


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is a file. Where a handler cannot say, it counts as there: what is missing is told when it is read.

    Raises:
        InputError: an address that cannot be asked.
    """
    return _ask("isfile", path) if is_address(path) else os.path.isfile(path)


def is_folder(path: str | os.PathLike) -> bool:
    """Whether there is a folder, or an object whose name goes on after a slash; raises as :func:`is_file`."""
    return _ask("isdir", path) if is_address(path) else os.path.isdir(path)


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or a folder; raises as :func:`is_file`."""
    return _ask("exists", path) if is_address(path) else os.path.exists(path)


def join(root: str | os.PathLike, name: str) -> str:
    """A path or address of a name below a root, or of one that is an absolute path or an address itself."""
    return name if "://" in name else os.path.join(root, name)


def missing_files(root: str | os.PathLike, names: Iterable[str]) -> list[str]:
    """Those names below a root that are no files; raises as :func:`is_file`."""
    names = list(names)
    paths = [join(root, name) for name in names]
    if not any(map(is_address, paths)):
        return [name for name, path in zip(names, paths) if not os.path.isfile(path)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return [name for name, there in zip(names, pool.map(is_file, paths)) if not there]


def list_folder(address: str) -> list[str]:
    """Names in a folder of an address. Those of folders end in a slash, if its handler knows that.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        # Some handlers give names, some whole paths.
        entries = PathManager.ls(address)
    except NotImplementedError as error:
        raise OSError("its handler does not list folders: name the files in a list") from error
    names = {entry.rstrip("/").rpartition("/")[2] + "/" * entry.endswith("/") for entry in entries}
    return sorted(names - {"", "/"})


def walk(address: str, is_wanted: Callable[[str], bool]) -> Iterator[str]:
    """Files below a folder of an address, relative to it; a folder below it that cannot be listed with a slash.

    Args:
        is_wanted: whether a file of this name is; it is not asked about a name that ends in a slash.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    pending = [""]
    while pending:
        parent = pending.pop()
        try:
            names = list_folder(os.path.join(address, parent))
        except OSError:
            if not parent:
                raise
            yield parent
            continue
        told = any(name.endswith("/") for name in names)
        for name in names:
            if name.endswith("/"):
                pending.append(parent + name)
            elif is_wanted(name):
                yield parent + name
            elif not told and is_folder(os.path.join(address, parent + name)):
                pending.append(f"{parent}{name}/")


def absolute_root(path: str | os.PathLike) -> str:
    """A path that does not depend on the current folder; addresses stay, and so does ``""``, the root of names that
    are whole themselves."""
    path = os.fspath(path)
    return path if not path or is_address(path) else os.path.abspath(path)


def normalized(path: str) -> str:
    """A path without ``.`` and ``..``."""
    if not is_address(path):
        return os.path.normpath(path)
    prefix, _, rest = path.partition("://")
    if "://" in rest:  # tar://s3://...
        return f"{prefix}://{normalized(rest)}"
    return f"{prefix}://{posixpath.normpath(rest) if rest else ''}"


def folder_of(path: str | os.PathLike) -> str:
    """The folder that a file is in, absolute."""
    path = absolute_root(path)
    if not is_address(path):
        return os.path.dirname(path)
    prefix, _, rest = path.partition("://")
    return f"{prefix}://{posixpath.dirname(rest)}"


def common_folder(folders: Iterable[str]) -> str:
    """The folder that absolute ones and addresses share; ``""`` where they share none."""
    folders = list(folders)
    prefixes = {folder.partition("://")[0] if is_address(folder) else None for folder in folders}
    if len(prefixes) > 1:
        return ""
    prefix = prefixes.pop()
    if prefix is None:
        return os.path.commonpath(folders)
    parts = zip(*(folder.partition("://")[2].split("/") for folder in folders))
    shared = []
    for names in parts:
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return f"{prefix}://{'/'.join(shared)}" if shared else ""


def below(path: str, root: str) -> str:
    """A path below a root without it; any other as it is."""
    inside = os.path.join(root, "")
    return path[len(inside) :] if path.startswith(inside) else path


def check_local(path: str | os.PathLike, what: str) -> None:
    """Raise InputError if what is to be written is at an address.

    Args:
        what: names it in the message.
    """
    # Path makes one slash of two.
    if re.match(r"[a-z][a-z0-9+.-]+:/", os.fspath(path)):
        raise InputError(
            f"{what} {os.fspath(path)} is an address: locks, resuming and whole files need a file system (a shared "
            "one for several machines); give a path, and copy what was written afterwards."
        )


def _ask(question: str, path: str | os.PathLike) -> bool:
    try:
        return getattr(PathManager, question)(os.fspath(path))
    except FileNotFoundError:
        return False
    except NotImplementedError:
        return True
    except OSError as error:
        raise InputError(
            f"{os.fspath(path)} cannot be reached ({error.strerror or error}): check the address, the network and "
            "your credentials."
        ) from error
