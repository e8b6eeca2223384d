"""Painting digits: every rule of visibility and labels against a painter written out here."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selftrain_d2.experiments.datasets.digit_scenes import (
    IGNORE,
    LONG_SIDE,
    MAX_BOX_OVERLAP,
    MAX_DIGITS,
    MIN_VISIBLE_SHARE,
    Scene,
    draw_scene,
    scramble,
    warp_digit,
)

SIZE = 40
GREY = np.full((SIZE, SIZE, 3), 100, np.uint8)


def strokes(seed):
    """Something like a digit: three strokes."""
    rng = np.random.default_rng(seed)
    image = np.zeros((28, 28), np.uint8)
    cv2.polylines(image, [rng.integers(4, 24, (4, 1, 2)).astype(np.int32)], False, 255, 2)
    return image


# ---- One painted object ---------------------------------------------------------------------------


def test_ink_covers_by_its_share_and_opacity():
    scene = Scene(GREY)
    ink = np.array([[1.0, 0.5], [0.2, 0.05]], np.float32)
    assert scene.paint(ink, 3, 7, np.array([200, 0, 100]), opacity=0.5, category=4, index=0)
    expected = np.repeat(100.0, 3)
    np.testing.assert_allclose(scene.pixels[7, 3], [150, 50, 100])
    np.testing.assert_allclose(scene.pixels[7, 4], [125, 75, 100])
    np.testing.assert_allclose(scene.pixels[8, 3], [110, 90, 100])
    np.testing.assert_allclose(scene.pixels[9, 3], expected)
    assert scene.semantic[7:9, 3:5].tolist() == [[4, 4], [IGNORE, 0]]
    assert np.argwhere(scene.owner == 0).tolist() == [[7, 3], [7, 4]]


def test_a_distractor_is_background_and_its_edge_ignored_only_over_a_digit():
    scene = Scene(GREY)
    colour = np.zeros(3)
    assert scene.paint(np.ones((20, 2), np.float32), 10, 10, colour, 1.0, category=3, index=0)
    # Hard ink over the digit's left column, soft ink over the right one and over background.
    edge = np.array([[1, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]], np.float32)
    assert scene.paint(edge, 10, 12, colour, 1.0, category=0, index=0)
    assert scene.semantic[12, 9:15].tolist() == [0, 0, IGNORE, 0, 0, 0]
    assert scene.semantic[13, 9:15].tolist() == [0, 3, 3, 0, 0, 0]


# ---- Many -----------------------------------------------------------------------------------------

objects = st.lists(
    st.tuples(st.integers(-12, SIZE - 1), st.integers(-12, SIZE - 1), st.integers(1, 12), st.integers(1, 12)),
    max_size=8,
)


@settings(deadline=None)
@given(objects, st.lists(st.integers(0, 10), min_size=8, max_size=8))
def test_all_objects_stay_visible_and_a_refused_one_leaves_no_trace(rectangles, categories):
    """The oracle: all accepted rectangles drawn again, in order, on a larger canvas."""
    scene, accepted = Scene(GREY), []
    for (x, y, width, height), category in zip(rectangles, categories):
        before = scene.pixels.copy(), scene.semantic.copy(), scene.owner.copy()
        if scene.paint(np.ones((height, width), np.float32), x, y, np.zeros(3), 1.0, category, index=0):
            accepted.append((x, y, width, height, category))
        else:
            for old, new in zip(before, (scene.pixels, scene.semantic, scene.owner)):
                np.testing.assert_array_equal(old, new)
    canvas = np.full((SIZE + 24, SIZE + 24), -1)
    for number, (x, y, width, height, _) in enumerate(accepted):
        canvas[y + 12 : y + 12 + height, x + 12 : x + 12 + width] = number
    seen = canvas[12 : 12 + SIZE, 12 : 12 + SIZE]
    np.testing.assert_array_equal(scene.owner, seen)
    np.testing.assert_array_equal(scene.pixels[..., 0], np.where(seen >= 0, 0, 100))
    lookup = np.array([0, *(category for *_, category in accepted)])
    np.testing.assert_array_equal(scene.semantic, lookup[seen + 1])
    for number, (x, y, width, height, category) in enumerate(accepted):
        assert (seen == number).sum() >= MIN_VISIBLE_SHARE * width * height
        assert scene.objects[number].category == category
        for other_x, other_y, other_width, other_height, _ in accepted[:number]:
            a, b = np.zeros((2, *canvas.shape), bool)
            a[y + 12 : y + 12 + height, x + 12 : x + 12 + width] = True
            b[other_y + 12 :, other_x + 12 :][:other_height, :other_width] = True
            assert (a & b).sum() <= MAX_BOX_OVERLAP * min(a.sum(), b.sum())


def test_scenes_have_up_to_six_digits_sometimes_none_and_name_their_digit():
    # Each digit is a horizontal bar or a vertical one: its mask tells which was drawn.
    bar = np.zeros((28, 28), np.uint8)
    bar[12:16, 4:24] = 255
    digits, categories = np.stack([bar, bar.T]), np.array([7, 9])
    counts = []
    for seed in range(300):
        scene = draw_scene(
            np.random.default_rng(seed), np.full((128, 128, 3), 90, np.uint8), digits, categories
        )
        counts.append(sum(painted.category > 0 for painted in scene.objects))
        assert scene.pixels.min() >= 0 and scene.pixels.max() <= 255
        for number, painted in enumerate(scene.objects):
            left, top, right, bottom = painted.box
            if not painted.category:
                continue
            assert painted.category == categories[painted.index]
            assert (right - left > bottom - top) == (painted.index == 0)
            assert (scene.owner == number).sum() >= MIN_VISIBLE_SHARE * painted.ink_pixels
            # Turned by 15 degrees, the box of a bar gets no longer; soft edges add a little.
            assert LONG_SIDE[0] * 0.9 <= max(right - left, bottom - top) <= LONG_SIDE[1] * 1.15
    frequency = np.bincount(counts, minlength=MAX_DIGITS + 1) / len(counts)
    assert len(frequency) == MAX_DIGITS + 1
    assert 0.01 < frequency[0] < 0.12 and frequency[1:].min() > 0.08


def test_a_scene_is_decided_by_its_generator():
    digits, categories = np.stack([strokes(i) for i in range(5)]), np.arange(1, 6)
    photograph = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    one, same, other = (
        draw_scene(np.random.default_rng(seed), photograph, digits, categories) for seed in (4, 4, 5)
    )
    np.testing.assert_array_equal(one.pixels, same.pixels)
    np.testing.assert_array_equal(one.semantic, same.semantic)
    assert one.objects == same.objects != other.objects


# ---- Digits ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(12, 60), st.floats(-15, 15), st.floats(0.8, 1.25))
def test_warped_ink_is_a_share_and_cut_to_where_it_is(seed, long_side, degrees, aspect):
    ink = warp_digit(strokes(seed), long_side, degrees, aspect)
    assert ink.dtype == np.float32 and ink.min() >= 0 and ink.max() <= 1
    visible = ink >= 0.1
    assert all(visible[side].any() for side in (0, -1)) and all(visible[:, side].any() for side in (0, -1))


@pytest.mark.parametrize("long_side", [14, 30, 56])
def test_warped_ink_has_the_size_that_was_asked_for(long_side):
    image = np.zeros((28, 28), np.uint8)
    image[4:24, 10:20] = 255  # 10 wide, 20 high
    rows, columns = np.nonzero(warp_digit(image, long_side, 0, 1) >= 0.5)
    assert np.ptp(rows) + 1 == pytest.approx(long_side, abs=1.5)
    assert np.ptp(columns) + 1 == pytest.approx(long_side / 2, abs=1.5)
    rows, columns = np.nonzero(warp_digit(image, long_side, 0, 2) >= 0.5)  # twice as wide against its height
    assert np.ptp(rows) + 1 == pytest.approx(np.ptp(columns) + 1, abs=2)


def test_positive_degrees_turn_counter_clockwise():
    image = np.zeros((28, 28), np.uint8)
    image[4:24, 13:15] = 255
    image[4:8, 10:18] = 255  # a hammer, its head up
    ink = warp_digit(image, 20, 90, 1)
    third = ink.shape[1] // 3
    assert ink.shape[1] > ink.shape[0] and ink[:, :third].sum() > ink[:, -third:].sum()  # head to the left


def test_scrambling_moves_every_quarter_and_keeps_the_ink():
    image = strokes(1)
    quarters = np.kron(np.arange(4).reshape(2, 2), np.ones((14, 14), np.uint8)).astype(np.uint8)
    for seed in range(20):
        scrambled = scramble(np.random.default_rng(seed), quarters)
        assert not (scrambled == quarters).any()
        kept = scramble(np.random.default_rng(seed), image)
        np.testing.assert_array_equal(np.sort(kept, axis=None), np.sort(image, axis=None))
