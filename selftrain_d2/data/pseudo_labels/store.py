"""The pseudo-label folder: written once, thresholded as often as one likes.

Layout::

    manifest.json                           what was labeled, by which teacher, and how it went
    shards/shard-000000-<SHA-256>.parquet   one row an image, `SHARD_SIZE` images of the list a shard
    masks/<image>.png                       of a segmentor: see ``pseudo_masks``; their SHA-256 are in the rows
    .lock                                   held by the process that writes

A shard appears whole or not at all, after its masks, so work that stopped goes on at the first missing shard; one
that was damaged since is told by its name and written again. Every listed image has one row: with boxes (pixels of
a class), without any, or with the reason why it was skipped. So labeled + empty + skipped = listed, always.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from selftrain_d2.data.pseudo_labels.dataset import (
    PseudoImageDataset,
    PseudoLabelDataset,
    join_columns,
    shard_columns,
)
from selftrain_d2.data.pseudo_labels.folder_lock import LOCK, FolderLock
from selftrain_d2.data.pseudo_labels.mask_dataset import PseudoMaskDataset, mask_columns
from selftrain_d2.data.pseudo_labels.masks import (
    MASKS,
    TEMPORARY,
    PixelLabels,
    check_masks_are_there,
    damaged_mask,
    least_percents,
    write_mask,
)
from selftrain_d2.data.pseudo_labels.selection import (
    ScoreThreshold,
    class_names_of,
    matching_threshold,
    resolve_thresholds,
    select_boxes,
)
from selftrain_d2.data.pseudo_labels.shards import (
    BOXES,
    SCHEMA,
    LabelKind,
    box_counts,
    flat_values,
    is_intact,
    list_shards,
    make_row,
    read_shard,
    write_shard,
)
from selftrain_d2.errors import InputError
from selftrain_d2.files import check_unchanged, read_json, write_json, writing

__all__ = [
    "SCHEMA",
    "PseudoLabelDataset",
    "PseudoLabelWriter",
    "load_pseudo_labels",
    "make_row",
    "read_manifest",
    "verify_pseudo_labels",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
#: Images a shard. What is lost when a writer is killed is one shard of each process.
SHARD_SIZE = 256
#: Goes up when folders of before can no longer be read.
FORMAT = 2


class PseudoLabelWriter:
    """Writes a pseudo-label folder, shard by shard, and goes on where an earlier writer stopped.

    Several processes may write together: one opens the folder with ``exclusive``, the others after it without,
    and each writes its own shards. The folder is given free by ``finish``, ``close``, the end of a ``with`` block,
    or the end of the process.

    Args:
        folder: made if it is not there.
        identity: what the labels depend on: ``thing_classes`` (boxes) or ``stuff_classes`` (masks), ``score_floor``
            (no box or pixel of a lower score is written), ``image_root``, hashes of the teacher. A folder begun with
            another identity is refused. Goes into the manifest.
        file_names: all images to label, relative to the image root, in a fixed order.
        exclusive: hold the folder against all other writers that ask for this, remove what a killed one left
            half-written, and check the shards that are there; damaged ones are removed, so they are missing.

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
    ):
        self.folder = Path(folder)
        self.file_names = file_names
        self.identity = {
            "format": FORMAT,
            **identity,
            "listed": len(file_names),
            "file_list_sha256": _NameHash(file_names).hexdigest(),
            "shard_size": SHARD_SIZE,
        }
        self._kind = _kind(identity)
        self._least_percent = least_percents([identity["score_floor"]] * len(class_names_of(identity)))
        self._lock = None
        try:
            if exclusive:
                with writing(self.folder):
                    self._take()
            self.manifest: dict[str, Any] = read_json(self.folder / MANIFEST)
            check_unchanged(self.folder, self.manifest, self.identity)
            if exclusive:
                self._clean()
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
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

    def _clean(self) -> None:
        """Remove what is half-written, damaged, or there twice."""
        unfinished = (f".{MANIFEST}.*", f"{TEMPORARY}*", "shards/.shard-*")
        for temporary in itertools.chain.from_iterable(map(self.folder.glob, unfinished)):
            temporary.unlink()
        seen = set()
        for shard, file in list_shards(self._shards):
            if not is_intact(file):
                logger.warning(f"{file} is damaged: it is removed and made again.")
                file.unlink()
            elif shard in seen:  # by a process that outlived its run
                file.unlink()
            elif self._kind is MASKS and (name := damaged_mask(self.folder, read_shard(file))) is not None:
                logger.warning(f"The mask of {name} is missing or damaged: its shard is made again.")
                file.unlink()
            else:
                seen.add(shard)

    @property
    def _shards(self) -> Path:
        return self.folder / "shards"

    @property
    def finished(self) -> bool:
        """Whether :meth:`finish` was reached, now or by an earlier writer."""
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

        To be called by the process that opened it with ``exclusive``, when all shards are there. Takes the memory
        of one shard, and that of the skipped files and their reasons.

        Args:
            facts: more entries for the manifest (date, versions, duration).

        Returns:
            The manifest.

        Raises:
            InputError: a shard is damaged, or the disk is full.
        """
        missing = self.missing_shards()
        if missing:
            raise ValueError(f"{self.folder} cannot be finished without its shards {missing[:5]} ...")
        counts = _count([file for _, file in list_shards(self._shards)], self._kind)
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


class _NameHash:
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


def _kind(manifest: Mapping[str, Any]) -> LabelKind:
    return MASKS if MASKS.classes_key in manifest else BOXES


def _count(files: Sequence[Path], kind: LabelKind) -> dict[str, Any]:
    """Checksums and contents of all shards, for the manifest."""
    counts = dict.fromkeys(("listed", "labeled", "empty", kind.name), 0)
    skipped: dict[str, str] = {}
    names = _NameHash()
    for table in _tables(files, ["file_name", "skipped", *kind.count_columns]):
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
        "shards": {file.name: file.stat().st_size for file in files},
    }


def _tables(files: Iterable[Path], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    return (read_shard(file, columns) for file in files)


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a finished pseudo-label folder.

    Raises:
        InputError: there is none, labeling has not finished, or it was written by another version of this
            package.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
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
    if _kind(manifest) is not BOXES:
        raise InputError(f"The pseudo labels in {folder} are masks of pixels: this works with boxes alone.")
    return manifest


def verify_pseudo_labels(folder: str | os.PathLike) -> dict[str, Any]:
    """Check a finished folder: every SHA-256, and that the manifest says what the shards hold.

    Returns:
        The manifest.

    Raises:
        InputError: a shard or mask is missing or damaged, or the manifest differs from the shards.
    """
    manifest = read_manifest(folder)
    kind, files = _kind(manifest), _shard_files(folder, manifest)
    for table in _tables(files if kind is MASKS else ()):
        name = damaged_mask(folder, table)
        if name is not None:
            raise InputError(
                f"The mask of {name} in {folder} is missing or damaged; run the command that wrote the folder again."
            )
    for key, value in _count(files, kind).items():
        if manifest.get(key) != value:
            raise InputError(
                f"{Path(folder) / MANIFEST} was changed: its {key!r} is not what the shards hold; copy the folder "
                "again, or run the command that wrote it."
            )
    return manifest


def load_pseudo_labels(
    folder: str | os.PathLike,
    score_thresh: ScoreThreshold = 0.5,
    *,
    image_root: str | os.PathLike | None = None,
    top_k: int | None = None,
    boxes_per_image: float | None = None,
) -> PseudoImageDataset:
    """Read pseudo labels as detectron2 dataset dicts. Every shard is checked against its SHA-256.

    Args:
        folder: what ``generate_pseudo_labels`` wrote.
        score_thresh: boxes with a score under this are left out (those at it stay), and pixels ignored (their scores
            are known in whole percent): one number, or one by class name, for every class. The paper uses 0.5.
        image_root: where the images are, if not where they were when labeled.
        top_k: of the boxes that are left, only this many of each image, those with the highest scores.
        boxes_per_image: in place of ``score_thresh``: take the threshold that leaves this many boxes an image on
            average, as nearly as can be, e.g. as many as human labels have. Images without boxes count. The
            threshold is logged.

    Returns:
        One dict per labeled image, images without boxes included (they train as all-negative):
        ``file_name, image_id, height, width, label_source="pseudo", annotations``; each annotation has
        ``bbox`` (XYXY, pixels), ``bbox_mode``, ``category_id`` (contiguous), ``score``, and of a teacher with
        masks ``segmentation`` (RLE, for INPUT.MASK_FORMAT "bitmask"). Each dict is made when asked for.

        Masks of a segmentor have, in place of annotations, ``sem_seg_file_name`` and what
        ``SelfTrainingDatasetMapper`` needs to check and threshold it, ``sem_seg_sha256`` and
        ``sem_seg_least_percent``; a mapper that knows the first alone reads all classes without the threshold.

    Raises:
        InputError: the folder holds no finished pseudo labels, a shard or mask is missing or damaged, a class is
            unknown or has no threshold, a threshold lies under the floor that labels were written with, or an
            argument does not go with masks.
    """
    manifest = read_manifest(folder)
    thresholds = resolve_thresholds(manifest, score_thresh, top_k, boxes_per_image)
    files = _shard_files(folder, manifest)
    image_root = manifest["image_root"] if image_root is None else str(image_root)
    if _kind(manifest) is MASKS:
        return _load_masks(folder, files, least_percents(thresholds), image_root)
    if boxes_per_image is not None:
        thresholds[:] = _choose_threshold(folder, files, thresholds, top_k, boxes_per_image, manifest)
    # The empty table gives the columns their types where there is no shard.
    tables = itertools.chain([SCHEMA.empty_table()], _tables(files))
    columns = join_columns(shard_columns(table, _selected(table, thresholds, top_k)) for table in tables)
    return PseudoLabelDataset(columns, image_root)


def _load_masks(
    folder: str | os.PathLike, files: Sequence[Path], least_percent: tuple[int, ...], image_root: str
) -> PseudoMaskDataset:
    parts = [mask_columns(MASKS.schema.empty_table(), least_percent)]
    for table in _tables(files):
        check_masks_are_there(folder, table)
        parts.append(mask_columns(table, least_percent))
    return PseudoMaskDataset(join_columns(parts), image_root, None, os.path.abspath(folder), least_percent)


def _choose_threshold(
    folder: str | os.PathLike,
    files: Sequence[Path],
    floors: np.ndarray,
    top_k: int | None,
    boxes_per_image: float,
    manifest: dict[str, Any],
) -> float:
    images = manifest["labeled"] + manifest["empty"]
    scores = [SCHEMA.empty_table()["scores"].combine_chunks().flatten().to_numpy()]
    for table in _tables(files, ["scores", "category_ids"]):
        scores.append(flat_values(table, "scores")[_selected(table, floors, top_k)])
    everything = np.concatenate(scores)
    threshold = matching_threshold(everything, boxes_per_image * images)
    if threshold is None:
        return 1.0
    kept = int((everything >= np.float32(threshold)).sum())
    logger.info(
        f"{folder}: the score threshold {threshold:.4f} leaves {kept / images:.3f} boxes an image "
        f"({boxes_per_image:g} asked for; {len(everything) / images:.3f} without a threshold)."
    )
    return threshold


def _selected(table: pa.Table, thresholds: np.ndarray, top_k: int | None) -> np.ndarray:
    scores, category_ids = flat_values(table, "scores"), flat_values(table, "category_ids")
    return select_boxes(scores, category_ids, box_counts(table), thresholds, top_k)


def _shard_files(folder: str | os.PathLike, manifest: dict[str, Any]) -> list[Path]:
    return [Path(folder) / "shards" / name for name in manifest["shards"]]
