"""Operations by name: what a draw decides, and what it leaves alone."""

import logging
from collections import Counter

import numpy as np
import pytest
from detectron2.data.transforms import AugInput
from fvcore.transforms.transform import NoOpTransform
from hypothesis import given, settings
from hypothesis import strategies as st

from selftrain_d2.data.augmentation import levels
from selftrain_d2.data.augmentation.box_only import BoxOnlyTransform
from selftrain_d2.data.augmentation.levels import RANDAUGMENT_LENGTHS
from selftrain_d2.data.augmentation.ops import (
    BOX_OPERATIONS,
    IMAGE_OPERATIONS,
    OPERATION_NAMES,
    OperationSettings,
    RandomOperation,
)
from selftrain_d2.errors import InputError

IMAGE = np.random.default_rng(0).integers(20, 230, (64, 48, 3), dtype=np.uint8)
BOXES = np.array([[4.0, 6, 30, 40], [20, 10, 48, 64], [0, 0, 48, 64], [7, 7, 7, 7]])


def draws(operation, number=400, image=IMAGE, boxes=BOXES):
    np.random.seed(0)
    return [operation.get_transform(image, boxes) for _ in range(number)]


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_a_drawn_transform_is_repeatable(name):
    # Inside boxes the probability is a third.
    transform = next(t for t in draws(RandomOperation(name, 1.0, 8.0)) if not isinstance(t, NoOpTransform))
    results = [transform.apply_image(IMAGE) for _ in range(2)]
    np.testing.assert_array_equal(*results)
    assert results[0].shape == IMAGE.shape and not np.array_equal(results[0], IMAGE)
    np.testing.assert_array_equal(*[transform.apply_box(BOXES.copy()) for _ in range(2)])
    random_state = np.random.get_state()[1].copy()
    transform.apply_segmentation(IMAGE[..., 0])
    np.testing.assert_array_equal(np.random.get_state()[1], random_state)


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_the_same_seed_draws_the_same(name):
    results = []
    for _ in range(2):
        np.random.seed(5)
        sample = AugInput(IMAGE, boxes=BOXES.copy(), sem_seg=IMAGE[..., 0])
        RandomOperation(name, 0.9, 7.0)(sample)
        results.append((sample.image, sample.boxes, sample.sem_seg))
    for first, second in zip(*results):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", OPERATION_NAMES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    level=st.floats(0, 30),
    seed=st.integers(0, 1000),
)
def test_boxes_stay_in_the_image_and_in_order(name, height, width, level, seed):
    np.random.seed(seed)
    image = np.random.randint(0, 256, (height, width, 3), dtype=np.uint8)
    corners = np.sort(np.random.uniform(0, 1, (6, 2, 2)), axis=1) * (width, height)
    boxes = np.concatenate(
        [
            corners.reshape(6, 4),
            [[0, 0, width, height], [0, 0, 1, 1], [width - 1, 0, width, height], [0, 0, 0, 0]],
        ]
    )
    transform = RandomOperation(name, 1.0, level).get_transform(image, boxes)
    assert transform.apply_image(image).shape == image.shape
    moved = transform.apply_box(boxes.copy())
    assert moved.shape == boxes.shape and np.isfinite(moved).all()
    assert (moved[:, :2] <= moved[:, 2:]).all() and (moved >= 0).all()
    assert (moved[:, [0, 2]] <= width).all() and (moved[:, [1, 3]] <= height).all()
    lost = (moved[:, 2:] == moved[:, :2]).all(axis=1)
    assert lost[-1]  # nothing comes of nothing
    if name in BOX_OPERATIONS or not name.endswith("_BBox"):
        np.testing.assert_array_equal(moved, boxes)
    assert transform.apply_box(np.zeros((0, 4))).shape == (0, 4)


def test_probability_of_the_whole_image():
    fired = [not isinstance(t, NoOpTransform) for t in draws(RandomOperation("Invert", 0.3, 0), 2000)]
    assert np.mean(fired) == pytest.approx(0.3, abs=0.04)
    assert not any(isinstance(t, NoOpTransform) for t in draws(RandomOperation("Invert", 1.0, 0)))
    assert all(isinstance(t, NoOpTransform) for t in draws(RandomOperation("Invert", 0.0, 0)))


def test_probability_inside_boxes_is_a_third_for_each_box_with_area():
    transforms = draws(RandomOperation("Equalize_Only_BBoxes", 0.6, 0), 2000)
    counts = np.zeros(4)
    for t in transforms:
        if isinstance(t, BoxOnlyTransform):
            counts[t.indices] += 1
    np.testing.assert_allclose(counts[:3] / 2000, 0.2, atol=0.04)
    assert counts[3] == 0


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"])
def test_the_sign_is_random_and_one_for_all_boxes(name):
    matrices = np.array([t.matrix for t in draws(RandomOperation(f"{name}_BBox", 1.0, 5))])
    signs = np.sign((matrices - np.eye(2, 3)).reshape(-1, 6)[:, [1, 2, 3, 5]])
    assert len(np.unique(signs, axis=0)) == 2
    share = np.mean((signs == signs[0]).all(axis=1))
    assert share == pytest.approx(0.5, abs=0.1)

    boxes = np.tile([[4.0, 4, 24, 24]], (9, 1))
    drawn = draws(RandomOperation(f"{name}_Only_BBoxes", 1.0, 5), boxes=boxes)
    drawn = [[inner.matrix for inner in t.transforms] for t in drawn if isinstance(t, BoxOnlyTransform)]
    assert max(len(m) for m in drawn) > 3
    assert all(np.ptp(m, axis=0).max() == 0 for m in drawn)  # same boxes, same matrix
    assert len({m[0].tobytes() for m in drawn}) == 2


def test_lengths_follow_the_image_and_the_augmentation():
    small, large = np.zeros((100, 320), np.uint8), np.zeros((1280, 900), np.uint8)
    auto, fixed = OperationSettings(), OperationSettings(scale_lengths=False)
    rand = OperationSettings(lengths=RANDAUGMENT_LENGTHS)

    def shift(image, used, name="TranslateX_BBox"):
        return abs(RandomOperation(name, 1.0, 4, used).get_transform(image).matrix[0, 2])

    assert [shift(small, auto), shift(large, auto), shift(small, fixed)] == [50, 200, 100]
    assert [shift(small, rand), shift(large, rand)] == [20, 80]

    def half_side(image, used):
        return RandomOperation("Cutout", 1.0, 8, used).get_transform(image).arguments["half_side"]

    assert [half_side(small, auto), half_side(large, fixed), half_side(large, rand)] == [40, 80, 64]
    boxes = np.array([[0.0, 0, 320, 100]])
    inner = draws(RandomOperation("TranslateY_Only_BBoxes", 1.0, 6), image=small, boxes=boxes)
    shifts = {abs(t.transforms[0].matrix[1, 2]) for t in inner if isinstance(t, BoxOnlyTransform)}
    assert shifts == {36}  # 120 * 0.6 * 320 / 640


def test_cutout_is_centred_anywhere():
    image = np.zeros((9, 5), np.uint8)
    arguments = [t.arguments for t in draws(RandomOperation("Cutout", 1.0, 10), 1000, image)]
    assert {a["center_x"] for a in arguments} == set(range(5))
    assert {a["center_y"] for a in arguments} == set(range(9))


@pytest.mark.parametrize(
    "function, values",  # at levels 0, 5, 10, 15: Section 3 of the paper's code, see docs/augmentation.md
    [
        (levels.rotate_degrees, [0, 15, 30, 45]),
        (levels.shear_factor, [0, 0.15, 0.3, 0.45]),
        (levels.enhance_factor, [0.1, 1.0, 1.9, 2.8]),
        (levels.posterize_bits, [1, 2, 4, 6]),
        (levels.solarize_threshold, [0, 128, 256, 256]),
        (levels.solarize_addition, [0, 55, 110, 165]),
        (levels.translate_pixels, [0, 50, 100, 150]),
        (levels.cutout_pixels, [0, 20, 40, 60]),
    ],
)
def test_levels(function, values):
    found = [function(level, RANDAUGMENT_LENGTHS) for level in (0, 5, 10, 15)]
    assert found == pytest.approx(values)


@pytest.mark.parametrize("name", [n for n in IMAGE_OPERATIONS if n.endswith("_BBox")])
def test_level_zero_of_geometry_does_nothing(name):
    assert all(isinstance(t, NoOpTransform) for t in draws(RandomOperation(name, 1.0, 0)))


def test_without_boxes_there_is_a_warning_and_no_change(caplog, monkeypatch):
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())  # warnings come once
    with caplog.at_level(logging.WARNING):
        transform = RandomOperation("Flip_Only_BBoxes", 1.0, 10).get_transform(IMAGE, None)
    assert isinstance(transform, NoOpTransform)
    assert "Flip_Only_BBoxes does nothing" in caplog.text


def test_mistakes():
    with pytest.raises(InputError, match="Unknown operation 'Blur'; known are AutoContrast"):
        RandomOperation("Blur", 1.0, 1)
    with pytest.raises(InputError, match=r"Invert got probability 1.5"):
        RandomOperation("Invert", 1.5, 1)
    with pytest.raises(InputError, match=r"level -1"):
        RandomOperation("Rotate_BBox", 1.0, -1)
