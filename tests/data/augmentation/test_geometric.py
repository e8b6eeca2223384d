"""Geometry read back from pixels: what is painted must be found where the coordinates say."""

import numpy as np
import pytest
from fvcore.transforms.transform import HFlipTransform, TransformList
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path

from selftrain_d2.data.augmentation.geometric import (
    AffineTransform,
    ResizeCropPadTransform,
    clip_boxes,
    clip_polygons,
)
from selftrain_d2.data.augmentation.jitter import FitLongerSide, ScaleJitterCrop
from selftrain_d2.errors import InputError

EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True)
INFINITE = float("inf")


@st.composite
def painted_images(draw, smallest=24, largest=160, smallest_box=8):
    """A black image with one white box, and the box (4,) XYXY of whole pixels."""
    height, width = draw(st.integers(smallest, largest)), draw(st.integers(smallest, largest))
    x0 = draw(st.integers(0, width - smallest_box))
    y0 = draw(st.integers(0, height - smallest_box))
    x1 = draw(st.integers(x0 + smallest_box, width))
    y1 = draw(st.integers(y0 + smallest_box, height))
    image = np.zeros((height, width, 3), np.uint8)
    image[y0:y1, x0:x1] = 255
    return image, np.array([x0, y0, x1, y1], dtype=float)


@st.composite
def affine_transforms(draw, height, width):
    kind = draw(
        st.sampled_from(["rotation", "shear_x", "shear_y", "translation_x", "translation_y", "flip_x"])
    )
    argument = {
        "rotation": st.floats(-45, 45),
        "shear_x": st.floats(-0.45, 0.45),
        "shear_y": st.floats(-0.45, 0.45),
        "translation_x": st.integers(-width - 3, width + 3),
        "translation_y": st.integers(-height - 3, height + 3),
        "flip_x": st.none(),
    }[kind]
    return kind, getattr(AffineTransform, kind)(draw(argument), height, width, min_area_fraction=0.0)


@st.composite
def resizes(draw, height, width):
    size = draw(st.integers(16, 200))
    low = draw(st.floats(0.5, 2.0))
    np.random.seed(draw(st.integers(0, 2**32 - 1)))
    augmentation = ScaleJitterCrop(size, (low, low), pad_value=(0,), min_area_fraction=0.0)
    return augmentation.get_transform(np.empty((height, width), np.uint8))


def visible_box(image):
    """Hull of what is nearer to white than to grey: (4,) XYXY, or None."""
    bright = (image if image.ndim == 2 else image.min(axis=2)) > 190
    if not bright.any():
        return None
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def corners(box):
    x0, y0, x1, y1 = box
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=float)


def polygon_hull(polygons):
    points = np.concatenate(polygons)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def area(polygons):
    """Of simple polygons (P, 2), by the shoelace formula."""
    return sum(
        0.5 * abs(np.dot(p[:, 0], np.roll(p[:, 1], 1)) - np.dot(p[:, 1], np.roll(p[:, 0], 1)))
        for p in polygons
    )


def contains(outer, inner, pixels):
    return (outer[:2] <= inner[:2] + pixels).all() and (outer[2:] >= inner[2:] - pixels).all()


def check_agreement(transform, image, box, pixels):
    """The box, polygon and mask of a painted box agree with its pixels within ``pixels``."""
    moved_image = transform.apply_image(image)
    found = visible_box(moved_image)
    moved = transform.apply_box(box[None])[0]
    polygons = transform.apply_polygons([corners(box)])
    mask = transform.apply_segmentation(image[..., 0] > 0)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, moved_image[..., 0] > 190)
    perimeter = 2 * np.sum(moved[2:] - moved[:2])
    assert abs(area(polygons) - mask.sum()) <= perimeter * 0.5 + 4
    if found is None:
        return
    # The hull of four moved corners may be larger than what is visible of a turned box, never smaller.
    assert contains(moved, found, pixels) and contains(polygon_hull(polygons), found, pixels)
    all_visible = transform.contains(transform.apply_coords(corners(box))).all()
    axis_aligned = np.count_nonzero(np.abs(transform.matrix[:, :2]) > 1e-9) == 2
    if all_visible or axis_aligned:
        np.testing.assert_allclose(moved, found, atol=pixels)
        np.testing.assert_allclose(polygon_hull(polygons), found, atol=pixels)


@EXAMPLES
@given(data=st.data(), painted=painted_images())
def test_affine_boxes_are_where_their_pixels_are(data, painted):
    image, box = painted
    _, transform = data.draw(affine_transforms(*image.shape[:2]))
    check_agreement(transform, image, box, pixels=2)


@EXAMPLES
@given(data=st.data(), painted=painted_images(), flip=st.booleans())
def test_resized_and_cropped_boxes_are_where_their_pixels_are(data, painted, flip):
    image, box = painted
    transform = data.draw(resizes(*image.shape[:2]))
    chain = TransformList([HFlipTransform(image.shape[1]), transform] if flip else [transform])
    found = visible_box(chain.apply_image(image))
    moved = chain.apply_box(box[None].copy())[0]
    pixels = max(2, 0.5 * max(transform.scale))  # half a source pixel, where one becomes many
    if found is None:
        assert (moved[2:] - moved[:2] <= pixels).any()
        return
    np.testing.assert_allclose(moved, found, atol=pixels)
    mask = chain.apply_segmentation(image[..., 0] > 0)
    np.testing.assert_allclose(visible_box(mask * np.uint8(255)), moved, atol=pixels)
    np.testing.assert_allclose(polygon_hull(chain.apply_polygons([corners(box)])), moved, atol=1e-6)


@EXAMPLES
@given(data=st.data(), height=st.integers(1, 50), width=st.integers(1, 50))
def test_resizing_a_region_equals_the_region_of_the_resized_image(data, height, width):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    transform = data.draw(resizes(height, width))
    result = transform.apply_image(image)
    (y, x), scale = transform.origin, transform.scale
    # Bilinear interpolation at the pixel centres, written out; edges repeat, as at the region's.
    rows = int(np.ceil(transform.height / scale[0] - 1e-6))
    columns = int(np.ceil(transform.width / scale[1] - 1e-6))
    region = image[y : y + rows, x : x + columns].astype(float)
    for axis, (length, factor) in enumerate(zip((transform.height, transform.width), scale)):
        place = ((np.arange(length) + 0.5) / factor - 0.5).clip(0, region.shape[axis] - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, region.shape[axis] - 1)
        weight = (place - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        region = np.take(region, low, axis) * (1 - weight) + np.take(region, high, axis) * weight
    assert np.abs(result[: transform.height, : transform.width] - region).max() <= 2
    assert (result[transform.height :] == 0).all() and (result[:, transform.width :] == 0).all()


@pytest.mark.parametrize(
    "shape", [(1, 1, 3), (1, 1), (1, 900, 3), (700, 1, 1), (37, 53), (333, 501, 1), (3000, 4000, 3)]
)
@pytest.mark.parametrize("jitter", [0.5, 1.0, 2.0])
def test_every_image_size(shape, jitter):
    height, width = shape[:2]
    image = np.full(shape, 200, np.uint8)
    boxes = np.array([[0, 0, width, height], [0, 0, 0, 0], [width - 1, height - 1, width, height]], float)
    transform = ScaleJitterCrop(64, (jitter, jitter), pad_value=(7,)).get_transform(image)
    result = transform.apply_image(image)
    assert result.shape == (64, 64, *shape[2:])
    assert (result[: transform.height, : transform.width] == 200).all()
    assert (result[transform.height :] == 7).all()
    moved = transform.apply_box(boxes)
    assert moved.shape == (3, 4) and np.isfinite(moved).all()
    np.testing.assert_allclose(moved[0], [0, 0, transform.width, transform.height], atol=0.01)
    assert transform.apply_box(np.zeros((0, 4))).shape == (0, 4)
    turned = AffineTransform.rotation(20, height, width)
    assert turned.apply_image(image).shape == shape
    assert np.isfinite(turned.apply_box(boxes)).all()


@pytest.mark.parametrize(
    "shape, expected", [((100, 200), (32, 64)), ((64, 64), (64, 64)), ((1000, 3), (64, 1))]
)
def test_fit_longer_side(shape, expected):
    image = np.zeros((*shape, 3), np.uint8)
    transform = FitLongerSide(64).get_transform(image)
    assert transform.apply_image(image).shape == (*expected, 3)
    box = np.array([[0, 0, shape[1], shape[0]]], float)
    np.testing.assert_allclose(transform.apply_box(box), [[0, 0, expected[1], expected[0]]])


def test_known_values():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    right = AffineTransform.translation_x(1, 3, 4).apply_image(image)
    assert right.tolist() == [[128, 0, 1, 2], [128, 4, 5, 6], [128, 8, 9, 10]]
    down = AffineTransform.translation_y(-2, 3, 4).apply_image(image)
    assert down.tolist() == [[8, 9, 10, 11], [128] * 4, [128] * 4]
    np.testing.assert_array_equal(AffineTransform.flip_x(None, 3, 4).apply_image(image), image[:, ::-1])
    turned = AffineTransform.rotation(90, 3, 3).apply_image(image[:, :3])
    np.testing.assert_array_equal(turned, np.rot90(image[:, :3]))
    sheared = AffineTransform.shear_x(1.0, 3, 4)
    assert sheared.apply_coords(np.array([[1.0, 2.0]])).tolist() == [[3.0, 2.0]]
    assert AffineTransform.flip_x(None, 3, 4).mirrors and not sheared.mirrors


@EXAMPLES
@given(data=st.data(), height=st.integers(1, 60), width=st.integers(1, 60))
def test_identity_and_inverse(data, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for transform in (
        AffineTransform.rotation(0, height, width),
        AffineTransform.shear_x(0, height, width),
        AffineTransform.translation_y(0, height, width),
        ResizeCropPadTransform((1.0, 1.0), (0, 0), (height, width), (height, width)),
    ):
        np.testing.assert_array_equal(transform.apply_image(image), image)
    _, transform = data.draw(affine_transforms(height, width))
    points = np.random.default_rng(1).uniform(-100, 100, (5, 2))
    back = transform.inverse().apply_coords(transform.apply_coords(points))
    np.testing.assert_allclose(back, points, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_segmentation_is_filled_with_the_ignore_label(dtype):
    labels = np.full((10, 10), 200, dtype)
    moved = AffineTransform.translation_x(4, 10, 10, ignore_label=254).apply_segmentation(labels)
    assert moved.dtype == dtype
    assert (moved[:, :4] == 254).all() and (moved[:, 4:] == 200).all()
    padded = ResizeCropPadTransform((1, 1), (0, 0), (10, 10), (12, 13), (9,)).apply_segmentation(labels)
    assert padded.shape == (12, 13)
    assert (padded[:10, :10] == 200).all() and (padded[10:] == 255).all() and (padded[:, 10:] == 255).all()
    mask = ResizeCropPadTransform((1, 1), (0, 0), (10, 10), (12, 13), (9,)).apply_segmentation(labels > 0)
    assert mask.dtype == bool and mask.sum() == 100


def test_large_labels_survive():
    labels = np.array([[2**31 - 1, 70000], [3, 2**40]], dtype=np.int64)
    transform = ResizeCropPadTransform((2.0, 2.0), (0, 0), (4, 4), (4, 4))
    np.testing.assert_array_equal(transform.apply_segmentation(labels), labels.repeat(2, 0).repeat(2, 1))


@EXAMPLES
@given(st.lists(st.tuples(*[st.integers(-50, 150)] * 4), max_size=8), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_clip_boxes(boxes, fraction):
    boxes = np.array([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in boxes]).reshape(-1, 4)
    clipped = clip_boxes(boxes.astype(float), 60, 80, fraction)
    assert clipped.shape == boxes.shape
    for (x0, y0, x1, y1), result in zip(boxes.tolist(), clipped.tolist()):
        left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, 80), min(y1, 60)
        remaining = max(right - left, 0) * max(bottom - top, 0)
        assert 0 <= result[0] <= result[2] <= 80 and 0 <= result[1] <= result[3] <= 60
        if remaining > 0 and remaining >= fraction * (x1 - x0) * (y1 - y0):
            assert result == [left, top, right, bottom]
        else:
            assert result[0] == result[2] and result[1] == result[3]


def test_a_box_pushed_off_is_lost_not_moved_to_the_edge():
    transform = AffineTransform.translation_x(50, 100, 100)
    boxes = np.array([[60.0, 10, 90, 30], [45, 10, 95, 30], [0, 0, 50, 20]])
    moved = transform.apply_box(boxes)
    # The first is gone, of the second 5 of 50 columns remain (10 %: kept), the third is whole.
    assert (moved[0, 2:] == moved[0, :2]).all()
    assert moved[1:].tolist() == [[95, 10, 100, 30], [50, 0, 100, 20]]
    stricter = AffineTransform.translation_x(50, 100, 100, min_area_fraction=0.11).apply_box(boxes)
    assert (stricter[1, 2:] == stricter[1, :2]).all()


@EXAMPLES
@given(seed=st.integers(0, 10_000), points=st.integers(3, 7))
def test_clip_polygons_equals_clipping_the_painted_area(seed, points):
    rng = np.random.default_rng(seed)
    # A star-shaped (often concave) polygon around a point.
    angles = (np.arange(points) + rng.uniform(0, 0.9, points)) * 2 * np.pi / points
    radii = rng.uniform(20, 120, points)
    polygon = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None] + rng.uniform(20, 130, 2)
    x0, y0, x1, y1 = 40, 50, 110, 120
    clipped = clip_polygons([polygon], x0, y0, x1, y1)
    # Count the pixel centres of the rectangle that lie in the polygon.
    centers = np.stack(np.meshgrid(np.arange(x0, x1), np.arange(y0, y1)), axis=-1).reshape(-1, 2) + 0.5
    expected = Path(polygon).contains_points(centers).sum()
    assert abs(area(clipped) - expected) <= 40  # of 4900
    for p in clipped:
        assert (p >= (x0 - 1e-6, y0 - 1e-6)).all() and (p <= (x1 + 1e-6, y1 + 1e-6)).all()


def test_clip_polygons_leaves_out_what_is_outside():
    square = corners((0, 0, 10, 10))
    assert clip_polygons([square], 20, 20, 30, 30) == []
    (whole,) = clip_polygons([square], -5, -5, 30, 30)
    np.testing.assert_array_equal(whole, square)
    (half,) = clip_polygons([square], 5, -INFINITE, INFINITE, INFINITE)
    assert polygon_hull([half]).tolist() == [5, 0, 10, 10]


def test_rotated_boxes_are_refused():
    for transform in (
        AffineTransform.rotation(5, 9, 9),
        ResizeCropPadTransform((1, 1), (0, 0), (9, 9), (9, 9)),
    ):
        with pytest.raises(InputError, match="cannot move rotated boxes"):
            transform.apply_rotated_box(np.zeros((1, 5)))
