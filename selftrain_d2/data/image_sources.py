"""Images to label: a folder, a list, COCO JSON, tar archives, or a registered dataset.

Each function returns :class:`ImageSource`. Whether an image can be read is found out when it is read; what cannot
be listed (a folder without permission, the rest of a damaged archive) is listed itself, so that it is
skipped with its reason as an image would be, and nothing goes missing in silence.
"""

from __future__ import annotations

import fnmatch
import glob
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from selftrain_d2 import storage
from selftrain_d2.data import tar_archive
from selftrain_d2.data.coco_datasets import reading_coco
from selftrain_d2.data.coco_file import read_coco_images
from selftrain_d2.data.image_formats import has_image_extension, printable
from selftrain_d2.errors import InputError
from selftrain_d2.storage import absolute_root


class ImageSource(NamedTuple):
    """Images by name. ``os.path.join(image_root, file_name)`` is a path or an address (:mod:`selftrain_d2.storage`).

    Names are relative to the root, or absolute paths. An empty root is that of whole paths and addresses.
    """

    image_root: str
    file_names: list[str]


def list_images(folder: str | os.PathLike) -> list[str]:
    """Image files below a folder, found by extension. Linked folders are followed, but not in circles.

    Returns:
        Paths relative to ``folder`` with forward slashes, sorted, so that every process and every run
        has the same order. A folder that cannot be listed is among them, with a slash at its end.

    Raises:
        InputError: the folder is missing, cannot be listed, or holds no image.
    """
    folder = os.fspath(folder)
    if not storage.is_folder(folder):
        raise InputError(f"Image folder {folder} does not exist or is not a folder.")
    files = _walk_address(folder) if storage.is_address(folder) else _walk(folder)
    found = sorted(map(printable, files))
    if not found:
        raise InputError(
            f"Image folder {folder} holds no image: no file in it or below it ends in a known "
            "image extension (.jpg, .png, .tif, ...)."
        )
    return found


def _walk(folder: str) -> Iterator[str]:
    pending = [""]
    while pending:
        parent = pending.pop()
        try:
            with os.scandir(os.path.join(folder, parent)) as entries:
                entries = list(entries)
        except OSError as error:
            if not parent:
                raise InputError(f"Image folder {folder} cannot be listed: {error.strerror}.") from error
            yield parent
            continue
        for entry in entries:
            link = entry.is_symlink()
            if os.path.isdir(entry.path) if link else entry.is_dir():
                if not (link and _leads_up(entry.path)):
                    pending.append(f"{parent}{entry.name}/")
            # A broken link is listed, to be skipped with its reason; pipes and sockets are no images.
            elif has_image_extension(entry.name) and (link or entry.is_file()):
                yield parent + entry.name


def _walk_address(address: str) -> Iterator[str]:
    try:
        yield from storage.walk(address, has_image_extension)
    except OSError as error:
        raise InputError(f"Image folder {address} cannot be listed: {error.strerror or error}.") from error


def _leads_up(link: str) -> bool:
    target = os.path.realpath(link)
    return os.path.commonpath([target, os.path.realpath(os.path.dirname(link))]) == target


def images_of_folder(folder: str | os.PathLike) -> ImageSource:
    """All images below a folder; see :func:`list_images`."""
    return ImageSource(absolute_root(folder), list_images(folder))


def images_of_list(list_file: str | os.PathLike, image_root: str | os.PathLike | None = None) -> ImageSource:
    """Images named in a text file (UTF-8), one path or address a line.

    Empty lines and lines that start with # are left out. A line in double quotes is a JSON string, for names that
    a line cannot hold as they are; :func:`list_line` writes it.

    Args:
        image_root: what relative paths are relative to; by default the folder of the list.

    Raises:
        InputError: the list or the root is missing, the list is not UTF-8, names a file twice or none, has a line in
            quotes that is no JSON, or no file that it names exists.
    """
    if not storage.is_file(list_file):
        raise InputError(f"Image list {list_file} does not exist or is not a file.")
    root = _existing_root(storage.folder_of(list_file) if image_root is None else image_root)
    lines: dict[str, int] = {}
    try:
        with io.TextIOWrapper(storage.open_file(list_file), encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                path = line.rstrip("\n")
                if not path.strip() or path.startswith("#"):
                    continue
                if len(path) > 1 and path[0] == path[-1] == '"':
                    path = _unquoted(path, f"Image list {list_file}, line {number}")
                name = _relative(path, root)
                if name in lines:
                    raise InputError(
                        f"Image list {list_file} names {path} twice, in lines {lines[name]} and {number}: "
                        "remove one."
                    )
                lines[name] = number
    except UnicodeDecodeError as error:
        raise InputError(f"Image list {list_file} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise InputError(f"Image list {list_file} cannot be read: {error.strerror or error}.") from error
    return _checked(f"Image list {list_file}", root, list(lines))


def list_line(name: str) -> str:
    r"""A line (without its end) from which :func:`images_of_list` reads a name.

    That is the name itself, unless it begins with # or a quote, begins or ends with space, has a line break, or cannot
    be written as UTF-8; then it is a JSON string, such as ``"#1 of 2.jpg"``.
    """
    return name if _PLAIN_LINE.fullmatch(name) else json.dumps(name)


_PLAIN_LINE = re.compile(r'(?![\s#"\ufeff])[^\r\n\ud800-\udfff]+(?<!\s)')


def _unquoted(line: str, where: str) -> str:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: {line} is in quotes, but no JSON string ({error.msg}): leave the quotes out, or write \\\\ "
            "for \\."
        ) from error


def images_of_coco_json(json_file: str | os.PathLike, image_root: str | os.PathLike) -> ImageSource:
    """The images of a COCO JSON, whose annotations and categories are not looked at.

    Raises:
        InputError: the file or the root is missing, the file is not COCO's or names an image twice, or no image
            exists.
    """
    return images_of_coco_entries(json_file, read_coco_images(json_file), image_root)


def images_of_coco_entries(
    json_file: str | os.PathLike, images: Sequence[Mapping[str, Any]], image_root: str | os.PathLike
) -> ImageSource:
    """:func:`images_of_coco_json` of the ``images`` of a file that was read already, in their order."""
    root = _existing_root(image_root)
    names = [_relative(image["file_name"], root) for image in images]
    check_distinct(names, f"COCO JSON {json_file}")
    return _checked(f"COCO JSON {json_file}", root, names)


def images_of_archives(patterns: Sequence[str]) -> ImageSource:
    """Images inside uncompressed tar files, found by extension, in the order of the archives.

    Args:
        patterns: paths, with ``{000..012}`` for numbers in a row, or ``*`` and ``?``.

    Returns:
        The root is ``tar://`` and the folder that the archives share; a file name is
        ``shard-000.tar/path/in/archive.jpg``.

    Raises:
        InputError: an archive is missing, given twice, compressed, not a tar or not named so, or no archive
            holds an image.
    """
    archives = [absolute_root(path) for pattern in patterns for path in _expanded(pattern)]
    check_distinct(archives, "The list of archives")
    folder = storage.common_folder(map(storage.folder_of, archives))
    names = []
    for path in archives:
        index, name = tar_archive.tar_index(path), storage.below(path, folder) if folder else path
        if not name.lower().endswith(".tar"):
            raise InputError(f"Archive {path} is a tar file without that name: rename it to *.tar.")
        names += [f"{name}/{member}" for member in index.names()]
        if index.damage:
            names.append(name)
    if not names:
        raise InputError(
            f"The archives ({', '.join(patterns)}) hold no image: no member ends in a known image extension."
        )
    return ImageSource(tar_archive.PREFIX + folder, names)


def _expanded(pattern: str) -> list[str]:
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if numbers:
        first, last = numbers.groups()
        if int(first) > int(last):
            raise InputError(f"No archive matches {pattern}: its numbers go down.")
        head, tail = pattern[: numbers.start()], pattern[numbers.end() :]
        return [
            path
            for number in range(int(first), int(last) + 1)
            for path in _expanded(f"{head}{number:0{len(first)}}{tail}")
        ]
    if not glob.has_magic(pattern) or (not storage.is_address(pattern) and os.path.exists(pattern)):
        return [pattern]
    found = _matching(pattern) if storage.is_address(pattern) else sorted(glob.glob(pattern))
    if not found:
        raise InputError(f"No archive matches {pattern}.")
    return found


def _matching(pattern: str) -> list[str]:
    """Addresses that match a pattern in their last part."""
    folder, name = storage.folder_of(pattern), pattern.rpartition("/")[2]
    if glob.has_magic(folder):
        raise InputError(f"Archive {pattern}: in an address * and ? may stand behind the last slash alone.")
    try:
        return [os.path.join(folder, n) for n in fnmatch.filter(storage.list_folder(folder), name)]
    except OSError as error:
        raise InputError(
            f"No archive matches {pattern}: {folder} cannot be listed ({error.strerror or error})."
        ) from error


def images_of_dataset(name: str) -> ImageSource:
    """The images of a dataset in detectron2's catalog, each once.

    Raises:
        InputError: there is no such dataset, or its files are not there.
    """
    if name not in DatasetCatalog:
        raise InputError(f"There is no dataset named {name!r}; known: {', '.join(DatasetCatalog.list())}.")
    try:
        with reading_coco([name]):
            paths = list(dict.fromkeys(d["file_name"] for d in DatasetCatalog.get(name)))
    except FileNotFoundError as error:
        raise InputError(f"The files of dataset {name!r} are not there: {error}.") from error
    if not paths:
        raise InputError(f"Dataset {name!r} has no images.")
    root = MetadataCatalog.get(name).get("image_root") or storage.common_folder(map(storage.folder_of, paths))
    root = absolute_root(root)
    return ImageSource(root, [_relative(absolute_root(path), root) for path in paths])


def check_outside(output: str | os.PathLike, image_folder: str | os.PathLike) -> None:
    """Raise InputError if an output folder lies in a folder whose images are all taken, or is that folder.

    The masks and figures that are written there would be taken for images the next time.
    """
    if storage.is_address(image_folder):
        return
    inside, folder = os.path.realpath(output), os.path.realpath(image_folder)
    if os.path.commonpath([inside, folder]) == folder:
        raise InputError(
            f"The output folder {output} lies in the image folder {image_folder}, all of whose images are used: what "
            "is written there would be taken for images the next time; choose an output folder outside, and move what "
            "is there already."
        )


def check_distinct(names: Sequence[str], where: str) -> None:
    """Raise InputError if a name comes twice.

    Args:
        where: what has the names, for the message.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{where} names {name} twice: remove one.")
        seen.add(name)


def _existing_root(image_root: str | os.PathLike) -> str:
    if not storage.is_folder(image_root):
        raise InputError(f"Image folder {image_root} does not exist or is not a folder.")
    return absolute_root(image_root)


def _relative(path: str, root: str) -> str:
    """A path below the root without it; any other as an absolute path, which ``os.path.join`` leaves alone."""
    if not storage.is_address(path):
        path = storage.normalized(os.path.join(root, path))
    return printable(storage.below(path, root))


def _rooted(root: str, names: list[str]) -> tuple[str, list[str]]:
    """A root with which ``os.path.join`` makes paths and addresses of all names: another than the given one where some
    are addresses outside it, that is the folder of all, or none."""
    if not any(map(storage.is_address, names)):
        return root, names
    paths = [name if storage.is_address(name) else os.path.join(root, name) for name in names]
    root = storage.common_folder(set(map(storage.folder_of, paths)))
    return root, [storage.below(path, root) for path in paths] if root else paths


def _checked(where: str, root: str, names: list[str]) -> ImageSource:
    """Refuse what holds no image at all, which is more likely a wrong folder than so many lost files."""
    if not names:
        raise InputError(f"{where} names no image.")
    root, names = _rooted(root, names)
    if not any(storage.is_file(os.path.join(root, name)) for name in names):
        raise InputError(
            f"None of the {len(names)} images that {where} names is there, e.g. {os.path.join(root, names[0])}: "
            "check the image root."
        )
    return ImageSource(root, names)
