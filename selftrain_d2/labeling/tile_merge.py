"""Boxes of overlapping tiles as boxes of the image, each object once.

Both tiles of a pair saw the strip that they share. So two boxes are of one object if they agree there: cut at the
borders of the strip, their IoU is at least :data:`SAME_OBJECT`. That holds for the parts of an object that is longer
than the strip, or than a tile, for an object that one tile has whole and the other in part, and for one that both have
whole; and not for a small object on a large one, which the detector's own NMS had kept apart.

Letters in shapes: T tiles, N boxes of tiles, M boxes of the image.
"""

from __future__ import annotations

import numpy as np

#: Least IoU inside the shared strip. What NMS at this threshold takes for one object is one here too: all that two
#: boxes of different tiles have in common lies in the strip, and cutting makes their union smaller.
SAME_OBJECT = 0.5


def merge_tiles(
    tiles: np.ndarray, tile_of: np.ndarray, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join the boxes of one object that different tiles see.

    Pairs of boxes of one class are joined from the best agreement on, as long as no object gets two boxes of one tile:
    these the detector took for two. An object has the highest score of its boxes; each of its four sides is that of the
    box which lies deepest inside its tile there, so that a border that cuts an object is no side of it.

    Args:
        tiles: (T, 4) XYXY, the whole grid of the image.
        tile_of: (N,) each box's tile.
        boxes: (N, 4) XYXY in pixels of the image, within their tiles.
        scores, classes: (N,).

    Returns:
        Boxes (M, 4), scores (M,) and classes (M,), the highest score first.
    """
    order = np.argsort(-scores, kind="stable")
    tile_of, boxes, scores, classes = tile_of[order], boxes[order], scores[order], classes[order]
    depths = _depths(tiles, tile_of, boxes)
    objects = {i: [i] for i in range(len(boxes))}  # by their first box, which has the highest score
    object_of = np.arange(len(boxes))
    for i, j in _pairs(tiles, tile_of, boxes, classes):
        one, other = sorted((int(object_of[i]), int(object_of[j])))
        if one == other or np.isin(tile_of[objects[one]], tile_of[objects[other]]).any():
            continue
        object_of[objects[other]] = one
        objects[one] = sorted(objects[one] + objects.pop(other))
    merged = boxes[list(objects)]
    for row, members in enumerate(objects.values()):
        if len(members) > 1:
            deepest = np.argmax(depths[members], axis=0)
            merged[row] = boxes[np.array(members)[deepest], np.arange(4)]
    kept = list(objects)
    return merged, scores[kept], classes[kept]


def _depths(tiles: np.ndarray, tile_of: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N, 4): how far each side lies inside its tile; without end where the tile ends with the image."""
    ends = np.concatenate([tiles[:, :2].min(axis=0), tiles[:, 2:].max(axis=0)])
    own = tiles[tile_of]
    return np.where(own == ends, np.inf, np.abs(boxes - own))


def _pairs(tiles: np.ndarray, tile_of: np.ndarray, boxes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(P, 2) boxes of one object in different tiles, the best agreement first."""
    inside = np.split(
        np.argsort(tile_of, kind="stable"), np.bincount(tile_of, minlength=len(tiles)).cumsum()[:-1]
    )
    found, agreement = [np.empty((0, 2), np.int64)], [np.empty(0)]
    for a, b in _overlapping(tiles, [t for t, members in enumerate(inside) if len(members)]):
        strip = np.concatenate(
            [np.maximum(tiles[a, :2], tiles[b, :2]), np.minimum(tiles[a, 2:], tiles[b, 2:])]
        )
        ours, theirs = (_reaching(boxes, inside[tile], strip) for tile in (a, b))
        iou = _iou(_cut(boxes[ours], strip), _cut(boxes[theirs], strip))
        i, j = np.nonzero((iou >= SAME_OBJECT) & (classes[ours][:, None] == classes[theirs]))
        found.append(np.stack([ours[i], theirs[j]], axis=1))
        agreement.append(iou[i, j])
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs.max(axis=1), pairs.min(axis=1), -np.concatenate(agreement)))]


def _overlapping(tiles: np.ndarray, among: list[int]) -> np.ndarray:
    """(Q, 2) tiles of which the second comes later and shares pixels with the first."""
    among = np.array(among, np.int64)
    some = tiles[among]
    apart = (some[:, None, :2] >= some[:, 2:]).any(axis=2)
    return among[np.argwhere(np.triu(~(apart | apart.T), k=1))]


def _reaching(boxes: np.ndarray, members: np.ndarray, strip: np.ndarray) -> np.ndarray:
    """Those of some boxes that have an area inside a strip."""
    own = _cut(boxes[members], strip)
    return members[(own[:, :2] < own[:, 2:]).all(axis=1)]


def _cut(boxes: np.ndarray, strip: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(boxes[:, :2], strip[:2]), np.minimum(boxes[:, 2:], strip[2:])], axis=1)


def _iou(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    sides = np.minimum(ours[:, None, 2:], theirs[:, 2:]) - np.maximum(ours[:, None, :2], theirs[:, :2])
    common = sides.clip(min=0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (ours, theirs)]
    return common / (areas[0][:, None] + areas[1] - common)
