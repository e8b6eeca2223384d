"""Pixel operations against Pillow, for images of every kind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from selftrain_d2.data.augmentation import levels, pixel
from selftrain_d2.data.augmentation.pixel import PixelTransform
from selftrain_d2.errors import InputError

TABLE_LEVELS = st.floats(0, 10)
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def images(draw, channels=3, max_side=40):
    """Noise, few grey levels, one grey level, dark noise or a ramp: (H, W, channels) uint8."""
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (height, width, channels)
    kind = draw(st.sampled_from(["noise", "few", "one", "dark", "ramp"]))
    if kind == "noise":
        image = rng.integers(0, 256, shape)
    elif kind == "few":
        image = rng.choice(rng.integers(0, 256, 3), shape)
    elif kind == "one":
        image = np.full(shape, rng.integers(0, 256))
    elif kind == "dark":
        image = rng.integers(20, 60, shape)
    else:
        image = np.linspace(0, 255, height * width * channels).reshape(shape)
    return image.astype(np.uint8)


def enhance(kind):
    return lambda image, level: kind(image).enhance(levels.enhance_factor(level, None))


# Name -> (ours on RGB, Pillow's), both (image, level) -> image.
PAIRS = {
    "autocontrast": (lambda a, _: pixel.autocontrast(a), lambda i, _: ImageOps.autocontrast(i)),
    "equalize": (lambda a, _: pixel.equalize(a), lambda i, _: ImageOps.equalize(i)),
    "invert": (lambda a, _: pixel.invert(a), lambda i, _: ImageOps.invert(i)),
    "posterize": (
        lambda a, level: pixel.posterize(a, levels.posterize_bits(level, None)),
        lambda i, level: ImageOps.posterize(i, levels.posterize_bits(level, None)),
    ),
    "solarize": (
        lambda a, level: pixel.solarize(a, levels.solarize_threshold(level, None)),
        lambda i, level: ImageOps.solarize(i, levels.solarize_threshold(level, None)),
    ),
    "color": (
        lambda a, level: pixel.color(a, levels.enhance_factor(level, None), "RGB"),
        enhance(ImageEnhance.Color),
    ),
    "contrast": (
        lambda a, level: pixel.contrast(a, levels.enhance_factor(level, None), "RGB"),
        enhance(ImageEnhance.Contrast),
    ),
    "brightness": (
        lambda a, level: pixel.brightness(a, levels.enhance_factor(level, None)),
        enhance(ImageEnhance.Brightness),
    ),
    "sharpness": (
        lambda a, level: pixel.sharpness(a, levels.enhance_factor(level, None)),
        enhance(ImageEnhance.Sharpness),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@EXAMPLES
@given(image=images(), level=TABLE_LEVELS)
def test_equal_to_pillow(name, image, level):
    ours, pillows = PAIRS[name]
    expected = np.asarray(pillows(Image.fromarray(image), level)).astype(int)
    assert np.abs(ours(image, level).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in ("color",)])
@EXAMPLES
@given(image=images(channels=1), level=TABLE_LEVELS)
def test_grey_images_equal_to_pillow(name, image, level):
    ours, pillows = PAIRS[name]
    expected = np.asarray(pillows(Image.fromarray(image[:, :, 0]), level)).astype(int)
    found = ours(image, level).reshape(expected.shape).astype(int)
    assert np.abs(found - expected).max() <= 1


@EXAMPLES
@given(image=images(), addition=st.integers(0, 255))
def test_solarize_add(image, addition):
    expected = [min(v + addition, 255) if v < 128 else v for v in image.ravel().tolist()]
    assert pixel.solarize_add(image, addition).ravel().tolist() == expected


@EXAMPLES
@given(image=images(), factor=st.floats(0, 3))
def test_channel_order(image, factor):
    for operation in (pixel.color, pixel.contrast):
        rgb = operation(image, factor, "RGB")
        bgr = operation(np.ascontiguousarray(image[:, :, ::-1]), factor, "BGR")
        np.testing.assert_array_equal(rgb, bgr[:, :, ::-1])


def test_channel_order_matters():
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    assert pixel.color(red, 0.0, "RGB")[0, 0, 0] == 59  # 0.299 * 200, truncated
    assert pixel.color(red, 0.0, "BGR")[0, 0, 0] == 22  # 0.114 * 200, truncated


@EXAMPLES
@given(image=images())
def test_identity_levels(image):
    factor = levels.enhance_factor(5, None)
    assert factor == 1
    for result in (
        pixel.color(image, factor, "RGB"),
        pixel.contrast(image, factor, "RGB"),
        pixel.brightness(image, factor),
        pixel.sharpness(image, factor),
        pixel.solarize(image, levels.solarize_threshold(10, None)),
        pixel.solarize_add(image, levels.solarize_addition(0, None)),
        pixel.posterize(image, levels.posterize_bits(20, None)),
        pixel.cutout(image, 0, 0, 0),
        pixel.invert(pixel.invert(image)),
    ):
        np.testing.assert_array_equal(result, image)


@EXAMPLES
@given(image=images(), factor=st.floats(0, 2.8))
def test_grey_pixels_keep_their_color(image, factor):
    grey = np.repeat(image[:, :, :1], 3, axis=2)
    np.testing.assert_array_equal(pixel.color(grey, factor, "RGB"), grey)


@EXAMPLES
@given(image=images(), x=st.integers(0, 39), y=st.integers(0, 39), half=st.integers(0, 60))
def test_cutout(image, x, y, half):
    result = pixel.cutout(image, x, y, half)
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    covered = (rows >= y - half) & (rows < y + half) & (columns >= x - half) & (columns < x + half)
    assert (result[covered] == 128).all()
    np.testing.assert_array_equal(result[~covered], image[~covered])


TRANSFORMS = [
    PixelTransform(pixel.autocontrast),
    PixelTransform(pixel.equalize),
    PixelTransform(pixel.invert),
    PixelTransform(pixel.posterize, bits=3),
    PixelTransform(pixel.solarize, threshold=100),
    PixelTransform(pixel.solarize_add, addition=90),
    PixelTransform(pixel.color, factor=1.7, image_format="BGR"),
    PixelTransform(pixel.contrast, factor=1.7, image_format="BGR"),
    PixelTransform(pixel.brightness, factor=1.7),
    PixelTransform(pixel.sharpness, factor=1.7),
    PixelTransform(pixel.cutout, center_x=3, center_y=2, half_side=2),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 7, 3), (9, 2, 1), (5, 8), (480, 641, 3)])
def test_shape_type_and_input_are_kept(transform, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before = image.copy()
    result = transform.apply_image(image)
    assert result.shape == shape and result.dtype == np.uint8
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(result, transform.apply_image(image))
    # A flipped view, as detectron2's flip gives, is the same image to every operation.
    flipped = np.ascontiguousarray(image[:, ::-1])
    np.testing.assert_array_equal(transform.apply_image(image[:, ::-1]), transform.apply_image(flipped))


@pytest.mark.parametrize("image", [np.zeros((3, 3, 3), np.float32), np.zeros((3, 3, 4), np.uint8)])
def test_other_pixels_are_refused(image):
    with pytest.raises(InputError, match=r"equalize needs a uint8 image of 1 or 3 channels"):
        PixelTransform(pixel.equalize).apply_image(image)


def test_nothing_moves():
    transform = PixelTransform(pixel.invert)
    boxes, labels = np.array([[1.0, 2, 3, 4]]), np.array([[7, 8]], np.uint8)
    assert transform.apply_box(boxes) is boxes
    assert transform.apply_segmentation(labels) is labels
    assert transform.apply_coords(boxes) is boxes
    assert repr(TRANSFORMS[3]) == "PixelTransform(posterize, bits=3)"
