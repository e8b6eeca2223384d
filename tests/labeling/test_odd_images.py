"""Every kind of odd file is read as detectron2 reads it, or skipped with the reason; nothing stops, none is lost.

Where detectron2's pixels are wrong (TIFF that is to be turned, 16-bit grey): tests/data/test_image_files.py.
"""

import io
import os
import tarfile
import tempfile

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from PIL import Image

from selftrain_d2 import generate_pseudo_labels, load_pseudo_labels
from selftrain_d2.data.image_sources import images_of_archives, list_images
from selftrain_d2.data.pseudo_labels import writer as pseudo_label_writer
from selftrain_d2.labeling.inference import ImageReader

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 255, (24, 36), dtype=np.uint8)
COLOUR = RNG.integers(0, 255, (24, 36, 3), dtype=np.uint8)


def _saved(pixels, format, mode=None, **options):
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def _rotated(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    return _saved(COLOUR, format, exif=exif)


def _animated():
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    return _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


JPEG = _saved(COLOUR, "JPEG")
PNG = _saved(COLOUR, "PNG")

READ = {
    "colour.jpg": JPEG,
    "colour.png": PNG,
    "upper case.JPG": JPEG,
    "grey.jpg": _saved(GREY, "JPEG"),
    "grey.png": _saved(GREY, "PNG"),
    "bilevel.png": _saved(GREY, "PNG", "1"),
    "palette.png": _saved(COLOUR, "PNG", "P"),
    "palette_with_alpha.png": _saved(COLOUR, "PNG", "P", transparency=3),
    "alpha.png": _saved(COLOUR, "PNG", "RGBA"),
    "grey_alpha.png": _saved(GREY, "PNG", "LA"),
    "sixteen_bit_colour.tif": cv2.imencode(".tif", COLOUR.astype(np.uint16) * 257)[1].tobytes(),
    "cmyk.jpg": _saved(COLOUR, "JPEG", "CMYK"),
    "ycbcr.tif": _saved(COLOUR, "TIFF", "YCbCr"),
    "rotated.jpg": _rotated("JPEG"),
    "progressive.jpg": _saved(COLOUR, "JPEG", progressive=True),
    "animated.gif": _animated(),
    "pages.tif": _saved(
        Image.fromarray(COLOUR), "TIFF", save_all=True, append_images=[Image.fromarray(GREY)]
    ),
    "colour.webp": _saved(COLOUR, "WEBP"),
    "one_pixel.png": _saved(COLOUR[:1, :1], "PNG"),
    "one_row.png": _saved(np.tile(COLOUR[:1], (1, 2000, 1)), "PNG"),
    "one_column.jpg": _saved(np.tile(COLOUR[:, :1], (100, 1, 1)), "JPEG"),
    "png_named.jpg": PNG,
    "jpeg_named.png": JPEG,
    "junk_at_the_end.jpg": JPEG + b"junk",
    "two\nlines, ü 文.png": PNG,
    "-option.png": PNG,
    "#comment.png": PNG,
}

# Readable, but not by detectron2's reader.
READ_HERE = {
    "sixteen_bit.png": cv2.imencode(".png", GREY.astype(np.uint16) * 257)[1].tobytes(),
    "rotated.tif": _rotated("TIFF"),
}

SKIPPED = {
    "zero_bytes.jpg": b"",
    "text.png": b"not an image",
    "start_alone.jpg": b"\xff\xd8 no picture \xff\xd9",
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "truncated.png": PNG[: len(PNG) // 2],
    "truncated.gif": _animated()[:40],
    "header_alone.png": PNG[:40],
    "telephone.HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}

# What detectron2 reads, and gives wrong pixels without a word.
SKIPPED_HERE = {
    "float.tif": _saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "integers.tif": _saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "one_byte_changed.png": PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:],
    "camera.dng": _saved(
        COLOUR[:8, :12], "TIFF"
    ),  # a raw file is a TIFF, the first image of which is a preview
}


@pytest.fixture(scope="module")
def bomb():
    """A small file of 400 million pixels."""
    return _saved(Image.new("1", (20000, 20000)), "PNG", compress_level=1)


def _reader(folder, image_format="BGR"):
    return ImageReader(str(folder), [T.AugmentationList([])], image_format)


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L"])
@pytest.mark.parametrize("name", READ)
def test_read_as_detectron2_reads_it(tmp_path, name, image_format):
    (tmp_path / name).write_bytes(READ[name])
    sample = _reader(tmp_path, image_format)[name]
    expected = detection_utils.read_image(str(tmp_path / name), image_format)
    assert sample["file_name"] == name and (sample["height"], sample["width"]) == expected.shape[:2]
    np.testing.assert_array_equal(sample["images"][0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", SKIPPED)
def test_skipped_with_a_reason_that_is_the_same_every_time(tmp_path, name):
    (tmp_path / name).write_bytes(SKIPPED[name])
    with pytest.raises(Exception):  # noqa: B017  (detectron2 raises anything)
        detection_utils.read_image(str(tmp_path / name), "BGR")
    _check_skipped(tmp_path, name)


@pytest.mark.parametrize("name", SKIPPED_HERE)
def test_skipped_though_detectron2_makes_something_of_it(tmp_path, name):
    (tmp_path / name).write_bytes(SKIPPED_HERE[name])
    detection_utils.read_image(str(tmp_path / name), "BGR")
    _check_skipped(tmp_path, name)


def _check_skipped(folder, name):
    first, second = _reader(folder)[name], _reader(folder)[name]
    assert first == second and first["file_name"] == name
    assert "Error: " in first["skipped"] and " at 0x" not in first["skipped"]


def test_decompression_bomb(tmp_path, bomb):
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert "DecompressionBombError: Image size (400000000 pixels)" in _reader(tmp_path)["bomb.png"]["skipped"]


def test_what_is_no_readable_file(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    reader = _reader(tmp_path)
    for name, reason in (
        ("folder.jpg", "IsADirectoryError"),
        ("link.jpg", "FileNotFoundError"),
        ("lost.jpg", "FileNotFoundError"),
        ("nul\0byte.jpg", "ValueError"),
    ):
        assert reader[name]["skipped"].startswith(reason)


def test_files_without_permission():
    """Root may read everything: act as somebody else, in a folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "a.png")
        with open(path, "wb") as file:
            file.write(PNG)
        os.chmod(path, 0)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            assert _reader(folder)["a.png"]["skipped"].startswith("PermissionError: ")
        finally:
            if root:
                os.seteuid(0)


@pytest.fixture
def teacher(small_config, tmp_path):
    torch.manual_seed(0)
    detector = build_model(small_config)
    torch.nn.init.normal_(detector.head.cls_score.weight, std=0.5)
    torch.nn.init.constant_(detector.head.cls_score.bias, -2.0)
    small_config.MODEL.WEIGHTS = str(tmp_path / "teacher.pth")
    torch.save({"model": detector.state_dict()}, small_config.MODEL.WEIGHTS)
    small_config.INPUT.AUGMENTATION.IMAGE_SIZE = 64
    return small_config


@pytest.mark.parametrize("archive", [False, True])
def test_labeled_and_empty_and_skipped_are_all_that_was_listed(teacher, tmp_path, bomb, archive, monkeypatch):
    monkeypatch.setattr(pseudo_label_writer, "SHARD_SIZE", 7)
    folder = tmp_path / "photos"
    folder.mkdir()
    skipped = {**SKIPPED, **SKIPPED_HERE, "bomb.png": bomb}
    files = {**READ, **READ_HERE, **skipped}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name in ("notes.txt", "film.mpg", "features.h5"):  # nobody's pictures
        (folder / name).write_bytes(b"")
    (folder / "link.png").symlink_to("nowhere.png")
    if archive:
        with tarfile.open(tmp_path / "photos.tar", "w") as tar:
            for name in os.listdir(folder):
                tar.add(folder / name, name)
        image_root, names = images_of_archives([str(tmp_path / "photos.tar")])
    else:
        image_root, names = folder, list_images(folder)
    assert len(names) == len(files) + 1
    manifest = generate_pseudo_labels(
        teacher, image_root, names, tmp_path / "labels", thing_classes=["red", "green"]
    )
    assert manifest["listed"] == len(files) + 1
    assert manifest["labeled"] + manifest["empty"] + len(manifest["skipped"]) == manifest["listed"]
    assert {os.path.basename(name) for name in manifest["skipped"]} == {*skipped, "link.png"}
    assert all(manifest["skipped"].values())
    for d in load_pseudo_labels(tmp_path / "labels", 0.05):
        expected = (
            (36, 24) if "rotated.tif" in d["file_name"] else detection_utils.read_image(d["file_name"]).shape
        )
        assert (d["height"], d["width"]) == expected[:2]
