import io
import json
import os
import re
import shutil
import sys
import tarfile

import fsspec
import numpy as np
import pytest
from conftest import assert_refused, make_coco_set
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from selftrain_d2 import InputError, SelfTrainingDatasetMapper, load_pseudo_labels, storage
from selftrain_d2.data.coco_file import read_coco
from selftrain_d2.data.datasets import read_human_coco
from selftrain_d2.data.image_files import read_image, read_image_size
from selftrain_d2.data.image_sources import (
    images_of_archives,
    images_of_coco_json,
    images_of_folder,
    images_of_list,
)
from selftrain_d2.data.pseudo_labels.reader import verify_pseudo_labels
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.data.unlabeled_images import collect_images, without_known
from selftrain_d2.object_storage import FsspecPathHandler

NAMES = ["001.png", "002.png", "003.png"]


class Bucket(PathHandler):
    """A project's own handler: objects in a dictionary, and each read of one written down as (name, from, to)."""

    def __init__(self):
        super().__init__()
        self.objects, self.reads = {}, []

    def _get_supported_prefixes(self):
        return ["bucket://"]

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        if path not in self.objects:
            raise FileNotFoundError(path)
        return io.BufferedReader(_Raw(path, self.objects[path], self.reads))

    def _isfile(self, path, **kwargs):
        return path in self.objects

    def _isdir(self, path, **kwargs):
        return any(name.startswith(os.path.join(path, "")) for name in self.objects)

    def _ls(self, path, **kwargs):
        inside = os.path.join(path, "")
        return {name[len(inside) :].split("/")[0] for name in self.objects if name.startswith(inside)}


class _Raw(io.RawIOBase):
    def __init__(self, path, content, reads):
        self.path, self.content, self.reads = path, io.BytesIO(content), reads

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, *place):
        return self.content.seek(*place)

    def readinto(self, buffer):
        start = self.content.tell()
        size = self.content.readinto(memoryview(buffer)[:1000])  # less than is asked for, as raw streams may
        self.reads.append((self.path, start, start + size))
        return size


@pytest.fixture
def bucket():
    handler = Bucket()
    PathManager.register_handler(handler)
    yield handler
    del PathManager._path_handlers["bucket://"]


@pytest.fixture(params=["bucket", "fsspec"])
def put(request, bucket):
    """``put(folder, name)`` copies a folder to object storage and gives its address."""
    memory = fsspec.filesystem("memory")

    def copy(folder, name):
        address = f"bucket://{name}" if request.param == "bucket" else f"memory://{name}"
        for path in filter(os.path.isfile, folder.rglob("*")):
            place = f"{address}/{path.relative_to(folder).as_posix()}"
            if request.param == "bucket":
                bucket.objects[place] = path.read_bytes()
            else:
                memory.pipe_file(place, path.read_bytes())
        return address

    yield copy
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture
def photos(tmp_path):
    """A folder with images (one deeper down, one file that is none), a list, COCO JSON and an archive."""
    coco = make_coco_set(tmp_path / "photos", 3, seed=4)
    folder = tmp_path / "photos"
    (folder / "images" / "deep.v2").mkdir()
    shutil.copy(f"{coco.images}/001.png", folder / "images" / "deep.v2" / "more.PNG")
    (folder / "images" / "notes.txt").write_text("no image")
    (folder / "list.txt").write_text("# some\nimages/002.png\nimages/../images/001.png\n")
    for shard, names in enumerate([NAMES[:2], NAMES[2:]]):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as archive:
            for name in names:
                archive.add(f"{coco.images}/{name}", f"in/{name}")
    return folder


def _sources(place):
    yield images_of_folder(f"{place}/images")
    yield images_of_list(f"{place}/list.txt")
    yield images_of_list(f"{place}/list.txt", f"{place}")
    yield images_of_coco_json(f"{place}/labels.json", f"{place}/images")
    yield images_of_archives([f"{place}/shard-{{0..1}}.tar"])
    yield images_of_archives([f"{place}/shard-*.tar"])


def _pixels(source):
    return [read_image(os.path.join(source.image_root, name), "BGR") for name in source.file_names]


def test_every_source_is_the_same_at_an_address(photos, put):
    address = put(photos, "there/photos")
    for local, remote in zip(_sources(photos), _sources(address)):
        assert remote.image_root == local.image_root.replace(str(photos), address)
        assert remote.file_names == local.file_names and len(local.file_names) > 1
        assert all((a == b).all() for a, b in zip(_pixels(local), _pixels(remote)))
    assert read_image_size(f"{address}/images/001.png") == (96, 96)


def test_only_the_bytes_of_a_member_are_read(photos, bucket):
    with tarfile.open(photos / "shard-0.tar") as archive:
        member = archive.getmember("in/002.png")
    archive = "bucket://shards/a.tar"
    bucket.objects[archive] = (photos / "shard-0.tar").read_bytes()
    source = images_of_archives([archive])
    assert source.image_root == "tar://bucket://shards"
    del bucket.reads[:]
    with PathManager.open("tar://bucket://shards/a.tar/in/002.png", "rb") as file:
        assert file.read() == (photos / "images" / "002.png").read_bytes()
    starts, ends = zip(*(read[1:] for read in bucket.reads))
    assert (min(starts), max(ends)) == (member.offset_data, member.offset_data + member.size)
    assert sum(ends) - sum(starts) == member.size


def test_fsspec_is_asked_for_the_bytes_alone_and_for_a_size_only_where_it_matters(monkeypatch):
    memory = fsspec.filesystem("memory")
    content = np.random.default_rng(0).bytes(3 << 20)
    memory.pipe_file("memory://some/object", content)
    asked = []
    cat_file, info = type(memory).cat_file, type(memory).info

    def seen(self, path, start=None, end=None):
        asked.append((start, end))
        return cat_file(self, path, start, end)

    monkeypatch.setattr(type(memory), "cat_file", seen)
    monkeypatch.setattr(type(memory), "info", lambda s, p, **k: asked.append("info") or info(s, p, **k))
    address = "memory://some/object"
    assert storage.read_bytes(address) == content
    assert asked == [(None, None)]
    del asked[:]
    assert storage.read_range(address, 1000, 50) == content[1000:1050]
    assert asked == [(1000, 1050)]
    del asked[:]
    assert storage.size_of(address) == len(content)
    assert asked == ["info"]
    assert storage.read_range(address, len(content) - 5, 50) == content[-5:]
    assert storage.read_range(address, len(content) + 5, 50) == b""
    with storage.open_file(address) as file:  # read in blocks, to the end, and from there
        assert file.read(7) == content[:7] and file.seek(-9, os.SEEK_END) == len(content) - 9
        assert file.read() == content[-9:] and file.read(4) == b""
        assert file.seek(2 << 20) and b"".join(iter(lambda: file.read(1 << 18), b"")) == content[2 << 20 :]
    memory.rm("/some", recursive=True)


def test_objects_that_are_refused_past_their_end(monkeypatch):
    """Amazon answers a range that begins at the end with an error."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("memory://some/object", b"0123456789")

    def strict(self, path, start=None, end=None):
        content = bytes(self.store["/some/object"].getbuffer())
        if (start or 0) >= len(content):
            raise RuntimeError("InvalidRange")
        return content[start:end]

    monkeypatch.setattr(type(memory), "cat_file", strict)
    with FsspecPathHandler("memory://")._open("memory://some/object", "rb", buffering=5) as file:
        assert b"".join(iter(lambda: file.read(5), b"")) == b"0123456789"
    memory.rm("/some", recursive=True)


def test_local_and_remote_places_together(photos, put, tmp_path):
    address = put(photos, "there")
    shutil.copytree(photos / "images", tmp_path / "here")
    both = collect_images([str(tmp_path / "here"), f"{address}/images", f"{address}/shard-1.tar"])
    assert both.image_root == "tar://" and len(both.file_names) == 4 + 4 + 1
    assert len(_pixels(both)) == 9
    two = collect_images([str(tmp_path / "here" / "001.png"), f"{address}/images/001.png"])
    assert two.image_root == "" and len(_pixels(two)) == 2
    one = collect_images([f"{address}/images", f"{address}/list.txt"])
    assert one.image_root == address and len(one.file_names) == 4  # the list names two of these again
    assert storage.absolute_root(two.image_root) == ""


def test_a_list_of_addresses(photos, put, tmp_path):
    address = put(photos, "there")
    (tmp_path / "list.txt").write_text(f"{address}/images/001.png\n{address}/images/deep.v2/more.PNG\n")
    source = images_of_list(tmp_path / "list.txt")
    assert source == (f"{address}/images", ["001.png", "deep.v2/more.PNG"])
    (tmp_path / "list.txt").write_text(f"{address}/images/001.png\nphotos/images/002.png\n")
    mixed = images_of_list(tmp_path / "list.txt")
    assert mixed == ("", [f"{address}/images/001.png", f"{photos}/images/002.png"])
    assert len(_pixels(mixed)) == 2


def test_known_images_are_left_out_by_address_and_by_bytes(photos, put):
    address = put(photos, "there")
    source = collect_images([f"{address}/images"])
    left = without_known(source, {"labeled": [f"{address}/images/002.png"]})
    assert left.file_names == ["001.png", "003.png", "deep.v2/more.PNG"]
    # more.PNG is a copy of 001.png; both handlers tell sizes.
    local = [str(photos / "images" / "001.png")]
    assert without_known(source, {"labeled": local}).file_names == ["002.png", "003.png"]
    archive = collect_images([f"{address}/shard-0.tar"])
    assert without_known(archive, {"labeled": local}).file_names == ["shard-0.tar/in/002.png"]


def test_human_labels(photos, put, small_config):
    address = put(photos, "there")
    local = read_human_coco(photos / "labels.json", photos / "images")
    remote = read_human_coco(f"{address}/labels.json", f"{address}/images")
    assert remote.content == local.content
    mapper = SelfTrainingDatasetMapper(small_config, is_train=False)
    one, other = (mapper({"file_name": f"{root}/images/001.png"}) for root in (photos, address))
    assert (one["image"] == other["image"]).all()
    with pytest.raises(InputError, match=r"names 3 images that are not in .*://there, e\.g\. 001\.png"):
        read_human_coco(f"{address}/labels.json", address)


def test_pseudo_labels_are_read_at_an_address(tmp_path, put):
    identity = {"thing_classes": ["a"], "score_floor": 0.05, "image_root": "memory://photos"}
    names = [f"{i}.jpg" for i in range(3)]
    with PseudoLabelWriter(tmp_path / "labels", identity, names) as writer:
        writer.write_shard(0, [make_row(n, 9, 9, [[0, 0, 5, 5]], [0.9], [0]) for n in names])
        manifest = writer.finish()
    address = put(tmp_path / "labels", "made/labels")
    assert verify_pseudo_labels(address) == manifest
    labels = load_pseudo_labels(address, 0.5)
    assert labels == load_pseudo_labels(tmp_path / "labels", 0.5)
    assert labels[2]["file_name"] == "memory://photos/2.jpg"
    shard = next((tmp_path / "labels" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    put(tmp_path / "labels", "made/labels")
    with pytest.raises(InputError, match=rf"{address}/shards/{shard.name} is damaged"):
        load_pseudo_labels(address, 0.5)


def test_what_is_missing_is_told_as_of_a_file(photos, put, tmp_path):
    address = put(photos, "there")
    for read in (
        lambda root: images_of_folder(f"{root}/lost"),
        lambda root: images_of_list(f"{root}/lost.txt"),
        lambda root: images_of_archives([f"{root}/lost.tar"]),
        lambda root: read_coco(f"{root}/lost.json"),
        lambda root: collect_images([f"{root}/lost"]),
        lambda root: load_pseudo_labels(f"{root}/lost", 0.5),
    ):
        sentences = []
        for root in (str(photos), address):
            with pytest.raises(InputError) as told:
                read(root)
            sentences.append(str(told.value).replace(root, "ROOT"))
        # A project's handler may say less.
        assert sentences[0].partition("opened")[0] == sentences[1].partition("opened")[0]
    for root in (photos, address):
        with pytest.raises(FileNotFoundError):
            read_image(f"{root}/lost.png", "RGB")


def test_what_cannot_be_reached_is_one_sentence(monkeypatch):
    def unplugged(*args, **kwargs):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", unplugged)
    with pytest.raises(InputError, match=r"memory://a cannot be reached \(RuntimeError: no credentials\)"):
        images_of_folder("memory://a")


def test_without_fsspec(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(OSError, match=re.escape("s3:// needs fsspec: pip install 'selftrain_d2[storage]'")):
        storage.read_bytes("s3://bucket/a.png")


def test_a_handler_that_only_opens(photos):
    """As detectron2's for https:// does."""

    class Plain(PathHandler):
        def _get_supported_prefixes(self):
            return ["plain://"]

        def _open(self, path, mode="r", buffering=-1, **kwargs):
            assert buffering == -1
            return open(photos / path[len("plain://") :], "rb")

    PathManager.register_handler(Plain())
    try:
        assert len(read_coco("plain://labels.json").content["images"]) == 3
        assert collect_images(["plain://shard-1.tar"]).file_names == ["shard-1.tar/in/003.png"]
        assert collect_images(["plain://list.txt"]) == (
            "plain://",
            ["images/002.png", "images/001.png"],
        )
        with pytest.raises(InputError, match=r"COCO JSON plain://lost\.json cannot be read \(No such file"):
            read_coco("plain://lost.json")
    finally:
        del PathManager._path_handlers["plain://"]


def test_file_addresses_are_refused(tmp_path):
    with pytest.raises(InputError, match=f"give it without file://, as {tmp_path}"):
        images_of_folder(f"file://{tmp_path}")


def test_nothing_is_written_to_an_address(tmp_path, capsys):
    with pytest.raises(InputError, match="The output folder s3://a/labels is an address"):
        PseudoLabelWriter("s3://a/labels", {}, [])
    (tmp_path / "a.json").write_text(json.dumps({}))
    assert_refused(
        ["splits", str(tmp_path / "a.json"), "--fractions", "50", "--output", "s3://a/b"],
        capsys,
        "is an address: locks",
    )
    command = ["train", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml", "OUTPUT_DIR", "gs://a/b"]
    assert_refused(command, capsys, "OUTPUT_DIR gs://a/b is an address")


@pytest.mark.parametrize(
    ("folders", "shared"),
    [
        (["s3://a/b/c", "s3://a/b/d"], "s3://a/b"),
        (["s3://a/b", "s3://a/bc"], "s3://a"),
        (["s3://a/b", "s3://c/b"], ""),
        (["s3://a", "gs://a"], ""),
        (["s3://a", "/a"], ""),
        (["memory:///a/b", "memory:///a"], "memory:///a"),
        (["/a/b", "/a/c"], "/a"),
    ],
)
def test_common_folder(folders, shared):
    assert storage.common_folder(folders) == shared


def test_parts_of_addresses():
    assert storage.folder_of("mem://list.txt") == "mem://"
    assert storage.folder_of("s3://a/b/list.txt") == "s3://a/b"
    assert storage.normalized("s3://a/./b/../c.jpg") == "s3://a/c.jpg"
    assert storage.normalized("tar://s3://a//b.tar/c.jpg") == "tar://s3://a/b.tar/c.jpg"
    assert storage.below("s3://ab/c", "s3://a") == "s3://ab/c"
