import numpy as np
import pytest
from PIL import Image

from selftrain_d2 import InputError
from selftrain_d2.inspection.mask_sheet import class_colours, mask_contact_sheet, painted

CLASSES = ["background", "red", "green"]


def test_painted_pixels_tell_their_label():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    labels = np.zeros((20, 30), np.uint8)
    labels[:, 10:20], labels[:10, 20:] = 1, 2
    labels[10:, 20:] = 255
    colours = class_colours(CLASSES)
    tile = painted(image, labels, colours, CLASSES)
    assert tile.shape == image.shape and tile.dtype == np.uint8
    assert np.ptp(tile[:, :20], axis=-1).max() == 0  # the background stays a grey picture
    for label, columns in ((1, slice(20, 40)), (2, slice(40, 60))):
        mean = tile[:20, columns].reshape(-1, 3).mean(0)
        assert np.abs(mean - colours[label]).max() < 40
        others = [np.abs(mean - colour).sum() for i, colour in enumerate(colours) if i != label]
        assert np.abs(mean - colours[label]).sum() < min(others)
    assert set(np.unique(tile[20:, 40:])) == {138, 208}  # hatched


@pytest.mark.parametrize("number", [1, 11, 21, 22, 151])
def test_every_class_has_a_colour_of_its_own(number):
    names = ["background", *(f"class {i}" for i in range(number - 1))]
    colours = class_colours(names)
    assert colours.shape == (number, 3) and len(np.unique(colours[1:], axis=0)) == number - 1


def test_sheet(tmp_path):
    rng = np.random.default_rng(0)
    files, maps = [], []
    for i, size in enumerate([(30, 50), (50, 30)]):  # wide and tall
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
        maps.append(rng.choice([0, 1, 2, 255], size).astype(np.uint8))
    for suffix in ("png", "jpg"):
        mask_contact_sheet(
            tmp_path / f"sheet.{suffix}", files, [("Human", maps), ("Student", maps)], CLASSES, width=600
        )
        with Image.open(tmp_path / f"sheet.{suffix}") as sheet:
            assert sheet.width == 600 and sheet.height > 300
    with pytest.raises(InputError, match="'Human' has 1 masks, but 2 images"):
        mask_contact_sheet(tmp_path / "x.png", files, [("Human", maps[:1])], CLASSES)
    with pytest.raises(InputError, match="at least one image"):
        mask_contact_sheet(tmp_path / "x.png", [], [("Human", [])], CLASSES)
