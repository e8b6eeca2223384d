"""Operations inside boxes: pixels, masks, polygons and points move together, boxes stay."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selftrain_d2.data.augmentation import pixel
from selftrain_d2.data.augmentation.box_only import BoxOnlyTransform
from selftrain_d2.data.augmentation.geometric import AffineTransform
from selftrain_d2.data.augmentation.pixel import PixelTransform


def inside(regions, make):
    regions = np.array(regions)
    transforms = [make(y1 - y0, x1 - x0) for x0, y0, x1, y1 in regions.tolist()]
    return BoxOnlyTransform(regions, transforms, np.arange(len(regions)))


def test_pixels_change_inside_only():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    before = image.copy()
    transform = inside([[3, 4, 10, 12], [20, 0, 30, 5]], lambda h, w: PixelTransform(pixel.invert))
    expected = image.copy()
    expected[4:12, 3:10] = 255 - expected[4:12, 3:10]
    expected[0:5, 20:30] = 255 - expected[0:5, 20:30]
    np.testing.assert_array_equal(transform.apply_image(image), expected)
    np.testing.assert_array_equal(image, before)
    boxes = np.array([[3.0, 4, 10, 12]])
    assert transform.apply_box(boxes) is boxes
    points = np.array([[5.0, 5.0]])
    np.testing.assert_array_equal(transform.apply_coords(points), points)


def test_boxes_that_overlap_are_done_one_after_another():
    image = np.zeros((10, 10), np.uint8)
    transform = inside([[0, 0, 6, 6], [4, 4, 10, 10]], lambda h, w: PixelTransform(pixel.invert))
    result = transform.apply_image(image)
    assert result[5, 5] == 0 and result[1, 1] == 255 and result[8, 8] == 255 and result[0, 9] == 0


def test_translation_moves_labels_with_the_pixels():
    transform = inside([[10, 10, 20, 30]], lambda h, w: AffineTransform.translation_y(6, h, w))
    image = np.zeros((40, 40), np.uint8)
    image[12:16, 5:25] = 255  # sticks out of the box on both sides
    result = transform.apply_image(image)
    assert (result[12:16, 5:10] == 255).all() and (result[12:16, 20:25] == 255).all()
    assert (result[18:22, 10:20] == 255).all() and (result[10:16, 10:20] == 128).all()

    mask = transform.apply_segmentation(image > 0)
    np.testing.assert_array_equal(mask, result == 255)  # False, not grey, where nothing was
    labels = transform.apply_segmentation(np.where(image > 0, 3, 1).astype(np.uint8))
    assert (labels[10:16, 10:20] == 255).all() and (labels[18:22, 10:20] == 3).all()
    assert labels[0, 0] == 1

    polygons = transform.apply_polygons([np.array([[5.0, 12], [25, 12], [25, 16], [5, 16]])])
    hulls = sorted([*p.min(axis=0).tolist(), *p.max(axis=0).tolist()] for p in polygons)
    assert hulls == [[5, 12, 10, 16], [10, 18, 20, 22], [20, 12, 25, 16]]

    points = transform.apply_coords(np.array([[12.0, 13], [7, 13], [12, 26]]))
    assert points[:2].tolist() == [[12, 19], [7, 13]]
    assert (points[2] < -1000).all()  # pushed out of the box: gone


def test_flip_mirrors_its_own_boxes():
    regions = np.array([[2, 2, 8, 8], [10, 2, 16, 8]])
    transforms = [AffineTransform.flip_x(None, 6, 6), AffineTransform.flip_x(None, 6, 6)]
    transform = BoxOnlyTransform(regions, transforms, np.array([1, 3]))
    assert transform.mirrored_boxes(5).tolist() == [False, True, False, True, False]
    assert transform.apply_coords(np.array([[3.0, 4.0]])).tolist() == [[7, 4]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["rotation", "shear_x", "shear_y", "translation_x", "translation_y", "flip_x"]),
    strength=st.floats(-1, 1),
    seed=st.integers(0, 1000),
)
def test_polygons_and_masks_cover_the_same_area(kind, strength, seed):
    scale = {"rotation": 30, "shear_x": 0.3, "shear_y": 0.3}.get(kind, 20)
    argument = None if kind == "flip_x" else strength * scale
    argument = round(argument) if kind.startswith("translation") else argument
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 40, 2)
    region = [x, y, x + rng.integers(20, 60), y + rng.integers(20, 60)]
    transform = inside([region], lambda h, w: getattr(AffineTransform, kind)(argument, h, w))
    mask = np.zeros((100, 100), bool)
    x0, y0 = rng.integers(0, 60, 2)
    x1, y1 = x0 + rng.integers(5, 40), y0 + rng.integers(5, 40)
    mask[y0:y1, x0:x1] = True
    polygons = transform.apply_polygons([np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)])
    area = sum(
        0.5 * abs(np.dot(p[:, 0], np.roll(p[:, 1], 1)) - np.dot(p[:, 1], np.roll(p[:, 0], 1)))
        for p in polygons
    )
    assert area == pytest.approx(transform.apply_segmentation(mask).sum(), abs=60)
