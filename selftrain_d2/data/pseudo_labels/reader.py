"""Pseudo labels as training reads them: a finished folder verified, or loaded above a threshold.

What is in the folder: see :mod:`~selftrain_d2.data.pseudo_labels.writer`.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from selftrain_d2.data.pseudo_labels.dataset import (
    PseudoImageDataset,
    PseudoLabelDataset,
    join_columns,
    shard_columns,
)
from selftrain_d2.data.pseudo_labels.manifest import (
    MANIFEST,
    count_contents,
    kind_of,
    read_manifest,
    shard_files,
)
from selftrain_d2.data.pseudo_labels.mask_dataset import PseudoMaskDataset, mask_columns
from selftrain_d2.data.pseudo_labels.masks import MASKS, check_masks_are_there, damaged_mask, least_percents
from selftrain_d2.data.pseudo_labels.selection import (
    WITHOUT_LOCALIZATION,
    ScoreThreshold,
    matching_threshold,
    resolve_thresholds,
    select_and_ignore,
    select_boxes,
    thresholds_of_classes,
)
from selftrain_d2.data.pseudo_labels.shards import (
    LOCALIZATION_SCORES,
    SCHEMA,
    box_counts,
    flat_values,
    localization_scores,
    read_shards,
)
from selftrain_d2.errors import InputError
from selftrain_d2.storage import absolute_root

logger = logging.getLogger(__name__)


def verify_pseudo_labels(folder: str | os.PathLike) -> dict[str, Any]:
    """Check a finished folder: every SHA-256, and that the manifest says what the shards hold.

    Returns:
        The manifest.

    Raises:
        InputError: a shard or mask is missing or damaged, or the manifest differs from the shards.
    """
    manifest = read_manifest(folder)
    kind, files = kind_of(manifest), shard_files(folder, manifest)
    for table in read_shards(files if kind is MASKS else ()):
        name = damaged_mask(folder, table)
        if name is not None:
            raise InputError(
                f"The mask of {name} in {folder} is missing or damaged; run the command that wrote the folder again."
            )
    for key, value in count_contents(files, kind).items():
        if manifest.get(key) != value:
            raise InputError(
                f"{os.path.join(folder, MANIFEST)} was changed: its {key!r} is not what the shards hold; copy the "
                "folder again, or run the command that wrote it."
            )
    return manifest


def load_pseudo_labels(
    folder: str | os.PathLike,
    score_thresh: ScoreThreshold = 0.5,
    *,
    image_root: str | os.PathLike | None = None,
    top_k: int | None = None,
    boxes_per_image: float | None = None,
    ignore_score_thresh: ScoreThreshold | None = None,
    localization_thresh: float | None = None,
    score_weighted: bool = False,
) -> PseudoImageDataset:
    """Read pseudo labels as detectron2 dataset dicts. Every shard is checked against its SHA-256.

    Args:
        folder: what ``generate_pseudo_labels`` wrote; a path, or an address.
        score_thresh: boxes with a score under this are left out (those at it stay), and pixels ignored (their scores
            are known in whole percent): one number, or one by class name, for every class. The paper uses 0.5.
        image_root: where the images are, if not where they were when labeled.
        top_k: of the boxes that are left, only this many of each image, those with the highest scores.
        boxes_per_image: in place of ``score_thresh``: take the threshold that leaves this many boxes an image on
            average, as nearly as can be, e.g. as many as human labels have. Images without boxes count. The
            threshold is logged.
        ignore_score_thresh: boxes of at least this score that are not selected by the above are neither objects nor
            background: one number, or one by class name, for every class. None: they are left out.
        localization_thresh: boxes whose localization score (see ``labeling.views``) is under this are not selected,
            whatever their score: with ``ignore_score_thresh`` they are ignored, without left out. Known of labels of a
            teacher with several views. None: it does not count.
        score_weighted: boxes whose score lies between ``ignore_score_thresh`` and the threshold of their class are
            selected too, and count by ``(score - ignore_score_thresh) / (threshold - ignore_score_thresh)``; those from
            the threshold on count fully. What ``top_k`` or ``localization_thresh`` leave out is still ignored.

    Returns:
        One dict per labeled image, images without boxes included (they train as all-negative):
        ``file_name, image_id, height, width, label_source="pseudo", annotations``; each annotation has
        ``bbox`` (XYXY, pixels), ``bbox_mode``, ``category_id`` (contiguous), ``score``, and of a teacher with
        masks ``segmentation`` (RLE, for INPUT.MASK_FORMAT "bitmask"). Each dict is made when asked for.

        With ``ignore_score_thresh`` dicts also have ``ignore_crowd`` True, which tells ``SelfTrainingDatasetMapper``
        what ``iscrowd`` 1 means: the boxes to ignore have it; they come last, without masks. With ``score_weighted``
        the others have ``weight``, in [0, 1].

        Masks of a segmentor have, in place of annotations, ``sem_seg_file_name`` and what
        ``SelfTrainingDatasetMapper`` needs to check and threshold it, ``sem_seg_sha256`` and
        ``sem_seg_least_percent``; a mapper that knows the first alone reads all classes without the threshold.

    Raises:
        InputError: the folder holds no finished pseudo labels, a shard or mask is missing or damaged, a class is
            unknown or has no threshold, a threshold lies under the floor that labels were written with, an
            argument does not go with masks, boxes have no localization score to compare, or ``score_weighted`` has
            no ``ignore_score_thresh``.
    """
    manifest = read_manifest(folder)
    thresholds = resolve_thresholds(
        manifest,
        score_thresh,
        top_k,
        boxes_per_image,
        ignore_score_thresh,
        localization_thresh,
        score_weighted,
    )
    files = shard_files(folder, manifest)
    image_root = manifest["image_root"] if image_root is None else str(image_root)
    if kind_of(manifest) is MASKS:
        return _load_masks(folder, files, least_percents(thresholds), image_root)
    if boxes_per_image is not None:
        thresholds[:] = _choose_threshold(
            folder, files, thresholds, top_k, boxes_per_image, manifest, localization_thresh
        )
    ignored_from = (
        None if ignore_score_thresh is None else thresholds_of_classes(manifest, ignore_score_thresh)
    )
    # The empty table gives the columns their types where there is no shard.
    tables = itertools.chain([SCHEMA.empty_table()], read_shards(files))
    columns = join_columns(
        _columns(table, thresholds, top_k, ignored_from, localization_thresh, score_weighted)
        for table in tables
    )
    return PseudoLabelDataset(columns, image_root)


def _columns(
    table: pa.Table,
    thresholds: np.ndarray,
    top_k: int | None,
    ignored_from: np.ndarray | None,
    localization_thresh: float | None,
    score_weighted: bool,
) -> dict[str, np.ndarray]:
    selected = select_and_ignore(
        flat_values(table, "scores"),
        flat_values(table, "category_ids"),
        box_counts(table),
        thresholds,
        top_k=top_k,
        localized=_localized(table, localization_thresh),
        ignored_from=ignored_from,
        score_weighted=score_weighted,
    )
    return shard_columns(table, *selected)


def _load_masks(
    folder: str | os.PathLike, files: Sequence[str], least_percent: tuple[int, ...], image_root: str
) -> PseudoMaskDataset:
    parts = [mask_columns(MASKS.schema.empty_table(), least_percent)]
    for table in read_shards(files):
        check_masks_are_there(folder, table)
        parts.append(mask_columns(table, least_percent))
    return PseudoMaskDataset(join_columns(parts), image_root, None, absolute_root(folder), least_percent)


def _choose_threshold(
    folder: str | os.PathLike,
    files: Sequence[str],
    floors: np.ndarray,
    top_k: int | None,
    boxes_per_image: float,
    manifest: dict[str, Any],
    localization_thresh: float | None,
) -> float:
    images = manifest["labeled"] + manifest["empty"]
    scores = [SCHEMA.empty_table()["scores"].combine_chunks().flatten().to_numpy()]
    for table in read_shards(files, ["scores", "category_ids", LOCALIZATION_SCORES]):
        of_table, category_ids = flat_values(table, "scores"), flat_values(table, "category_ids")
        localized = _localized(table, localization_thresh)
        scores.append(
            of_table[select_boxes(of_table, category_ids, box_counts(table), floors, top_k, localized)]
        )
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


def _localized(table: pa.Table, localization_thresh: float | None) -> np.ndarray | None:
    """(B,) bool, whether boxes reach the threshold; None without one."""
    if localization_thresh is None:
        return None
    localization = localization_scores(table)
    if np.isnan(localization).any():
        raise InputError(WITHOUT_LOCALIZATION)
    return localization >= np.float32(localization_thresh)
