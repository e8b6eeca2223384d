import json
import logging
import os
import shutil
import tarfile

import numpy as np
import pytest
from conftest import make_coco_set
from detectron2.utils.file_io import PathManager

from selftrain_d2 import InputError
from selftrain_d2.data import unlabeled_images
from selftrain_d2.data.image_sources import ImageSource
from selftrain_d2.data.unlabeled_images import collect_images, without_known


@pytest.fixture
def places(tmp_path):
    """Two images of each kind of place; a folder, its own list, and archives share one of them."""
    for number, part in enumerate(("photos", "listed", "coco", "packed")):
        make_coco_set(tmp_path / part, 2, seed=number)
    (tmp_path / "listed" / "list.txt").write_text("images/001.png\n../photos/images/002.png\n")
    coco = {"images": [{"id": 1, "file_name": "images/002.png"}]}
    (tmp_path / "coco" / "images.json").write_text(json.dumps(coco))
    with tarfile.open(tmp_path / "packed" / "shard-0.tar", "w") as archive:
        archive.add(tmp_path / "packed" / "images" / "001.png", "deep/001.png")
    return [
        str(tmp_path / place)
        for place in ("photos/images", "listed/list.txt", "coco/images.json", "packed/shard-{0..0}.tar")
    ]


def _bytes(source):
    for name in source.file_names:
        with PathManager.open(os.path.join(source.image_root, name), "rb") as file:
            yield file.read()


def test_one_place_is_what_its_reader_gives(places, tmp_path):
    assert collect_images(places[:1]) == ImageSource(places[0], ["001.png", "002.png"])
    assert collect_images(places[3:]) == ImageSource(f"tar://{tmp_path}/packed", ["shard-0.tar/deep/001.png"])


def test_several_places_under_one_root(places, tmp_path):
    source = collect_images(places)
    assert source.image_root == f"tar://{tmp_path}"
    files = [
        "photos/images/001.png", "photos/images/002.png", "listed/images/001.png", "coco/images/002.png",
        "packed/images/001.png",
    ]  # fmt: skip
    assert list(_bytes(source)) == [(tmp_path / file).read_bytes() for file in files]

    without_archive = collect_images(places[:3])
    assert without_archive == ImageSource(str(tmp_path), files[:4])


def test_single_files(places, tmp_path):
    files = [str(tmp_path / part / "images" / "001.png") for part in ("photos", "listed")]
    assert collect_images(files) == ImageSource(
        str(tmp_path), ["photos/images/001.png", "listed/images/001.png"]
    )


def test_a_root_for_lists_and_coco_files(places, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(places[2], tmp_path / "elsewhere" / "images.json")
    with pytest.raises(InputError, match="None of the 1 images"):
        collect_images([str(moved)])
    assert collect_images([str(moved)], str(tmp_path / "coco")).file_names == ["images/002.png"]
    with pytest.raises(InputError, match="--unlabeled-root goes with lists and COCO files"):
        collect_images(places[:1], str(tmp_path))


@pytest.mark.parametrize(
    ("place", "fragment"),
    [
        ("nowhere", "--unlabeled-images nowhere does not exist.*KEY VALUE"),
        ("nowhere.tar", "cannot be opened"),
        ("packed.tar.gz", "is compressed"),
    ],
)
def test_places_that_are_none(tmp_path, monkeypatch, place, fragment):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed.tar.gz").write_bytes(b"\x1f\x8b" + bytes(20))
    with pytest.raises(InputError, match=fragment):
        collect_images([place])


@pytest.fixture
def files(tmp_path):
    """Write files by name; ``paths`` of names."""

    def write(**content):
        for name, data in content.items():
            (tmp_path / name).write_bytes(data)
        return ImageSource(str(tmp_path), list(content))

    return write


def test_known_files_by_place_link_and_content(files, tmp_path, caplog):
    rng = np.random.default_rng(0)
    noise = [rng.bytes(30_000) for _ in range(4)]
    known = files(one=noise[0], two=noise[1], three=noise[2])
    # As long as "one", and the same in the middle, or everywhere but there.
    other_ends = b"x" + noise[0][1:-1] + b"x"
    other_middle = noise[0][:15_000] + b"x" + noise[0][15_001:]
    files(
        copy=noise[0], new=noise[3], ends=other_ends, middle=other_middle, longer=noise[0] + b"x", nothing=b""
    )
    (tmp_path / "linked").symlink_to(tmp_path / "two")
    names = [
        "new",
        "one",
        "copy",
        "linked",
        "ends",
        "middle",
        "longer",
        "nothing",
        "../" + tmp_path.name + "/three",
        "gone",
    ]
    with caplog.at_level(logging.INFO):
        found = without_known(
            ImageSource(known.image_root, names),
            {
                "labeled": [str(tmp_path / name) for name in ("one", "two")],
                "of validation": [str(tmp_path / "three")],
            },
        )
    assert found.file_names == ["new", "ends", "middle", "longer", "nothing", "gone"]
    assert found.left_out == {"labeled": 3, "of validation": 1}
    assert "6 of 10; left out are 3 that are labeled and 1 that are of validation" in caplog.text


def test_known_files_in_archives(places, tmp_path):
    """The archive's member is a copy of a file, and the file one of the archive's member."""
    archive, file = (
        f"tar://{tmp_path}/packed/shard-0.tar/deep/001.png",
        str(tmp_path / "packed" / "images" / "001.png"),
    )
    source = collect_images(places)
    for known in (archive, file):
        assert without_known(source, {"labeled": [known]}).file_names == source.file_names[:4]
    images = collect_images([str(tmp_path / "packed" / "images")])
    assert without_known(images, {"labeled": [archive]}).file_names == ["002.png"]


def test_only_files_as_long_as_a_known_one_are_read(files, tmp_path, monkeypatch):
    known = files(known=b"1234")
    source = files(**{f"other{i}": bytes(5 + i) for i in range(50)}, copy=b"1234")
    read, hashed = [], unlabeled_images._hash
    monkeypatch.setattr(
        unlabeled_images, "_hash", lambda path, *a, **k: read.append(path) or hashed(path, *a, **k)
    )
    assert without_known(source, {"labeled": [str(tmp_path / "known")]}).left_out == {"labeled": 1}
    assert {os.path.basename(path) for path in read} == {"known", "copy"} and known


def test_nothing_left(files, tmp_path):
    with pytest.raises(InputError, match="None of the 1 unlabeled images is left: 1 that are labeled"):
        without_known(files(one=b"1"), {"labeled": [str(tmp_path / "one")]})
