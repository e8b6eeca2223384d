import contextlib
import json
import os
import tarfile
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selftrain_d2 import InputError, register_image_folder
from selftrain_d2.data.datasets import load_image_folder
from selftrain_d2.data.image_sources import (
    check_outside,
    images_of_archives,
    images_of_coco_json,
    images_of_dataset,
    images_of_folder,
    images_of_list,
    list_images,
    list_line,
)


@pytest.fixture
def photos(tmp_path):
    """Four images in nested folders, and a text file."""
    folder = tmp_path / "photos"
    for name in ("b.jpg", "a.PNG", "deep/er/c.png", "deep/with space, ü.jpg"):
        _image(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


NAMES = ["a.PNG", "b.jpg", "deep/er/c.png", "deep/with space, ü.jpg"]


def _image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, np.zeros((4, 5, 3), np.uint8))[1].tobytes())


@contextlib.contextmanager
def ordinary_user():
    """Root may read everything: act as somebody else. Nobody else can enter pytest's folders, hence a new one."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


def test_folder_is_absolute_and_sorted(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    assert images_of_folder("photos") == (str(photos), NAMES)


def test_folders_and_pipes_are_no_images_whatever_their_names(photos):
    (photos / "folder.jpg").mkdir()
    _image(photos / "folder.jpg" / "inside.png")
    os.mkfifo(photos / "pipe.jpg")
    assert list_images(photos) == sorted([*NAMES, "folder.jpg/inside.png"])


@pytest.mark.parametrize("archive", [False, True])
def test_all_that_people_call_pictures_is_listed_whether_it_can_be_read_or_not(tmp_path, archive):
    pictures = [
        "a.jpg",
        "b.HEIC",
        "c.heif",
        "d.dng",
        "e.CR2",
        "f.nef",
        "g.ARW",
        "h.jxl",
        "i.avif",
        "j.svg",
        "k.MPO",
        "l.pjpeg",
    ]
    others = ["film.mpg", "features.h5", "notes.txt", "labels.json", "a.xmp", "scene.hdr", "page.pdf", "heic"]
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in pictures + others:
        (folder / name).write_bytes(b"")
    if archive:
        with tarfile.open(tmp_path / "photos.tar", "w") as tar:
            tar.add(folder, "photos")
        names = images_of_archives([str(tmp_path / "photos.tar")]).file_names
        assert sorted(names) == [f"photos.tar/photos/{name}" for name in pictures]
    else:
        assert list_images(folder) == pictures


def test_outputs_lie_outside_folders_of_images(photos, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(photos)
    for output, folder in (
        (photos, photos),
        (photos / "deep" / "labels", photos),
        (tmp_path / "link" / "labels", photos),
        (photos / "labels", tmp_path / "link"),
        ("labels", "."),
    ):
        with pytest.raises(InputError, match=r"lies in the image folder.*choose an output folder outside"):
            check_outside(output, folder)
    for output in (f"{photos}_labels", tmp_path, "../labels", tmp_path / "elsewhere" / "photos"):
        check_outside(output, photos)


def test_links(photos, tmp_path):
    _image(tmp_path / "elsewhere" / "far.jpg")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "deep" / "up").symlink_to(photos)  # a circle
    (photos / "itself.jpg").symlink_to(photos / "itself.jpg")
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    assert list_images(photos) == sorted([*NAMES, "linked/far.jpg", "itself.jpg", "gone.jpg"])
    _, unreadable = load_image_folder(photos)
    assert set(unreadable) == {"itself.jpg", "gone.jpg"}


def test_names_with_newlines_and_of_no_known_encoding(photos):
    _image(photos / "two\nlines.jpg")
    os.rename(photos / "b.jpg", os.path.join(os.fsencode(photos), b"caf\xe9.jpg"))
    names = list_images(photos)
    assert "two\nlines.jpg" in names and r"caf\udce9.jpg" in names
    "".join(names).encode("utf-8")


def test_folder_without_permission_is_listed_itself():
    with ordinary_user() as folder:
        _image(folder / "a.jpg")
        _image(folder / "locked" / "b.jpg")
        _image(folder / "c.jpg")
        os.chmod(folder / "locked", 0)
        os.chmod(folder / "c.jpg", 0)
        try:
            assert list_images(folder) == ["a.jpg", "c.jpg", "locked/"]
            dicts, unreadable = load_image_folder(folder)
            assert [d["image_id"] for d in dicts] == ["a.jpg"]
            assert (
                all("Permission denied" in reason for reason in unreadable.values()) and len(unreadable) == 2
            )
            with pytest.raises(InputError, match="locked cannot be listed: Permission denied"):
                list_images(folder / "locked")
        finally:
            os.chmod(folder / "locked", 0o700)


def test_list_file(photos, tmp_path):
    _image(tmp_path / "outside.jpg")
    file = photos / "images.txt"
    file.write_bytes(
        f"\ufeff# chosen\r\nb.jpg\r\n\r\n  \n./deep/../a.PNG\n{photos}/deep/er/c.png\n../outside.jpg\nlost.jpg".encode()
    )
    assert images_of_list(file) == (
        str(photos),
        ["b.jpg", "a.PNG", "deep/er/c.png", str(tmp_path / "outside.jpg"), "lost.jpg"],
    )
    (tmp_path / "list.txt").write_text("er/c.png\n")
    assert images_of_list(tmp_path / "list.txt", photos / "deep") == (str(photos / "deep"), ["er/c.png"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.PNG\nb.jpg\n./a.PNG\n", r"names \./a\.PNG twice, in lines 1 and 3"),
        (b"# nothing\n\n", "names no image"),
        (b"x.jpg\ny.jpg\n", r"None of the 2 images .* is there, e\.g\. .*x\.jpg: check the image root"),
        ("b.jpg".encode("utf-16"), "not UTF-8"),
        (b'a.PNG\n"C:\\photos\\b.jpg"\n', r"line 2: .* is in quotes, but no JSON string"),
    ],
)
def test_faults_of_list_files(photos, content, message):
    (photos / "list").write_bytes(content)
    with pytest.raises(InputError, match=message):
        images_of_list(photos / "list")


@given(st.lists(st.text(min_size=1, max_size=8).filter(lambda n: "/" not in n and n not in (".", ".."))))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_list_that_was_written_is_read_back(photos, names):
    """Whatever characters the names have."""
    written = list(dict.fromkeys(["b.jpg", *names, *(f"x/{name}" for name in names)]))
    (photos / "list").write_text("".join(f"{list_line(name)}\n" for name in written[::-1]), encoding="utf-8")
    assert images_of_list(photos / "list").file_names == written[::-1]


def test_list_or_root_that_is_not_there(photos):
    with pytest.raises(InputError, match=r"list .*no\.txt does not exist"):
        images_of_list(photos / "no.txt")
    with pytest.raises(InputError, match=r"folder .*nowhere does not exist"):
        images_of_list(photos / "notes.txt", photos / "nowhere")


def test_coco_json_without_annotations(photos, tmp_path):
    file = tmp_path / "images.json"
    file.write_text(json.dumps({"images": [{"file_name": "b.jpg"}, {"file_name": "lost.jpg"}]}))
    assert images_of_coco_json(file, photos) == (str(photos), ["b.jpg", "lost.jpg"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a COCO file"),
        ('{"images": 3}', "not a COCO file"),
        ('{"images": [{"id": 1}]}', r"images\[0\]: its 'file_name' is null"),
        ('{"images": [{"file_name": 7}]}', r"images\[0\]: its 'file_name' is 7: it must be a text"),
        ('{"images": []}', "has no 'images'"),
        (
            '{"images": [{"file_name": "b.jpg"}, {"file_name": "./b.jpg"}]}',
            r"two images of the same file_name: 'b\.jpg'",
        ),
        ('{"images": [{"file_name": "lost.jpg"}]}', "check the image root"),
    ],
)
def test_faults_of_coco_json(photos, tmp_path, content, message):
    file = tmp_path / "images.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        images_of_coco_json(file, photos)


def test_dataset(photos, tmp_path):
    register_image_folder("some_photos", photos)
    assert images_of_dataset("some_photos") == (str(photos), NAMES)
    # One image, no image root, listed for two instances.
    DatasetCatalog.register("one_photo", lambda: [{"file_name": str(photos / "b.jpg")}] * 2)
    assert images_of_dataset("one_photo") == (str(photos), ["b.jpg"])
    MetadataCatalog.get("one_photo").image_root = str(tmp_path)
    assert images_of_dataset("one_photo") == (str(tmp_path), ["photos/b.jpg"])
    with pytest.raises(InputError, match="no dataset named 'nobody'"):
        images_of_dataset("nobody")
    DatasetCatalog.register("lost", (tmp_path / "no.json").read_bytes)
    with pytest.raises(InputError, match="files of dataset 'lost' are not there"):
        images_of_dataset("lost")
