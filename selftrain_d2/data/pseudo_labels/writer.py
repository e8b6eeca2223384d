"""The pseudo-label folder: written once, thresholded as often as one likes.

Layout::

    manifest.json                           what was labeled, by which teacher, and how it went
    shards/shard-000000-<SHA-256>.parquet   one row an image, `SHARD_SIZE` images of the list a shard
    masks/<image>.png                       of a segmentor: see the module ``masks``; their SHA-256 are in the rows
    .lock                                   held by the process that writes

A shard appears whole or not at all, after its masks, so work that stopped goes on at the first missing shard; one
that was damaged since is told by its name and written again. Every listed image has one row: with boxes (pixels of
a class), without any, or with the reason why it was skipped. So labeled + empty + skipped = listed, always.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from selftrain_d2.data.pseudo_labels.manifest import FORMAT, MANIFEST, NameHash, count_contents, kind_of
from selftrain_d2.data.pseudo_labels.masks import (
    MASKS,
    TEMPORARY,
    PixelLabels,
    damaged_mask,
    least_percents,
    write_mask,
)
from selftrain_d2.data.pseudo_labels.selection import class_names_of
from selftrain_d2.data.pseudo_labels.shards import is_intact, list_shards, read_shard, write_shard
from selftrain_d2.errors import InputError
from selftrain_d2.files import check_unchanged, read_json, write_json, writing
from selftrain_d2.folder_lock import LOCK, FolderLock
from selftrain_d2.storage import check_local

logger = logging.getLogger(__name__)

#: Images a shard. What is lost when a writer is killed is one shard of each process.
SHARD_SIZE = 256


class PseudoLabelWriter:
    """Writes a pseudo-label folder, shard by shard, and goes on where an earlier writer stopped.

    Several processes may write together: one opens the folder with ``exclusive``, the others after it without,
    and each writes other shards (two that write the same one do no harm). The folder is given free by ``finish``,
    ``close``, the end of a ``with`` block, or the end of the process.

    Args:
        folder: made if it is not there.
        identity: what the labels depend on: ``thing_classes`` (boxes) or ``stuff_classes`` (masks), ``score_floor``
            (no box or pixel of a lower score is written), ``image_root``, hashes of the teacher. A folder begun with
            another identity is refused (another ``image_root`` only while the one before is there: images may be
            moved). Goes into the manifest.
        file_names: all images to label, relative to the image root, in a fixed order.
        exclusive: hold the folder against all other writers that ask for this, remove what a killed one left
            half-written, and check the shards that are there; damaged ones are removed, so they are missing.
        check: False: leave that check to :meth:`check_shards`, which several processes can share.

    Raises:
        InputError: another writer holds the folder; it has pseudo labels of another identity, or something else;
            it cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        identity: dict[str, Any],
        file_names: Sequence[str],
        *,
        exclusive: bool = True,
        check: bool = True,
    ):
        check_local(folder, "The output folder")
        self.folder = Path(folder)
        self.file_names = file_names
        self.identity = {
            "format": FORMAT,
            **identity,
            "listed": len(file_names),
            "file_list_sha256": NameHash(file_names).hexdigest(),
            "shard_size": SHARD_SIZE,
        }
        self._kind = kind_of(identity)
        self._least_percent = least_percents([identity["score_floor"]] * len(class_names_of(identity)))
        self._lock = None
        try:
            if exclusive:
                with writing(self.folder):
                    self._begin()
            self.manifest: dict[str, Any] = read_json(self.folder / MANIFEST)
            moved = exclusive and self._images_moved()
            if moved:
                self.manifest["image_root"] = self.identity["image_root"]
            check_unchanged(self.folder, self.manifest, self.identity)
            if moved:
                write_json(self.folder / MANIFEST, self.manifest)
            if exclusive:
                self._remove_unfinished()
            if exclusive and check:
                self.check_shards(self.shards())
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Lock the folder; begin it if it is new."""
        manifest_file = self.folder / MANIFEST
        self.folder.mkdir(parents=True, exist_ok=True)
        # All that one may leave that was killed before its manifest was there.
        ours = (LOCK, f".{MANIFEST}.")
        if not manifest_file.exists() and not all(p.name.startswith(ours) for p in self.folder.iterdir()):
            raise InputError(
                f"{self.folder} is not empty and has no {MANIFEST}: choose another output folder."
            )
        self._lock = FolderLock(self.folder)
        if not manifest_file.exists():
            write_json(manifest_file, {"finished": False, **self.identity})
        self._shards.mkdir(exist_ok=True)

    def _images_moved(self) -> bool:
        """Whether the images are no more where they were: those of now, of the same names, are taken for them."""
        before, now = (os.fspath(content.get("image_root", "")) for content in (self.manifest, self.identity))
        if before == now or not before or "://" in before or os.path.exists(before):
            return False
        logger.warning(
            f"{self.folder}: the images were in {before}, which is gone; they are taken to be in {now} now."
        )
        return True

    def _remove_unfinished(self) -> None:
        unfinished = (f".{MANIFEST}.*", f"{TEMPORARY}*", "shards/.shard-*")
        for temporary in itertools.chain.from_iterable(map(self.folder.glob, unfinished)):
            temporary.unlink(missing_ok=True)  # a writer that was thought to be dead may finish it

    def shards(self) -> list[tuple[int, Path]]:
        """Numbers and files of the shards that are there, in order; of two of one number that of the manifest first."""
        listed = self.manifest.get("shards", ())
        return sorted(list_shards(self._shards), key=lambda shard: (shard[0], shard[1].name not in listed))

    def check_shards(self, shards: Iterable[tuple[int, Path]]) -> None:
        """Remove shards that are damaged or there twice: they are missing then, and the folder is not finished.

        Args:
            shards: all of some numbers, as :meth:`shards` gives them.

        Raises:
            InputError: a shard cannot be read, which need not be its own fault.
        """
        seen = set()
        for shard, file in shards:
            if shard in seen:  # by another process that made it too
                file.unlink(missing_ok=True)
                continue
            try:
                intact = is_intact(file)
            except FileNotFoundError:  # another process removed it
                continue
            if not intact:
                self._remove(file, f"{file} is damaged: it is removed and made again.")
            elif self._kind is MASKS and (name := damaged_mask(self.folder, read_shard(file))) is not None:
                self._remove(file, f"The mask of {name} is missing or damaged: its shard is made again.")
            else:
                seen.add(shard)

    def _remove(self, file: Path, why: str) -> None:
        logger.warning(why)
        if self.finished:
            self.manifest = {"finished": False, **self.identity}
            write_json(self.folder / MANIFEST, self.manifest)
        file.unlink(missing_ok=True)

    def take(self) -> bool:
        """Hold the folder from now on, unless another does; whether this does."""
        try:
            self._lock = FolderLock(self.folder, patience=0.0)
        except InputError:
            return False
        return True

    @property
    def _shards(self) -> Path:
        return self.folder / "shards"

    @property
    def finished(self) -> bool:
        """Whether :meth:`finish` was reached: by this writer, an earlier one, or another process."""
        self.manifest = read_json(self.folder / MANIFEST)
        return bool(self.manifest["finished"])

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        there = {shard for shard, _ in list_shards(self._shards)}
        return [i for i in range(-(-len(self.file_names) // SHARD_SIZE)) if i not in there]

    def shard_range(self, shard: int) -> range:
        """Positions in ``file_names`` of a shard's images."""
        return range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, len(self.file_names)))

    def write_shard(self, shard: int, rows: Iterable[dict[str, Any]]) -> None:
        """Write one shard, whole.

        Args:
            rows: as made by ``make_row`` or :meth:`write_mask`, one for each position of ``shard_range(shard)``, in
                that order.

        Raises:
            InputError: the disk is full, or a box or pixel has a class without a name.
        """
        rows = list(rows)
        if [row["file_name"] for row in rows] != [self.file_names[i] for i in self.shard_range(shard)]:
            raise ValueError(f"The rows of shard {shard} are not the images of that shard.")
        table = pa.Table.from_pylist(rows, self._kind.schema)
        self._kind.check(table, len(class_names_of(self.identity)))
        write_shard(self._shards, shard, table)

    def write_mask(self, file_name: str, labels: PixelLabels) -> dict[str, Any]:
        """Write the PNG of an image, without the pixels under the score floor.

        Returns:
            Its row, for :meth:`write_shard`.

        Raises:
            InputError: the disk is full.
        """
        classes = labels.at(self._least_percent)
        return write_mask(self.folder, file_name, labels._replace(classes=classes))

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Check and count what was written, mark the folder as finished and give it free.

        To be called by the process that holds the folder, when all shards are there. Takes the memory of one shard,
        and that of the skipped files and their reasons.

        Args:
            facts: more entries for the manifest (date, versions, duration).

        Returns:
            The manifest.

        Raises:
            InputError: a shard is damaged, or the disk is full.
        """
        for _, group in itertools.groupby(self.shards(), key=lambda shard: shard[0]):
            same = list(group)
            if len(same) > 1:  # by two processes that both made it, and differ
                self.check_shards(same)
        missing = self.missing_shards()
        if missing:
            raise ValueError(f"{self.folder} cannot be finished without its shards {missing[:5]} ...")
        counts = count_contents([file for _, file in list_shards(self._shards)], self._kind)
        if counts["listed"] != self.identity["listed"]:  # a shard is there twice
            raise InputError(
                f"{self.folder} was also written by a run that was thought to be dead: stop it, and run the same "
                "command again, which cleans up."
            )
        self.manifest = {"finished": True, **self.identity, **counts, **facts}
        write_json(self.folder / MANIFEST, self.manifest)
        self.close()
        return self.manifest

    def close(self) -> None:
        """Give the folder free to other writers."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> PseudoLabelWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
