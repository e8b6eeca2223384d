"""Files that are never seen half-written, and work that is not mixed up with other work."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from selftrain_d2.errors import InputError
from selftrain_d2.storage import read_bytes

#: What a system says when there is no room left for a file.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_ROOM, _RIGHTS, _PATH = "make room on that disk", "check its permissions", "correct the path"
_ADVICE = {
    **dict.fromkeys(NO_ROOM, _ROOM),
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOTDIR: _PATH,
    errno.EEXIST: _PATH,  # a file where a folder is to be
    errno.EISDIR: _PATH,
    errno.ENOENT: _PATH,
}


def read_json(file: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Args:
        file: a path, or an address (see :mod:`selftrain_d2.storage`).

    Raises:
        OSError: it cannot be read.
        InputError: it is not JSON.
    """
    try:
        return json.loads(read_bytes(file).decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON: {error}.") from error


def write_json(file: str | os.PathLike, content: Any) -> None:
    """Write a JSON file whole, as :func:`whole_file` does."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: str | os.PathLike, content: str) -> None:
    """Write a text file whole, as :func:`whole_file` does."""
    with whole_file(file) as temporary:
        temporary.write_text(content, encoding="utf-8")


@contextlib.contextmanager
def whole_file(file: str | os.PathLike) -> Iterator[Path]:
    """A path beside ``file`` to write to, renamed to ``file`` when the block ends without an exception.

    Whatever ends the block, a kill excepted, nothing else is left; before the renaming ``file`` is as it was.

    Raises:
        InputError: see :func:`writing`.
    """
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{process_name()}")
    try:
        with writing(file):
            yield temporary
            os.replace(temporary, file)
    finally:
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)


def process_name() -> str:
    """Tells this process from others, also from those of other machines, which may have its number."""
    return f"{os.getpid()}-{socket.gethostname()}"


def is_empty(folder: str | os.PathLike, record: str) -> bool:
    """Whether a folder has nothing but what work leaves there that is killed before its record is written.

    Args:
        record: name of the file that work begins with.
    """
    ours = (".lock", f".{record}.")
    return not os.path.isdir(folder) or all(name.startswith(ours) for name in os.listdir(folder))


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove checkpoints that a process killed in :func:`whole_file` left half-written in a folder.

    Nobody else may be writing to the folder.
    """
    for file in (
        *Path(folder).glob(".*.pth.[0-9]*"),
        *Path(folder).glob("*.pth.part"),
    ):  # .part: of older versions
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike, errors: Collection[int] = tuple(_ADVICE)) -> Iterator[None]:
    """Tell the user of a full disk, of one that may not be written to, or of a path that cannot be.

    Args:
        errors: numbers of the errors to tell of; NO_ROOM around work that also reads.

    Raises:
        InputError: with the path, in place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in errors:
            raise
        raise InputError(
            f"{path} cannot be written ({error.strerror}): {_ADVICE[error.errno]} and run the same command again."
        ) from error


def check_unchanged(folder: str | os.PathLike, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError if work in a folder was begun with other settings than those of now.

    Args:
        before: what was written down when the work began; it may have more keys.
        now: the settings that the result depends on.
    """
    for key, value in now.items():
        if before.get(key) != value:
            raise InputError(
                f"{folder} was begun with another {key}: {_short(before.get(key))} there, {_short(value)} now; "
                "choose another output folder, or delete this one to start anew."
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
