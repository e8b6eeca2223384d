import concurrent.futures
import gzip
import io
import multiprocessing
import os
import shutil
import tarfile
import tracemalloc

import cv2
import numpy as np
import pyarrow as pa
import pytest
from conftest import make_coco_set
from detectron2.utils.file_io import PathManager

from selftrain_d2 import InputError, SelfTrainingDatasetMapper
from selftrain_d2.data.image_sources import images_of_archives
from selftrain_d2.data.mapper import read_image
from selftrain_d2.data.tar_archive import TarIndex, tar_index


@pytest.fixture
def folder(tmp_path):
    return make_coco_set(tmp_path / "coco", 6, seed=3).images


def _pack(path, files, **options):
    """Make a tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def _numbered(first, last):
    """Images of one colour, which is their number, with WebDataset's companions."""
    for i in range(first, last):
        yield f"{i:04d}.png", cv2.imencode(".png", np.full((3, 4, 3), i, np.uint8))[1].tobytes()
        yield f"{i:04d}.json", b"{}"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_bytes_are_those_of_the_files(tmp_path, folder, form):
    with tarfile.open(tmp_path / "photos.tar", "w", format=form) as archive:
        archive.add(folder, "./photos of ü" + 30 * "/long")  # longer than the field of a tar header
    source = images_of_archives([str(tmp_path / "photos.tar")])
    assert source.image_root == f"tar://{tmp_path}" and len(source.file_names) == 6
    for name in source.file_names:
        with open(os.path.join(folder, os.path.basename(name)), "rb") as outside:
            expected = outside.read()
        with PathManager.open(os.path.join(source.image_root, name), "rb") as inside:
            assert inside.read() == expected


def test_the_mapper_reads_the_same_pixels(tmp_path, folder, small_config):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(folder, "photos")
    mapper = SelfTrainingDatasetMapper(small_config, is_train=False)
    for name in os.listdir(folder):
        inside = mapper({"file_name": f"tar://{tmp_path}/photos.tar/photos/{name}"})
        outside = mapper({"file_name": os.path.join(folder, name)})
        assert (inside["image"] == outside["image"]).all()
    with pytest.raises(InputError, match=r"has no image photos/lost\.png"):
        mapper({"file_name": f"tar://{tmp_path}/photos.tar/photos/lost.png"})


def test_shards_by_numbers_wildcards_and_name(tmp_path):
    for shard in range(11):
        _pack(tmp_path / "shards" / f"train-{shard:03d}.tar", _numbered(2 * shard, 2 * shard + 2))
    expected = [f"train-{i // 2:03d}.tar/{i:04d}.png" for i in range(22)]
    shards = tmp_path / "shards"
    root = f"tar://{shards}"
    assert images_of_archives([f"{shards}/train-{{000..010}}.tar"]) == (root, expected)
    assert images_of_archives([f"{shards}/train-*.tar"]) == (root, expected)
    some = images_of_archives([f"{shards}/train-007.tar", f"{shards}/train-{{001..002}}.tar"])
    assert some.file_names == expected[14:16] + expected[2:6]
    assert read_image(os.path.join(root, expected[13]), "BGR")[0, 0, 0] == 13
    _pack(tmp_path / "other.tar" / "more.tar", _numbered(30, 31))  # a folder that is named like an archive
    both = images_of_archives([f"{shards}/train-000.tar", f"{tmp_path}/other.tar/more.tar"])
    assert both == (
        f"tar://{tmp_path}",
        [f"shards/{name}" for name in expected[:2]] + ["other.tar/more.tar/0030.png"],
    )
    assert read_image(os.path.join(both.image_root, both.file_names[2]), "BGR")[0, 0, 0] == 30


def test_order_is_that_of_the_data(tmp_path):
    files = list(_numbered(0, 50))[::-1]
    names = images_of_archives([str(_pack(tmp_path / "a.tar", files))]).file_names
    assert names == [f"a.tar/{i:04d}.png" for i in range(49, -1, -1)]


def test_links_and_repeated_members(tmp_path):
    path = _pack(
        tmp_path / "a.tar", [("x/one.png", b"first"), ("x/one.png", b"second"), ("x/two.png", b"two")]
    )
    with tarfile.open(path, "a") as archive:
        for name, kind, target in (
            ("x/hard.png", tarfile.LNKTYPE, "x/one.png"),
            ("x/soft.png", tarfile.SYMTYPE, "../x/two.png"),
            ("x/gone.png", tarfile.SYMTYPE, "nowhere.png"),
            ("x/folder.png", tarfile.DIRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    index = tar_index(path)
    assert sorted(index.names()) == ["x/gone.png", "x/hard.png", "x/one.png", "x/soft.png", "x/two.png"]
    assert index.damage is None
    assert [index.read(f"x/{n}.png") for n in ("one", "hard", "soft")] == [b"second", b"second", b"two"]
    with pytest.raises(OSError, match="broken link"):
        index.read("x/gone.png")


@pytest.mark.parametrize("cut", ["in the data", "in a header", "before the end mark", "a broken header"])
def test_damaged_archives_give_what_comes_before_and_say_so(tmp_path, cut):
    path = _pack(tmp_path / "a.tar", [(f"{i}.png", bytes([i + 1]) * 1024) for i in range(4)])
    data = bytearray(path.read_bytes())
    member = 512 + 1024
    if cut == "a broken header":
        data[2 * member : 2 * member + 512] = b"?" * 512
    else:
        del data[{"in the data": 2 * member + 700, "in a header": 2 * member + 100}.get(cut, 4 * member) :]
    path.write_bytes(data)
    source = images_of_archives([str(path)])
    whole = 4 if cut == "before the end mark" else 2
    for i in range(whole):
        with PathManager.open(os.path.join(source.image_root, source.file_names[i]), "rb") as file:
            assert file.read() == bytes([i + 1]) * 1024
    rest = source.file_names[whole:]
    assert rest == (["a.tar/2.png", "a.tar"] if cut == "in the data" else ["a.tar"])
    for name in rest:
        with pytest.raises(OSError, match=r"cut short|cannot be read to its end"):
            PathManager.open(os.path.join(source.image_root, name), "rb")


def test_what_is_no_tar_is_refused_with_advice(tmp_path):
    path = _pack(tmp_path / "a.tar", _numbered(0, 2))
    with open(path, "rb") as plain, gzip.open(tmp_path / "b.tar.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    shutil.copy(path, tmp_path / "no_ending")
    (tmp_path / "text.tar").write_text("no tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    _pack(tmp_path / "texts.tar", [("a.txt", b"x")])
    for names, message in (
        (["b.tar.gz"], "compressed.*unpack it with gunzip"),
        (["no_ending"], r"rename it to \*\.tar"),
        (["text.tar"], "not a tar file"),
        (["empty.tar"], "not a tar file"),
        (["lost.tar"], "lost.tar cannot be opened: No such file"),
        (["a-{00..01}.tar"], "a-00.tar cannot be opened"),
        (["z*.tar"], "No archive matches"),
        (["a-{3..1}.tar"], "No archive matches.*go down"),
        (["a.tar", "./a.tar"], "twice"),
        (["texts.tar"], "hold no image"),
    ):
        with pytest.raises(InputError, match=message):
            images_of_archives([str(tmp_path / name) for name in names])


def test_a_rewritten_archive_is_read_anew(tmp_path):
    path = _pack(tmp_path / "a.tar", [("x.png", b"old"), ("y.png", b"y")])
    assert tar_index(path) is tar_index(str(path)) and tar_index(path).read("x.png") == b"old"
    _pack(path, [("w.png", bytes(5000)), ("x.png", b"new")])
    assert tar_index(path).read("x.png") == b"new"


def _read_all(path):
    return [read_image(f"tar://{path}/{i:04d}.png", "L")[0, 0, 0] for i in range(100)]


def test_threads_and_forked_processes_read_at_once(tmp_path):
    path = _pack(tmp_path / "a.tar", _numbered(0, 100))
    assert _read_all(path) == list(range(100))
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(_read_all, [path] * 8)) == [list(range(100))] * 8
    with multiprocessing.get_context("fork").Pool(2) as processes:
        assert processes.map(_read_all, [path] * 4) == [list(range(100))] * 4


def test_names_of_other_encodings(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        member = tarfile.TarInfo("caf\u00e9.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    assert TarIndex(str(tmp_path / "a.tar")).names() == [r"caf\udce9.png"]
    with PathManager.open(rf"tar://{tmp_path}/a.tar/caf\udce9.png", "rb") as file:
        assert file.read() == b"abc"


def test_the_index_is_small(tmp_path):
    """Names of 28 letters; a dict of names and pairs would have 300 bytes each."""
    number = 5000
    path = _pack(tmp_path / "a.tar", ((f"{i:024d}.jpg", b"") for i in range(number)))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes()
    index = TarIndex(str(path))
    used = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert index.read(f"{number - 1:024d}.jpg") == b""
    assert 40 * number < used < 80 * number
