"""Counts of labels against plain loops, and the images that are picked to be looked at."""

import numpy as np
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st

from selftrain_d2.inspection.box_statistics import (
    SIZE_EDGES,
    Largest,
    count_at_thresholds,
    count_labels,
    empty_samples,
    threshold_grid,
)

CLASSES, FLOOR, THRESH = 3, 0.1, 0.425
SIDE = 100


@st.composite
def labels(draw):
    """Images with boxes of scores on and between the thresholds, some of them crowd regions."""
    score = st.one_of(st.sampled_from([0.1, 0.42, 0.425, 0.43, 0.7, 1.0]), st.floats(0.125, 1, width=32))
    corner = st.floats(0, 50)
    box = st.tuples(score, st.integers(0, CLASSES - 1), corner, corner, st.floats(0.1, 50), st.booleans())
    images = []
    for boxes in draw(st.lists(st.lists(box, max_size=5), max_size=8)):
        annotations = [
            {
                "bbox": [x, y, x + side, y + side],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": category_id,
                "score": float(np.float32(value)),
                "iscrowd": int(crowd),
            }
            for value, category_id, x, y, side, crowd in boxes
        ]
        images.append({"height": SIDE, "width": SIDE, "annotations": annotations})
    return images


@settings(max_examples=60, deadline=None)
@given(labels())
def test_counts_equal_plain_loops(images):
    grid = threshold_grid(FLOOR, THRESH)
    found = count_labels(iter(images), CLASSES, grid, THRESH)  # an iterator: it cannot be read twice
    real = [[a for a in image["annotations"] if not a["iscrowd"]] for image in images]
    for category_id in range(CLASSES):
        for position, threshold in enumerate(grid):
            expected = sum(
                a["category_id"] == category_id and np.float32(a["score"]) >= threshold
                for image in real
                for a in image
            )
            assert found.boxes_at[category_id, position] == expected
    kept = [[a for a in image if np.float32(a["score"]) >= np.float32(THRESH)] for image in real]
    assert found.images == len(images)
    assert found.boxes == sum(map(len, kept)) == found.boxes_by_class.sum()
    assert found.empty == sum(not image for image in kept)
    assert sorted(found.boxes_per_image.elements()) == sorted(map(len, kept))
    sides = [a["bbox"][2] - a["bbox"][0] for image in kept for a in image]
    small = sum(np.sqrt(side * side) < 32 for side in sides)
    assert found.coco_sizes.tolist() == [small, len(sides) - small, 0]
    assert found.sizes.sum() == len(sides)
    most = max((len(image) for image in real), default=0)
    assert found.most_boxes == most
    for position, threshold in enumerate(grid):
        full = [image for image in real if most and len(image) == most]
        expected = sum(all(np.float32(a["score"]) >= threshold for a in image) for image in full)
        assert found.capped[position] == expected


def test_sizes_are_square_roots_of_areas_and_human_boxes_count_as_sure():
    boxes = [
        ([10, 10, 42, 42], BoxMode.XYXY_ABS),
        ([0, 0, 96, 96], BoxMode.XYWH_ABS),
        ([5, 5, 5, 9], BoxMode.XYXY_ABS),
    ]
    annotations = [{"bbox": b, "bbox_mode": mode, "category_id": 0} for b, mode in boxes]
    images = [{"height": SIDE, "width": SIDE, "annotations": annotations}]
    found = count_labels(images, 1, threshold_grid(0.05, 0.5), 0.5)
    assert found.coco_sizes.tolist() == [1, 1, 1]  # 0, 32 and 96 pixels: COCO's limits belong to the larger
    assert found.sizes[0] == 1 and found.sizes[np.searchsorted(SIZE_EDGES, 32, side="right") - 1] == 1
    assert found.whole_image == 1  # 96^2 is 92 % of the image
    assert found.boxes_at[0].tolist() == [3] * len(found.thresholds)


def test_the_grid_has_floor_threshold_and_hundredths_as_float32():
    grid = threshold_grid(0.055, 1 / 3)
    assert grid.dtype == np.float32 and (np.diff(grid) > 0).all()
    assert grid[0] == np.float32(0.055) and grid[1] == np.float32(0.06) and grid[-1] == 1
    assert np.float32(1 / 3) in grid and np.float32(0.7) in grid


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.25, 0.7, 1.0]), st.integers(0, 2)), max_size=30))
def test_counts_at_thresholds_equal_a_plain_loop(boxes):
    grid = np.array([0.2, 0.5, 0.7, 1.0], np.float32)
    scores, ids = np.array([b[0] for b in boxes], np.float32), np.array([b[1] for b in boxes], int)
    found = count_at_thresholds(scores, ids, grid, 3)
    assert found.tolist() == [
        [sum(s >= t for s, i in zip(scores, ids) if i == c) for t in grid] for c in range(3)
    ]


@given(st.lists(st.integers(0, 5)), st.integers(1, 4))
def test_largest_are_those_of_a_stable_sort(values, number):
    largest = Largest(number)
    for position, value in enumerate(values):
        largest.add(value, position)
    assert largest.positions() == sorted(range(len(values)), key=lambda i: -values[i])[:number]


def test_samples_are_what_their_names_say():
    generator = np.random.default_rng(0)
    images = [
        {
            "height": SIDE,
            "width": SIDE,
            "annotations": [
                {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "score": float(score)}
                for score in generator.uniform(0.1, 1, generator.integers(0, 6))
            ],
        }
        for _ in range(200)
    ]
    samples = empty_samples(4)
    count_labels(images, 1, threshold_grid(0.1, 0.5), 0.5, samples)
    scores = [[a["score"] for a in image["annotations"] if a["score"] >= 0.5] for image in images]
    filled = [i for i, s in enumerate(scores) if s]
    picked = {name: largest.positions() for name, largest in samples.items()}
    assert picked["most_confident"] == sorted(filled, key=lambda i: -np.mean(scores[i]))[:4]
    assert picked["least_confident"] == sorted(filled, key=lambda i: np.mean(scores[i]))[:4]
    assert picked["most_crowded"] == sorted(filled, key=lambda i: -len(scores[i]))[:4]
    assert len(set(picked["empty"])) == 4 and not any(scores[i] for i in picked["empty"])
    assert len(set(picked["random"])) == 4
    again = empty_samples(4)
    count_labels(images, 1, threshold_grid(0.1, 0.5), 0.5, again)
    assert again["random"].positions() == picked["random"]


def test_the_random_sample_is_uniform():
    """Tenths of the stream are picked from about equally often (chi-square, 9 degrees of freedom)."""
    samples = empty_samples(2000)
    empty = {"height": 1, "width": 1, "annotations": []}
    count_labels([empty] * 10000, 1, threshold_grid(0.1, 0.5), 0.5, samples)
    counts = np.bincount(np.array(samples["random"].positions()) // 1000, minlength=10)
    assert counts.sum() == 2000 and ((counts - 200) ** 2 / 200).sum() < 30
