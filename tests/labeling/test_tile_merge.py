"""Boxes of tiles put together: against the painted objects that the tiles show parts of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selftrain_d2 import InputError
from selftrain_d2.data.tiles import Tiles
from selftrain_d2.labeling.tile_merge import merge_tiles

numbers = st.integers(1, 400)


@given(height=numbers, width=numbers, size=st.integers(20, 200), overlap=st.floats(0, 0.9))
@settings(max_examples=50, deadline=None)
def test_grid(height, width, size, overlap):
    """Every pixel is in a tile, neighbours share what they should, and all tiles are of one size."""
    tiles = Tiles(size, overlap)
    grid = tiles.grid(height, width)
    covered = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in grid:
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        assert (x1 - x0, y1 - y0) == (min(size, width), min(size, height))
        covered[y0:y1, x0:x1] = True
    assert covered.all() and len(np.unique(grid, axis=0)) == len(grid)
    for side, end in ((grid[:, 0], grid[:, 2]), (grid[:, 1], grid[:, 3])):
        starts, ends = np.unique(side), np.unique(end)
        assert (ends[:-1] - starts[1:] >= int(overlap * size)).all()


@given(height=numbers, width=numbers, size=st.integers(2, 200), overlap=st.floats(0, 0.9))
@settings(max_examples=30, deadline=None)
def test_grid_is_that_of_sahi(height, width, size, overlap):
    slicing = pytest.importorskip("sahi.slicing")
    theirs = slicing.get_slice_bboxes(
        height, width, size, size, overlap_height_ratio=overlap, overlap_width_ratio=overlap
    )
    assert Tiles(size, overlap).grid(height, width).tolist() == theirs


def test_numbers_out_of_range():
    for size, overlap in ((0, 0.2), (-5, 0.2), (640, -0.1), (640, 0.95), (640, float("nan"))):
        with pytest.raises(InputError, match="must be"):
            Tiles(size, overlap)


SIDE = 200
SMALLEST = 14  # pixels of an object that a detector still finds


@st.composite
def objects(draw):
    """Rectangles (N, 4) that do not touch, in an image of SIDE x SIDE, with classes."""
    free = np.ones((SIDE, SIDE), bool)
    kept = []
    for _ in range(draw(st.integers(0, 7))):
        w, h = (draw(st.integers(SMALLEST, 150)) for _ in range(2))
        x, y = draw(st.integers(0, SIDE - w)), draw(st.integers(0, SIDE - h))
        if free[y : y + h, x : x + w].all():
            free[max(y - 2, 0) : y + h + 2, max(x - 2, 0) : x + w + 2] = False
            kept.append((x, y, x + w, y + h, draw(st.integers(0, 1))))
    return np.array(kept, float).reshape(-1, 5)


def seen(objects, grid, smallest=1):
    """What a perfect detector says of each tile: the visible part of each object. And how much of it is visible."""
    parts = []
    for tile, corners in enumerate(grid):
        for x0, y0, x1, y1, class_id in objects:
            box = [max(x0, corners[0]), max(y0, corners[1]), min(x1, corners[2]), min(y1, corners[3])]
            if min(box[2] - box[0], box[3] - box[1]) >= smallest:
                share = (box[2] - box[0]) * (box[3] - box[1]) / ((x1 - x0) * (y1 - y0))
                parts.append((tile, *box, share, class_id))
    parts = np.array(parts, float).reshape(-1, 7)
    return parts[:, 0].astype(int), parts[:, 1:5], parts[:, 5], parts[:, 6].astype(int)


def in_order(boxes, classes):
    return sorted((*map(float, box), int(c)) for box, c in zip(boxes, classes))


@given(objects=objects(), size=st.integers(40, 220), overlap=st.floats(0.1, 0.5))
@settings(max_examples=80, deadline=None)
def test_each_object_comes_out_once_and_whole(objects, size, overlap):
    """However it is cut: by one border or a corner, longer than the strip, or than several tiles."""
    grid = Tiles(size, overlap).grid(SIDE, SIDE)
    boxes, scores, classes = merge_tiles(grid, *seen(objects, grid))
    assert in_order(boxes, classes) == in_order(objects[:, :4], objects[:, 4])
    assert (np.diff(scores) <= 0).all()


@given(objects=objects(), seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_a_detector_that_errs_by_a_pixel_and_misses_slivers(objects, seed):
    grid = Tiles(100, 0.3).grid(SIDE, SIDE)
    tile_of, boxes, scores, classes = seen(objects, grid, SMALLEST)
    boxes = boxes + np.random.default_rng(seed).uniform(-1, 1, boxes.shape)
    boxes = np.clip(boxes, grid[tile_of][:, [0, 1, 0, 1]], grid[tile_of][:, [2, 3, 2, 3]])
    found, _, found_classes = merge_tiles(grid, tile_of, boxes, scores, classes)
    assert len(found) == len(objects)
    for *box, class_id in objects:
        assert ((np.abs(found - box) <= 1).all(axis=1) & (found_classes == class_id)).sum() == 1


def test_small_objects_on_a_large_one_stay():
    """Nested boxes, which the detector's NMS keeps; merging by the share of the smaller box would swallow them."""
    grid = Tiles(100, 0.4).grid(100, 160)
    assert grid.tolist() == [[0, 0, 100, 100], [60, 0, 160, 100]]
    objects = np.array([[20, 10, 140, 90, 0], [70, 30, 90, 50, 0], [40, 60, 50, 70, 0]], float)
    boxes, _, classes = merge_tiles(grid, *seen(objects, grid))
    assert in_order(boxes, classes) == in_order(objects[:, :4], objects[:, 4])


def test_classes_and_boxes_of_one_tile_stay_apart():
    grid = Tiles(100, 0.4).grid(100, 160)
    boxes = np.array([[70, 10, 90, 30], [70, 10, 90, 30], [70, 12, 90, 30], [70, 60, 90, 80]], float)
    merged, scores, classes = merge_tiles(
        grid, np.array([0, 1, 0, 0]), boxes, np.array([0.6, 0.7, 0.9, 0.8]), np.array([0, 0, 0, 1])
    )
    # The first and the second agree best. The third was another object to tile 0, whatever the second says.
    assert in_order(merged, classes) == in_order(boxes[[0, 2, 3]], [0, 0, 1])
    assert scores.tolist() == [0.9, 0.8, 0.7]


def test_sides_are_those_of_the_box_with_more_around_it():
    grid = Tiles(100, 0.4).grid(100, 160)
    # Tile 0 ends at 100 and tile 1 begins at 60.
    boxes = np.array([[64, 10, 95, 50], [66, 12, 97, 52]], float)
    merged, scores, _ = merge_tiles(grid, np.array([0, 1]), boxes, np.array([0.5, 0.8]), np.zeros(2, int))
    # Top and bottom lie as deep in both: the higher score's.
    assert merged.tolist() == [[64, 12, 97, 52]] and scores.tolist() == [0.8]


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_any_boxes(data):
    """No box is lost but to another of its class in another tile, and none is turned round."""
    grid = Tiles(60, data.draw(st.floats(0.05, 0.6))).grid(100, 130)
    number = data.draw(st.integers(0, 25))
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    tile_of = random.integers(0, len(grid), number)
    corners = np.sort(random.integers(0, 61, (number, 2, 2)), axis=1).reshape(-1, 4)
    boxes = (corners + grid[tile_of][:, [0, 1, 0, 1]]).astype(float)
    scores, classes = random.random(number), random.integers(0, 2, number)
    merged, merged_scores, merged_classes = merge_tiles(grid, tile_of, boxes, scores, classes)
    assert (merged[:, :2] <= merged[:, 2:]).all()
    assert set(merged_scores) <= set(scores) and max(scores, default=0) == max(merged_scores, default=0)
    for tile in range(len(grid)):
        for class_id in (0, 1):
            of_tile = ((tile_of == tile) & (classes == class_id)).sum()
            assert of_tile <= (merged_classes == class_id).sum()
