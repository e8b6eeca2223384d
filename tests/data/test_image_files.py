"""Every format, orientation and mode: painted pixels come back upright, and the header's size is theirs."""

import io
import struct
import zlib

import cv2
import numpy as np
import PIL
import pytest
from detectron2.data import detection_utils as utils
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, features

from selftrain_d2.data.image_files import read_image, read_image_size
from selftrain_d2.data.label_maps import read_label_map
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper

PILLOW = int(PIL.__version__.split(".")[0])
HEIGHT, WIDTH = 32, 48
# EXIF: where the first row and the first column of the stored pixels belong -> how an upright image is stored.
STORED = {
    1: None,  # top, left
    2: Image.Transpose.FLIP_LEFT_RIGHT,  # top, right
    3: Image.Transpose.ROTATE_180,  # bottom, right
    4: Image.Transpose.FLIP_TOP_BOTTOM,  # bottom, left
    5: Image.Transpose.TRANSPOSE,  # left, top
    6: Image.Transpose.ROTATE_90,  # right, top: what was the right side is the first row
    7: Image.Transpose.TRANSVERSE,  # right, bottom
    8: Image.Transpose.ROTATE_270,  # left, bottom
}


def painted():
    """Four quadrants of different colours, and grey levels too."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for row, column, colour in ((0, 0, 255), (0, 1, (255, 0, 0)), (1, 0, (0, 255, 0)), (1, 1, 0)):
        pixels[16 * row : 16 * row + 16, 24 * column : 24 * column + 24] = colour
    return Image.fromarray(pixels)


def stored(image, orientation):
    return image if STORED[orientation] is None else image.transpose(STORED[orientation])


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def xmp(orientation):
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
        "</rdf:RDF></x:xmpmeta>"
    )


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_text(key, text, international=False):
    info = PngImagePlugin.PngInfo()
    (info.add_itxt if international else info.add_text)(key, text)
    return {"pnginfo": info}


def raw_profile(orientation):
    """As ImageMagick writes EXIF into PNG."""
    data = exif(orientation).tobytes()
    return f"\nexif\n{len(data):8}\n{data.hex()}\n"


def chunks_of(png):
    place, chunks = 8, []
    while place < len(png):
        length = struct.unpack(">I", png[place : place + 4])[0]
        chunks.append(png[place : place + length + 12])
        place += length + 12
    return chunks


def metadata_last(png):
    """The PNG with its EXIF behind its pixels, as the format allows."""
    chunks = sorted(chunks_of(png), key=lambda c: {b"eXIf": 1, b"IEND": 2}.get(c[4:8], 0))
    return png[:8] + b"".join(chunks)


def jpeg_with_xmp(image, orientation):
    data = saved(image, "JPEG")
    segment = b"http://ns.adobe.com/xap/1.0/\0" + xmp(orientation).encode()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def mpo(image, orientation):
    return saved(image, "MPO", save_all=True, append_images=[image], exif=exif(orientation))


# Format, and where a file of it says how it is to be turned -> its modes, and how it is written.
COLOUR, GREY = ("RGB", "RGBA", "P"), ("L", "1", "LA", "I;16")
PLACES = {
    "jpg exif": (("RGB", "L", "CMYK"), lambda i, o: saved(i, "JPEG", exif=exif(o))),
    "jpg xmp": (("RGB", "L", "CMYK"), jpeg_with_xmp),
    "mpo exif": (("RGB", "L"), mpo),
    "png exif": ((*COLOUR, *GREY), lambda i, o: saved(i, "PNG", exif=exif(o))),
    "png exif last": ((*COLOUR, *GREY), lambda i, o: metadata_last(saved(i, "PNG", exif=exif(o)))),
    "png xmp": (COLOUR, lambda i, o: saved(i, "PNG", **png_text("XML:com.adobe.xmp", xmp(o), True))),
    "png text": (COLOUR, lambda i, o: saved(i, "PNG", **png_text("Raw profile type exif", raw_profile(o)))),
    "tif tag": ((*COLOUR, *GREY, "CMYK"), lambda i, o: saved(i, "TIFF", exif=exif(o))),
    "tif tag lzw": (
        (*COLOUR, *GREY),
        lambda i, o: saved(i, "TIFF", exif=exif(o), compression="tiff_lzw"),
    ),
    "tif pages": (
        ("RGB", "L"),
        lambda i, o: saved(i, "TIFF", exif=exif(o), save_all=True, append_images=[i]),
    ),
    "tif xmp": (("RGB", "L"), lambda i, o: saved(i, "TIFF", tiffinfo={700: xmp(o).encode()})),
    "webp exif": (("RGB", "RGBA"), lambda i, o: saved(i, "WEBP", exif=exif(o), lossless=True)),
    "webp xmp": (("RGB",), lambda i, o: saved(i, "WEBP", xmp=xmp(o).encode(), lossless=True)),
    "avif exif": (("RGB", "RGBA"), lambda i, o: saved(i, "AVIF", exif=exif(o))),
    "gif": (("P", "L"), lambda i, o: saved(i, "GIF")),
    "bmp": (("RGB", "L", "1"), lambda i, o: saved(i, "BMP")),
    "ppm": (("RGB", "L", "1"), lambda i, o: saved(i, "PPM")),
    "jp2": (("RGB", "L"), lambda i, o: saved(i, "JPEG2000")),
    "tga": (("RGB", "RGBA"), lambda i, o: saved(i, "TGA")),
    "ico": (("RGBA",), lambda i, o: saved(i, "ICO", sizes=[(16, 16), (32, 21)])),
    "icns": (("RGBA",), lambda i, o: saved(i.resize((32, 32)), "ICNS")),
}


def in_mode(mode):
    """The painted image in a mode, and the RGB that it is to be read as."""
    if mode == "I;16":
        levels = np.asarray(painted().convert("L")).astype(np.uint16)
        return Image.fromarray(levels * 256 + 77), np.dstack([levels] * 3)
    image = painted().convert(mode)
    return image, np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("place", "orientation"), [(p, o) for p in PLACES for o in STORED if " " in p or o == 1]
)
def test_upright_and_of_the_size_of_the_header(tmp_path, place, orientation):
    modes, write = PLACES[place]
    if place.startswith("avif") and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if place in ("jpg xmp", "tif xmp", "webp xmp") and PILLOW < 11:
        pytest.skip("this Pillow knows no XMP in JPEG, TIFF and WebP")
    path = tmp_path / f"a.{place.split()[0]}"
    for mode in modes:
        image, expected = in_mode(mode)
        path.write_bytes(write(stored(image, orientation), orientation))
        found = read_image(str(path), "RGB")
        assert read_image_size(path) == found.shape[:2], mode
        if place in ("ico", "icns"):
            continue
        assert found.shape == (HEIGHT, WIDTH, 3) and found.flags.c_contiguous, mode
        lossy = place[:3] in ("jpg", "mpo", "avi", "jp2")
        assert np.abs(found.astype(int) - expected)[4:-4, 4:-4].mean() < (6 if lossy else 1e-9), mode
        # Pillow's own word. (A path would have Pillow 13 map uncompressed TIFF into memory, unturned and garbled.)
        with Image.open(io.BytesIO(path.read_bytes())) as other:
            turned = ImageOps.exif_transpose(other)
        if mode != "I;16" and not (place.startswith("tif") and PILLOW < 10):  # which turned TIFF twice
            assert np.abs(found.astype(int) - np.asarray(turned.convert("RGB"))).max() <= (1 if lossy else 0)
        grey, bgr = (read_image(str(path), image_format) for image_format in ("L", "BGR"))
        assert grey.shape == (HEIGHT, WIDTH, 1)
        np.testing.assert_array_equal(bgr, found[..., ::-1])


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("place", ["png exif", "png exif last", "tif tag", "tif tag lzw"])
def test_masks_are_turned_as_images_are(tmp_path, place, orientation):
    ids = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 251
    for pixels in (ids.astype(np.uint8), ids.astype(np.uint16), ids > 100):
        path = tmp_path / f"mask.{place.split()[0]}"
        path.write_bytes(PLACES[place][1](stored(Image.fromarray(pixels), orientation), orientation))
        np.testing.assert_array_equal(read_label_map(path), pixels)
        assert read_image_size(path) == (HEIGHT, WIDTH)


def test_the_mapper_sees_a_turned_tiff_as_it_is_shown(tmp_path, small_config):
    path = tmp_path / "a.tif"
    path.write_bytes(saved(stored(painted(), 6), "TIFF", exif=exif(6)))
    mapper = SelfTrainingDatasetMapper(small_config, is_train=False)
    sample = mapper(
        {"file_name": str(path), "height": HEIGHT, "width": WIDTH}
    )  # a wrong size would be refused
    left_top = sample["image"][:, 8, 8]
    assert (left_top > 200).all()


# ---- 16 bits and more ---------------------------------------------------------------------------------

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def tiff(pixels, bits, photometric=1, order=">"):
    """An uncompressed grey TIFF by hand, of packed samples."""
    data = pixels.astype(f"{order}u2").tobytes()
    if bits == 12:
        unpacked = np.unpackbits(pixels.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
        data = np.packbits(unpacked.reshape(-1)).tobytes()
    height, width = pixels.shape
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(data),
    }
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", v) for tag, v in tags.items()
    )
    start = {">": b"MM\0*", "<": b"II*\0"}[order] + struct.pack(f"{order}I", 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


SIXTEEN = {
    "png": cv2.imencode(".png", RAMP)[1].tobytes(),
    "tif little-endian": tiff(RAMP, 16, order="<"),
    "tif big-endian": tiff(RAMP, 16, order=">"),
    "tif lzw": cv2.imencode(".tif", RAMP)[1].tobytes(),
    "pgm": b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes(),
    "jp2": saved(Image.fromarray(RAMP), "JPEG2000"),
}


@pytest.mark.parametrize("kind", SIXTEEN)
def test_a_ramp_of_sixteen_bits_has_256_levels(tmp_path, kind):
    path = str(tmp_path / f"ramp.{kind.split()[0]}")
    with open(path, "wb") as file:
        file.write(SIXTEEN[kind])
    found = read_image(path, "BGR")
    np.testing.assert_array_equal(found, np.dstack([RAMP // 256] * 3))
    np.testing.assert_array_equal(read_image(path, "L")[..., 0], RAMP // 256)
    assert read_image_size(path) == (256, 256)
    assert (utils.read_image(path, "BGR") == 255).mean() > 0.99, "why detectron2's is not used"


def test_grey_of_sixteen_bits_is_read_as_colour_of_sixteen_bits(tmp_path):
    """By Pillow, which takes the high byte of colours, and OpenCV, which may round."""
    for suffix in ("png", "tif"):
        grey, colour = (str(tmp_path / f"{kind}.{suffix}") for kind in ("grey", "colour"))
        cv2.imwrite(grey, RAMP)
        cv2.imwrite(colour, np.dstack([RAMP] * 3))
        found = read_image(grey, "RGB")
        np.testing.assert_array_equal(found, read_image(colour, "RGB"))
        assert np.abs(found.astype(int) - cv2.imread(colour, cv2.IMREAD_COLOR)).max() <= 1


def test_twelve_bits_and_white_that_is_zero(tmp_path):
    twelve = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    (tmp_path / "twelve.tif").write_bytes(tiff(twelve, 12, order="<"))
    np.testing.assert_array_equal(read_image(tmp_path / "twelve.tif", "L")[..., 0], twelve // 16)
    (tmp_path / "white.tif").write_bytes(tiff(RAMP, 16, photometric=0, order="<"))
    np.testing.assert_array_equal(read_image(tmp_path / "white.tif", "L")[..., 0], 255 - RAMP // 256)


@pytest.mark.parametrize(
    ("pixels", "format", "reason"),
    [
        (RAMP.astype(np.int32), "TIFF", "signed or 32-bit integers"),
        ((RAMP / 65535).astype(np.float32), "TIFF", "floating-point numbers"),
    ],
)
def test_grey_levels_without_a_white_are_refused(tmp_path, pixels, format, reason):
    path = tmp_path / "a.img"
    path.write_bytes(saved(Image.fromarray(pixels), format))
    for read in (lambda: read_image(path, "RGB"), lambda: read_image_size(path)):
        with pytest.raises(OSError, match=f"{reason}.*save it with 8 or 16 bits"):
            read()


# ---- headers and faults -------------------------------------------------------------------------------


def test_the_size_of_a_png_costs_no_decoding(tmp_path, monkeypatch):
    """Wherever its metadata are; Pillow's ``getexif`` decodes all pixels."""
    for place in ("png exif", "png exif last", "png xmp"):
        (tmp_path / f"{place}.png").write_bytes(PLACES[place][1](stored(painted(), 6), 6))
    (tmp_path / "plain.png").write_bytes(saved(painted(), "PNG"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for path in tmp_path.iterdir():
        assert read_image_size(path) == (HEIGHT, WIDTH)


def test_faults_behind_the_pixels_of_a_png(tmp_path):
    whole = metadata_last(saved(stored(painted(), 6), "PNG", exif=exif(6)))
    chunks = chunks_of(whole)
    broken = chunks[-2][:-1] + bytes([chunks[-2][-1] ^ 1])  # the checksum of its EXIF
    for name, data in (
        ("no end mark", whole[:-12]),
        ("junk after the end", whole + b"junk"),
        ("checksum", whole[:8] + b"".join([*chunks[:-2], broken, chunks[-1]])),
        ("text", whole[:8] + b"".join([*chunks[:-1], chunk(b"iTXt", b"broken"), chunks[-1]])),
    ):
        (tmp_path / "a.png").write_bytes(data)
        assert read_image_size(tmp_path / "a.png") == read_image(tmp_path / "a.png", "RGB").shape[:2], name
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="truncated"):
        read_image_size(tmp_path / "a.png")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("tags", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_broken_metadata_do_not_cost_the_image(tmp_path, suffix, tags):
    path = tmp_path / f"a.{suffix}"
    painted().save(path, exif=tags)
    assert read_image_size(path) == read_image(path, "RGB").shape[:2] == (HEIGHT, WIDTH)


def test_a_broken_stream_is_refused_and_not_half_decoded(tmp_path):
    """detectron2 asks a PNG for its EXIF, hides the error, and takes what was decoded until then."""
    path = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    data = bytearray(saved(Image.fromarray(pixels), "PNG"))
    data[60] ^= 255
    path.write_bytes(data)
    assert np.abs(utils.read_image(str(path), "RGB").astype(int) - pixels).max() > 100
    with pytest.raises(OSError, match="broken data stream"):
        read_image(path, "RGB")


def test_what_a_reader_of_pillow_raises_is_an_error_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bmp"
    painted().save(path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: struct.unpack("I", b""))
    with pytest.raises(OSError, match="error: unpack requires a buffer"):
        read_image(path, "RGB")
