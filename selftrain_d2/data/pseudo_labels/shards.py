"""One shard of a pseudo-label folder: a Parquet file whose name ends in its own SHA-256.

So a shard and its checksum appear together, in one renaming, and a writer that is killed leaves no shard
without one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selftrain_d2.errors import InputError
from selftrain_d2.files import whole_file
from selftrain_d2.storage import read_bytes

LOCALIZATION_SCORES = "localization_scores"

#: One row an image. Boxes are XYXY in absolute pixels of the image as detectron2 reads it.
SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),  # relative to the manifest's image_root
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("boxes", pa.list_(pa.float32())),  # 4 numbers a box
        ("scores", pa.list_(pa.float32())),
        ("category_ids", pa.list_(pa.int32())),  # contiguous, into thing_classes
        # In [0, 1], how well a teacher's views agree on the box; empty with one view, not there in older folders.
        (LOCALIZATION_SCORES, pa.list_(pa.float32())),
        ("masks", pa.list_(pa.string())),  # COCO's compressed RLE of the whole image; empty without masks
        ("skipped", pa.string()),  # why the image could not be labeled, else null
    ]
)

_ADVICE = "run the command that wrote the folder again, it redoes only such shards"
_NAME = re.compile(r"shard-(\d{6,})-([0-9a-f]{64})\.parquet")


def make_row(
    file_name: str,
    height: int = 0,
    width: int = 0,
    boxes: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    category_ids: np.ndarray | None = None,
    masks: Sequence[str] | None = None,
    skipped: str | None = None,
    localization_scores: np.ndarray | None = None,
) -> dict[str, Any]:
    """One row of ``SCHEMA``.

    Args:
        file_name: relative to the image root.
        height, width: of the image, in pixels.
        boxes: (N, 4) XYXY, pixels. scores: (N,) in [0, 1]. category_ids: (N,) contiguous.
        masks: N strings, ``counts`` of COCO's compressed RLE; None where the teacher makes no masks.
        skipped: the reason, if the image could not be labeled.
        localization_scores: (N,) in [0, 1]; None where the teacher looks once.
    """
    return {
        "file_name": file_name,
        "height": height,
        "width": width,
        "boxes": [] if boxes is None else np.asarray(boxes, np.float32).reshape(-1),
        "scores": [] if scores is None else np.asarray(scores, np.float32),
        "category_ids": [] if category_ids is None else np.asarray(category_ids, np.int32),
        LOCALIZATION_SCORES: []
        if localization_scores is None
        else np.asarray(localization_scores, np.float32),
        "masks": [] if masks is None else list(masks),
        "skipped": skipped,
    }


def list_shards(folder: Path) -> list[tuple[int, Path]]:
    """Numbers and files of all shards in a folder, in order."""
    matches = ((_NAME.fullmatch(name), name) for name in os.listdir(folder))
    return sorted((int(match[1]), folder / name) for match, name in matches if match)


def write_shard(folder: Path, shard: int, table: pa.Table) -> Path:
    """Write one shard whole, or not at all.

    Args:
        table: of a kind's schema, and checked.

    Raises:
        InputError: the disk is full.
    """
    # In memory, for its hash. Hardly a value repeats: dictionaries would double time and size.
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=False)
    content = buffer.getvalue().to_pybytes()
    file = folder / f"shard-{shard:06d}-{hashlib.sha256(content).hexdigest()}.parquet"
    with whole_file(file) as temporary:
        temporary.write_bytes(content)
    return file


def check_table(table: pa.Table, num_classes: int) -> None:
    """Check the rows of a shard against each other.

    Raises:
        InputError: a box has a class without a name.
        ValueError: a row has not one score and class for each box, masks or localization scores for some boxes alone,
            or boxes of a skipped image.
    """
    optional = ("masks", LOCALIZATION_SCORES)
    lengths = {name: list_lengths(table, name) for name in ("boxes", "scores", "category_ids", *optional)}
    boxes = lengths["scores"]
    wrong = (lengths["boxes"] != 4 * boxes) | (lengths["category_ids"] != boxes)
    for name in optional:
        wrong |= (lengths[name] != 0) & (lengths[name] != boxes)
    wrong |= table["skipped"].is_valid().to_numpy() & (boxes != 0)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        counts = {name: int(length[row]) for name, length in lengths.items()}
        raise ValueError(f"The columns of {table['file_name'][row]} do not match: {counts} values.")
    ids = flat_values(table, "category_ids")
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_classes:
        worst = ids.max() if ids.min() >= 0 else ids.min()
        raise InputError(
            f"A box has the class id {worst}, but there are {num_classes} class names: give one for each class "
            "that the detector knows, in the order of training."
        )


def read_shard(file: str | os.PathLike, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a shard and check its bytes against its name.

    Args:
        file: a path, or an address.
        columns: some of its schema; all by default.

    Raises:
        InputError: it is not there, or damaged.
    """
    try:
        content = read_bytes(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}); {_ADVICE}.") from error
    if not _is_whole(file, content):
        raise InputError(f"{file} is damaged: its SHA-256 is not the one in its name; {_ADVICE}.")
    # One thread: the shards are small.
    return pq.ParquetFile(pa.BufferReader(content)).read(columns and list(columns), use_threads=False)


def read_shards(
    files: Iterable[str | os.PathLike], columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """:func:`read_shard` of one file after the other: one shard is in memory at a time."""
    return (read_shard(file, columns) for file in files)


def is_intact(file: Path) -> bool:
    """Whether a shard has the bytes it was written with; False where the disk itself cannot read it.

    Raises:
        FileNotFoundError: it is not there.
        InputError: it cannot be read now (rights, a file server that is away), which does not make it a damaged one.
    """
    try:
        return _is_whole(file, file.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.EIO:
            return False
        raise InputError(
            f"{file} cannot be read ({error.strerror}): check its permissions and the file system, and run the same "
            "command again."
        ) from error


def _is_whole(file: str | os.PathLike, content: bytes) -> bool:
    return _NAME.fullmatch(os.path.basename(file))[2] == hashlib.sha256(content).hexdigest()


def flat_values(table: pa.Table, name: str) -> np.ndarray:
    """The values of all lists of a column, in one array."""
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def list_lengths(table: pa.Table, name: str) -> np.ndarray:
    """The lengths of the lists of a column, (rows,)."""
    return pc.list_value_length(table[name]).to_numpy()


def box_counts(table: pa.Table) -> np.ndarray:
    """Boxes of each row, (rows,)."""
    return list_lengths(table, "scores")


def localization_scores(table: pa.Table) -> np.ndarray:
    """(B,) float32 of all boxes, NaN of those that have none."""
    counts = box_counts(table)
    values = np.full(counts.sum(), np.nan, np.float32)
    if LOCALIZATION_SCORES in table.column_names:
        known = list_lengths(table, LOCALIZATION_SCORES) > 0
        values[np.repeat(known, counts)] = flat_values(table, LOCALIZATION_SCORES)
    return values


@dataclass(frozen=True)
class LabelKind:
    """What differs between folders of pseudo boxes and of pseudo masks.

    Attributes:
        name: what is counted, in the manifest's word for it.
        classes_key: the manifest's key of the class names.
        schema: of the shards.
        check: ``(table, number of classes)``, raises InputError for rows that cannot be.
        counts: ``table -> (rows,)``, labels of each row.
        count_columns: columns that it needs.
    """

    name: str
    classes_key: str
    schema: pa.Schema
    check: Callable[[pa.Table, int], None]
    counts: Callable[[pa.Table], np.ndarray]
    count_columns: tuple[str, ...]


#: Labels that a detector makes, perhaps with the masks of its objects.
BOXES = LabelKind(
    name="boxes",
    classes_key="thing_classes",
    schema=SCHEMA,
    check=check_table,
    counts=box_counts,
    count_columns=("scores",),
)
