"""Folders that a ``prepare-*`` command makes: whole or absent, made once, never at the cost of other files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selftrain_d2.errors import InputError

MANIFEST = "manifest.json"


def prepare_folder(
    output: Path,
    title: str,
    is_current: Callable[[Mapping[str, Any]], bool],
    write: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    """Make the folder, unless it is there, whole and current.

    Args:
        output: may exist if it is empty or was made by an earlier call with this title.
        title: marks the manifest as this command's.
        is_current: whether a manifest found there describes what would be made now.
        write: fills a folder, last with :func:`write_manifest`, and returns the manifest. The folder gets
            its final name only after that.

    Returns:
        The manifest.

    Raises:
        InputError: ``output`` holds files that no earlier call made, or cannot be made.
    """
    output = Path(output).absolute()
    earlier = find_manifest(output, title)
    if earlier and is_current(earlier) and _is_intact(output, earlier):
        return earlier
    if output.exists() and not _holds_only(output, earlier):
        raise InputError(f"{output} holds files that this command did not make: give another --output.")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{output} cannot be made ({error.strerror}): give another --output.") from error
    try:
        manifest = write(partial)
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def write_manifest(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``manifest.json``: the content and two entries more.

    ``"sha256"`` has the SHA-256 of every file in the folder by name; ``"sha256_of_all"`` is that of the lines
    ``<sha256>  <name>``, as ``sha256sum`` prints them, sorted by name.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: _sha256(folder / name) for name in names}
    lines = "".join(f"{digest}  {name}\n" for name, digest in files.items())
    digest = hashlib.sha256(lines.encode()).hexdigest()
    manifest = {**content, "sha256_of_all": digest, "sha256": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def find_manifest(folder: Path, title: str) -> dict[str, Any] | None:
    """The folder's manifest, or None if there is none of this title that lists the folder's files."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(manifest, dict) and manifest.get("title") == title
    return manifest if ours and isinstance(manifest.get("sha256"), dict) else None


def _holds_only(folder: Path, manifest: Mapping[str, Any] | None) -> bool:
    """Whether nothing would be lost with the folder but what an earlier run wrote."""
    made = {MANIFEST, *manifest["sha256"]} if manifest else set()
    return folder.is_dir() and all(
        path.is_dir() or path.relative_to(folder).as_posix() in made for path in folder.rglob("*")
    )


def _is_intact(folder: Path, manifest: Mapping[str, Any]) -> bool:
    return all(
        (folder / name).is_file() and _sha256(folder / name) == digest
        for name, digest in manifest["sha256"].items()
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
