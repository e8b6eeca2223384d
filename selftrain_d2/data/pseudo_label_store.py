"""The pseudo-label folder: written once, thresholded as often as one likes.

Layout::

    manifest.json                  what was labeled, by which teacher, and how it went
    shards/shard-000000.parquet    one row an image, `SHARD_SIZE` images of the sorted list a shard

A shard appears whole or not at all (written beside, then renamed), so work that stopped goes on at the
first missing shard. Every listed image has one row: with boxes, without boxes, or with the reason why it
was skipped. So labeled + empty + skipped = listed, always.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from detectron2.structures import BoxMode

from selftrain_d2.errors import InputError
from selftrain_d2.files import check_unchanged, read_json, write_json

MANIFEST = "manifest.json"
SHARD_SIZE = 256

#: One row an image. Boxes are XYXY in absolute pixels of the image as detectron2 reads it.
SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),  # relative to the manifest's image_root
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("boxes", pa.list_(pa.float32())),  # 4 numbers a box
        ("scores", pa.list_(pa.float32())),
        ("category_ids", pa.list_(pa.int32())),  # contiguous, into thing_classes
        ("masks", pa.list_(pa.string())),  # COCO's compressed RLE of the whole image; empty without masks
        ("skipped", pa.string()),  # why the image could not be labeled, else null
    ]
)


def make_row(
    file_name: str,
    height: int = 0,
    width: int = 0,
    boxes: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    category_ids: np.ndarray | None = None,
    masks: Sequence[str] | None = None,
    skipped: str | None = None,
) -> dict[str, Any]:
    """One row of ``SCHEMA``.

    Args:
        file_name: relative to the image root.
        height, width: of the image, in pixels.
        boxes: (N, 4) XYXY, pixels. scores: (N,) in [0, 1]. category_ids: (N,) contiguous.
        masks: N strings, ``counts`` of COCO's compressed RLE; None where the teacher makes no masks.
        skipped: the reason, if the image could not be labeled.
    """
    return {
        "file_name": file_name,
        "height": height,
        "width": width,
        "boxes": [] if boxes is None else np.asarray(boxes, np.float32).reshape(-1),
        "scores": [] if scores is None else np.asarray(scores, np.float32),
        "category_ids": [] if category_ids is None else np.asarray(category_ids, np.int32),
        "masks": [] if masks is None else list(masks),
        "skipped": skipped,
    }


class PseudoLabelWriter:
    """Writes a pseudo-label folder, shard by shard, and goes on where an earlier writer stopped.

    Args:
        folder: made if it is not there.
        identity: what the labels depend on (teacher, images, floor). A folder begun with another identity
            is refused. Goes into the manifest.
        file_names: all images to label, relative to the image root, in a fixed order.

    Raises:
        InputError: the folder holds pseudo labels of another identity, or something else.
    """

    def __init__(self, folder: str | os.PathLike, identity: dict[str, Any], file_names: list[str]):
        self.folder = Path(folder)
        self.file_names = file_names
        self.identity = {
            **identity,
            "listed": len(file_names),
            "file_list_sha256": hashlib.sha256("\n".join(file_names).encode()).hexdigest(),
            "shard_size": SHARD_SIZE,
        }
        manifest_file = self.folder / MANIFEST
        self.manifest: dict[str, Any] = {"finished": False, **self.identity}
        if manifest_file.exists():
            self.manifest = read_json(manifest_file)
            check_unchanged(self.folder, self.manifest, self.identity)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(
                f"{self.folder} is not empty and has no {MANIFEST}: choose another output folder."
            )
        else:
            (self.folder / "shards").mkdir(parents=True, exist_ok=True)
            write_json(manifest_file, self.manifest)

    @property
    def finished(self) -> bool:
        """Whether :meth:`finish` was reached, now or by an earlier writer."""
        return bool(self.manifest["finished"])

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        total = -(-len(self.file_names) // SHARD_SIZE)
        return [i for i in range(total) if not self._shard_file(i).exists()]

    def shard_range(self, shard: int) -> range:
        """Positions in ``file_names`` of a shard's images."""
        return range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, len(self.file_names)))

    def write_shard(self, shard: int, rows: Iterable[dict[str, Any]]) -> None:
        """Write one shard, whole.

        Args:
            rows: as made by ``make_row``, one for each position of ``shard_range(shard)``, in that order.
        """
        rows = list(rows)
        if [row["file_name"] for row in rows] != [self.file_names[i] for i in self.shard_range(shard)]:
            raise ValueError(f"The rows of shard {shard} are not the images of that shard.")
        file = self._shard_file(shard)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary, compression="zstd")
        os.replace(temporary, file)

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Count what was written and mark the folder as finished. To be called by one process, at the end.

        Args:
            facts: more entries for the manifest (date, versions, duration).

        Returns:
            The manifest.
        """
        counts = {"labeled": 0, "empty": 0, "boxes": 0}
        skipped: dict[str, str] = {}
        for table in _read_shards(self.folder):
            for row in table.select(["file_name", "scores", "skipped"]).to_pylist():
                if row["skipped"] is not None:
                    skipped[row["file_name"]] = row["skipped"]
                else:
                    counts["labeled" if row["scores"] else "empty"] += 1
                    counts["boxes"] += len(row["scores"])
        self.manifest = {"finished": True, **self.identity, **counts, "skipped": skipped, **facts}
        write_json(self.folder / MANIFEST, self.manifest)
        return self.manifest

    def _shard_file(self, shard: int) -> Path:
        return self.folder / "shards" / f"shard-{shard:06d}.parquet"


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a finished pseudo-label folder.

    Raises:
        InputError: there is none, or labeling has not finished.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise InputError(f"{folder} holds no pseudo labels: it has no {MANIFEST}.")
    manifest = read_json(file)
    if not manifest.get("finished"):
        raise InputError(f"The pseudo labels in {folder} are not finished: run the labeling command again.")
    return manifest


def load_pseudo_labels(
    folder: str | os.PathLike,
    score_thresh: float = 0.5,
    *,
    image_root: str | os.PathLike | None = None,
) -> list[dict[str, Any]]:
    """Read pseudo labels as detectron2 dataset dicts.

    Args:
        folder: what ``generate_pseudo_labels`` wrote.
        score_thresh: boxes with a score under this are left out (those at it stay). The paper uses 0.5.
        image_root: where the images are, if not where they were when labeled.

    Returns:
        One dict per labeled image, images without boxes included (they train as all-negative):
        ``file_name, image_id, height, width, label_source="pseudo", annotations``; each annotation has
        ``bbox`` (XYXY, pixels), ``bbox_mode``, ``category_id`` (contiguous), ``score``, and of a teacher with
        masks ``segmentation`` (RLE, for INPUT.MASK_FORMAT "bitmask").

    Raises:
        InputError: the folder holds no finished pseudo labels, or ``score_thresh`` lies under the floor
            that they were written with, so that boxes would be missing.
    """
    manifest = read_manifest(folder)
    if not manifest["score_floor"] <= score_thresh <= 1:
        raise InputError(
            f"The score threshold {score_thresh} is outside [{manifest['score_floor']}, 1]: the pseudo labels in "
            f"{folder} were written with the floor {manifest['score_floor']}."
        )
    image_root = manifest["image_root"] if image_root is None else str(image_root)
    dicts = []
    for table in _read_shards(folder):
        for row in table.to_pylist():
            if row["skipped"] is not None:
                continue
            dicts.append(
                {
                    "file_name": os.path.join(image_root, row["file_name"]),
                    "image_id": row["file_name"],
                    "height": row["height"],
                    "width": row["width"],
                    "label_source": "pseudo",
                    "annotations": _annotations(row, score_thresh),
                }
            )
    return dicts


def _annotations(row: dict[str, Any], score_thresh: float) -> list[dict[str, Any]]:
    """detectron2 annotations of the boxes of one row that reach a score."""
    boxes = np.asarray(row["boxes"]).reshape(-1, 4).tolist()
    # Compared as float32, as they are stored: 0.7 must keep a score written as 0.7.
    kept = np.flatnonzero(np.asarray(row["scores"], np.float32) >= np.float32(score_thresh)).tolist()
    annotations = [
        {
            "bbox": boxes[i],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": row["category_ids"][i],
            "score": row["scores"][i],
        }
        for i in kept
    ]
    if row["masks"]:
        size = [row["height"], row["width"]]
        for i, annotation in zip(kept, annotations):
            annotation["segmentation"] = {"size": size, "counts": row["masks"][i]}
    return annotations


def _read_shards(folder: str | os.PathLike) -> Iterable[pa.Table]:
    for file in sorted((Path(folder) / "shards").glob("shard-*.parquet")):
        try:
            yield pq.read_table(file, schema=SCHEMA)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{file} is damaged ({error}): delete that file and run the labeling command again."
            ) from error
