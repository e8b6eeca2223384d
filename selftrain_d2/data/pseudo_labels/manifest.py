"""The manifest of a pseudo-label folder: what was labeled, by which teacher, and what the shards hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selftrain_d2.data.pseudo_labels.masks import MASKS
from selftrain_d2.data.pseudo_labels.shards import BOXES, LabelKind, read_shards
from selftrain_d2.errors import InputError
from selftrain_d2.files import read_json
from selftrain_d2.storage import is_file, size_of

MANIFEST = "manifest.json"
#: Goes up when folders of before can no longer be read.
FORMAT = 2


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a finished pseudo-label folder, which may be at an address.

    Raises:
        InputError: there is none, labeling has not finished, or it was written by another version of this
            package.
    """
    file = os.path.join(folder, MANIFEST)
    if not is_file(file):
        raise InputError(f"{folder} holds no pseudo labels: it has no {MANIFEST}.")
    manifest = read_json(file)
    if not manifest.get("finished"):
        raise InputError(f"The pseudo labels in {folder} are not finished: run the labeling command again.")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{folder} was written by another version of this package (format {manifest.get('format')}, here "
            f"{FORMAT}): label the images again, into another folder."
        )
    return manifest


def read_manifest_of_boxes(folder: str | os.PathLike) -> dict[str, Any]:
    """As :func:`read_manifest`, for what can only be done with boxes.

    Raises:
        InputError: see there; or the labels are masks.
    """
    manifest = read_manifest(folder)
    if kind_of(manifest) is not BOXES:
        raise InputError(f"The pseudo labels in {folder} are masks of pixels: this works with boxes alone.")
    return manifest


def shard_files(folder: str | os.PathLike, manifest: Mapping[str, Any]) -> list[str]:
    """Paths or addresses of a folder's shards, in order."""
    return [os.path.join(folder, "shards", name) for name in manifest["shards"]]


def kind_of(manifest: Mapping[str, Any]) -> LabelKind:
    """What a folder's labels are, from its manifest or identity."""
    return MASKS if MASKS.classes_key in manifest else BOXES


def count_contents(files: Sequence[str | os.PathLike], kind: LabelKind) -> dict[str, Any]:
    """Checksums and contents of all shards, for the manifest."""
    counts = dict.fromkeys(("listed", "labeled", "empty", kind.name), 0)
    skipped: dict[str, str] = {}
    names = NameHash()
    for table in read_shards(files, ["file_name", "skipped", *kind.count_columns]):
        labels = kind.counts(table)
        labeled = table["skipped"].is_null().to_numpy()
        names.update(table["file_name"].to_pylist())
        counts["listed"] += table.num_rows
        counts["labeled"] += int((labels[labeled] > 0).sum())
        counts["empty"] += int((labels[labeled] == 0).sum())
        counts[kind.name] += int(labels.sum())
        unlabeled = table.filter(~labeled)
        skipped.update(zip(unlabeled["file_name"].to_pylist(), unlabeled["skipped"].to_pylist()))
    return {
        **counts,
        "file_list_sha256": names.hexdigest(),
        "skipped": skipped,
        "shards": {os.path.basename(file): size_of(file, read=True) for file in files},
    }


class NameHash:
    """SHA-256 of a list of file names."""

    def __init__(self, names: Iterable[str] = ()):
        self._digest = hashlib.sha256()
        self.update(names)

    def update(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self._digest.update(name.encode() + b"\0")
            except UnicodeEncodeError:
                raise InputError(f"The file name {name!r} is not UTF-8: rename the file.") from None

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
