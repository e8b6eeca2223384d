"""Object storage that fsspec knows (``s3://bucket/photos``), as addresses of detectron2's PathManager, for reading.

Importing this module registers :data:`PREFIXES`. A handler that was registered before for one of them stays, and one
that is registered afterwards takes its place, so that a project may bring its own. fsspec is imported with the first
address that is opened; which further package it needs (s3fs, gcsfs, ...) it says itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, file_lock, get_cache_dir

from selftrain_d2.files import whole_file

#: Beginnings of addresses. ``memory://`` is a process's own memory, for trying things out.
PREFIXES = (
    "s3://", "s3a://", "gs://", "gcs://", "az://", "abfs://", "abfss://", "hdfs://", "webhdfs://", "hf://", "oci://",
    "oss://", "sftp://", "smb://", "memory://",
)  # fmt: skip

#: Read ahead where little is asked for: headers of images, and those in a tar file.
_BUFFER_BYTES = 1 << 20


class FsspecPathHandler(PathHandler):
    """Opens, lists and copies what fsspec knows. What it raises is an OSError, whatever the library behind raises."""

    def __init__(self, prefix: str):
        super().__init__()
        self._prefix = prefix

    def _get_supported_prefixes(self) -> list[str]:
        return [self._prefix]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        """A seekable stream. Each read of its ``raw`` attribute is one request, of the bytes that are asked for."""
        self._check_kwargs(kwargs)
        if mode not in ("r", "rb"):
            raise OSError(errno.EROFS, "addresses are only read here", path)
        raw = _Object(path)
        if buffering == 0 and mode == "rb":
            return raw
        buffered = io.BufferedReader(raw, buffering if buffering > 1 else _BUFFER_BYTES)
        return buffered if mode == "rb" else io.TextIOWrapper(buffered, encoding="utf-8")

    def _exists(self, path: str, **kwargs: Any) -> bool:
        with _system_of(path) as (system, place):
            return system.exists(place)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        # Not fsspec's own isfile, which takes every fault for a no.
        with contextlib.suppress(FileNotFoundError), _system_of(path) as (system, place):
            return system.info(place)["type"] == "file"
        return False

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        with contextlib.suppress(FileNotFoundError), _system_of(path) as (system, place):
            return system.info(place)["type"] == "directory"
        return False

    def _ls(self, path: str, **kwargs: Any) -> list[str]:
        """Names in a folder; those of folders end in a slash."""
        with _system_of(path) as (system, place):
            entries = system.ls(place, detail=True)
        names = [(entry["name"].rstrip("/").rpartition("/")[2], entry["type"]) for entry in entries]
        return [f"{name}/" if kind == "directory" else name for name, kind in names]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        """A copy in iopath's cache, of which there is one for each version of an object."""
        with _system_of(path) as (system, place):
            version = hashlib.sha256(f"{path}\0{system.ukey(place)}".encode()).hexdigest()
            file = Path(get_cache_dir(), "selftrain_d2", version, path.rpartition("/")[2])
            with file_lock(str(file)):
                if force or not file.is_file():
                    with whole_file(file) as temporary:
                        system.get_file(place, str(temporary))
        return str(file)


class _Object(io.RawIOBase):
    """An object's bytes by range requests; its size is only asked for where it is needed."""

    def __init__(self, path: str):
        super().__init__()
        self.name = path
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (self._size() if start is None else start)
        return self._position

    def readall(self) -> bytes:
        return self._read(None)

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int | None) -> bytes:
        start = self._position
        end = None if size is None else start + size
        with _system_of(self.name) as (system, place):
            try:
                data = system.cat_file(place, start or None, end)
            except (FileNotFoundError, PermissionError):
                raise
            except Exception:  # a range that begins at the end is refused by some, each in its own way
                if not start or start < system.size(place):
                    raise
                data = b""
        self._position += len(data)
        return data

    def _size(self) -> int:
        with _system_of(self.name) as (system, place):
            return system.size(place)


@contextlib.contextmanager
def _system_of(path: str) -> Iterator[tuple[Any, str]]:
    """fsspec's file system of an address, and the place in it.

    It is asked for anew each time: fsspec keeps one for each thread and process, none of which may use another's.
    """
    protocol = path.partition("://")[0]
    try:
        import fsspec
    except ImportError as error:
        raise OSError(f"{protocol}:// needs fsspec: pip install 'selftrain_d2[storage]'") from error
    try:
        yield fsspec.core.url_to_fs(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    except OSError:
        raise
    except ImportError as error:
        raise OSError(f"{protocol}:// needs another package: {error}") from error
    except Exception as error:  # of the clients: credentials, connections, time limits
        raise OSError(f"{type(error).__name__}: {error}") from error


for _prefix in PREFIXES:
    with contextlib.suppress(KeyError):  # a project's own handler stays
        PathManager.register_handler(FsspecPathHandler(_prefix), allow_override=False)
