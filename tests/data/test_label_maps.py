import numpy as np
import pytest
from PIL import Image

from selftrain_d2.data.label_maps import read_label_map, voc_colours
from selftrain_d2.errors import InputError

IDS = np.array([[0, 1, 2, 20], [255, 15, 1, 0], [7, 7, 255, 3]], dtype=np.uint8)


def test_colours_are_pascal_vocs():
    """Some that its documentation lists."""
    colours = voc_colours().tolist()
    listed = {0: [0, 0, 0], 1: [128, 0, 0], 2: [0, 128, 0], 7: [128, 128, 128], 8: [64, 0, 0]}
    listed |= {15: [192, 128, 128], 16: [0, 64, 0], 20: [0, 64, 128], 255: [224, 224, 192]}
    for index, colour in listed.items():
        assert colours[index] == colour
    assert len({tuple(c) for c in colours}) == 256


def save(image, folder, palette=None):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if palette is not None:
        image.putpalette(palette.tobytes())
    path = folder / "mask.png"
    image.save(path)
    return path


@pytest.mark.parametrize("kind", ["palette", "grey", "16 bit", "colours", "foreign palette"])
def test_every_way_to_store_ids(kind, tmp_path):
    image = {
        "palette": lambda: save(IDS, tmp_path, voc_colours()),
        "foreign palette": lambda: save(IDS, tmp_path, voc_colours()[::-1]),
        "grey": lambda: save(IDS, tmp_path),
        "16 bit": lambda: save(IDS.astype(np.uint16), tmp_path),
        "colours": lambda: save(voc_colours()[IDS], tmp_path),
    }[kind]()
    labels = read_label_map(image)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, IDS)
    assert read_label_map(image, dtype=int).dtype == int


def test_black_and_white(tmp_path):
    mask = IDS > 2
    np.testing.assert_array_equal(read_label_map(save(mask, tmp_path)), mask)


def test_turned_by_exif_as_its_image_is(tmp_path):
    image = Image.fromarray(IDS)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "mask.png", exif=exif)
    np.testing.assert_array_equal(read_label_map(tmp_path / "mask.png"), np.rot90(IDS, -1))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((2, 2), 256, dtype=np.uint16), "class id 256"),
        (np.full((2, 2, 4), 3, dtype=np.uint8), "mode RGBA"),
        (np.full((2, 2), 0.5, dtype=np.float32), "mode F"),
    ],
)
def test_masks_that_hold_no_ids(pixels, message, tmp_path):
    path = tmp_path / "mask.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match=f"mask.tif.*{message}"):
        read_label_map(path)


def test_a_colour_that_is_no_class(tmp_path):
    pixels = voc_colours()[IDS]
    pixels[2, 1] = (1, 2, 3)
    with pytest.raises(InputError, match=r"mask.png.*\(1, 2, 3\) at x 1, y 2"):
        read_label_map(save(pixels, tmp_path))


def test_files_that_are_no_masks(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png cannot be read"):
        read_label_map(tmp_path / "gone.png")
    path = save(IDS, tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"mask\.png cannot be read"):
        read_label_map(path)
