"""Ten images, number i with i boxes; number 3 cannot be read."""

import numpy as np

from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter

IDENTITY = {
    "thing_classes": ["red", "green"],
    "teacher_weights_sha256": "a" * 64,
    "score_floor": 0.05,
    "image_root": "/photos",
}
NAMES = [f"{i:02d}.jpg" for i in range(10)]


def numbered_row(name):
    i = int(name[:2])
    if i == 3:
        return make_row(name, skipped="OSError: broken")
    rng = np.random.default_rng(i)
    boxes = rng.uniform(0, 50, (i, 4)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return make_row(name, 100, 120, boxes, rng.uniform(0.05, 1, i), rng.integers(0, 2, i))


def write_numbered(folder, shards=None, identity=IDENTITY):
    """A writer that has written these shards, or all that are missing."""
    writer = PseudoLabelWriter(folder, identity, NAMES)
    for shard in writer.missing_shards() if shards is None else shards:
        writer.write_shard(shard, [numbered_row(NAMES[i]) for i in writer.shard_range(shard)])
    return writer
