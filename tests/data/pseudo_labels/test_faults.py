"""What goes wrong while pseudo labels are written: kills, damage, a full disk, a second writer."""

import errno
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selftrain_d2 import InputError, load_pseudo_labels
from selftrain_d2.data.pseudo_labels import writer as pseudo_label_writer
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.pseudo_labels.reader import verify_pseudo_labels
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter

IDENTITY = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": "/photos"}
NAMES = [f"{i:02d}.jpg" for i in range(22)]
SHARDS = 6


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pseudo_label_writer, "SHARD_SIZE", 4)


def _row(name):
    """Image i has i % 5 boxes; every seventh cannot be read."""
    i = int(name[:2])
    if i % 7 == 3:
        return make_row(name, skipped="OSError: broken")
    rng = np.random.default_rng(i)
    boxes = rng.uniform(0, 50, (i % 5, 4))
    return make_row(name, 100, 120, boxes, rng.uniform(0.05, 1, i % 5), rng.integers(0, 2, i % 5))


def _write_missing(writer):
    missing = writer.missing_shards()
    for shard in missing:
        writer.write_shard(shard, [_row(NAMES[i]) for i in writer.shard_range(shard)])
    return missing


def _label(folder):
    """What a labeling command does; returns the shards that it made."""
    with PseudoLabelWriter(folder, IDENTITY, NAMES) as writer:
        made = _write_missing(writer)
        if made or not writer.finished:
            writer.finish()
        return made


def _shards(folder):
    return sorted((folder / "shards").iterdir())


@pytest.fixture
def undisturbed(tmp_path):
    assert _label(tmp_path / "undisturbed") == list(range(SHARDS))
    return tmp_path / "undisturbed"


def _content(folder):
    return {
        p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


# ---- damage -----------------------------------------------------------------------------------------


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(shard=st.integers(0, SHARDS - 1), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_bit_of_a_shard(undisturbed, shard, place, bit):
    """Found at load, by verification, and on resuming, which makes that shard alone again."""
    before = _content(undisturbed)
    file = _shards(undisturbed)[shard]
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    file.write_bytes(content)
    for check in (verify_pseudo_labels, load_pseudo_labels):
        with pytest.raises(InputError, match=f"{file.name} is damaged.*run the command .* again"):
            check(undisturbed)
    assert _label(undisturbed) == [shard]
    assert _content(undisturbed) == before
    verify_pseudo_labels(undisturbed)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_shard_cut_short(undisturbed, length, caplog):
    before = _content(undisturbed)
    file = _shards(undisturbed)[2]
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match="is damaged"):
        load_pseudo_labels(undisturbed)
    assert _label(undisturbed) == [2]
    assert f"{file} is damaged: it is removed and made again" in caplog.text
    assert _content(undisturbed) == before


def test_a_shard_that_is_gone(undisturbed):
    before = _content(undisturbed)
    _shards(undisturbed)[4].unlink()
    for check in (verify_pseudo_labels, load_pseudo_labels):
        with pytest.raises(InputError, match=r"No such file.*run the command"):
            check(undisturbed)
    assert _label(undisturbed) == [4]
    assert _content(undisturbed) == before


def test_damage_to_an_unfinished_folder(tmp_path, undisturbed):
    """No manifest has the checksums yet: the name of the shard does."""
    with PseudoLabelWriter(tmp_path / "stopped", IDENTITY, NAMES) as writer:
        for shard in (0, 1, 2):
            writer.write_shard(shard, [_row(NAMES[i]) for i in writer.shard_range(shard)])
    file = _shards(tmp_path / "stopped")[1]
    file.write_bytes(file.read_bytes()[:-3])
    assert _label(tmp_path / "stopped") == [1, 3, 4, 5]
    assert _content(tmp_path / "stopped") == _content(undisturbed)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_a_shard_that_cannot_be_read_is_no_damaged_one(undisturbed, code, monkeypatch):
    """A file server that is away, or missing rights: nothing is removed, and the manifest stays as it is."""
    before = _content(undisturbed)
    read_bytes, away = Path.read_bytes, _shards(undisturbed)[2]

    def read(path):
        if path == away:
            raise OSError(code, os.strerror(code), str(path))
        return read_bytes(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", read)
        with pytest.raises(InputError, match=f"{away.name} cannot be read \\({os.strerror(code)}\\)"):
            _label(undisturbed)
    assert _content(undisturbed) == before


def test_a_shard_that_another_process_removed_is_nobodys_damage(undisturbed, caplog):
    """It was found damaged by two processes, of which one is late: by then the folder is finished again."""
    before = _content(undisturbed)
    late = PseudoLabelWriter(undisturbed, IDENTITY, NAMES, exclusive=False)
    late.check_shards([(2, undisturbed / "shards" / f"shard-000002-{'0' * 64}.parquet"), *late.shards()[2:3]])
    assert _content(undisturbed) == before and late.finished and not caplog.records


def test_a_shard_made_twice_counts_once(tmp_path, undisturbed):
    """As by a process that outlived its run, with other scores (another GPU)."""
    with PseudoLabelWriter(tmp_path / "twice", IDENTITY, NAMES) as writer:
        _write_missing(writer)
        other = [_row(NAMES[i]) for i in writer.shard_range(1)]
        other[0]["scores"] = other[0]["scores"] * np.float32(0.999)
        writer.write_shard(1, other)
    assert len(_shards(tmp_path / "twice")) == SHARDS + 1
    assert _label(tmp_path / "twice") == []
    assert verify_pseudo_labels(tmp_path / "twice")["listed"] == len(NAMES)
    assert len(_shards(tmp_path / "twice")) == SHARDS


def test_a_manifest_that_says_otherwise(undisturbed):
    manifest = undisturbed / "manifest.json"
    boxes = read_manifest(undisturbed)["boxes"]
    manifest.write_text(manifest.read_text().replace(f'"boxes": {boxes}', f'"boxes": {boxes + 1}'))
    with pytest.raises(InputError, match="its 'boxes' is not what the shards hold"):
        verify_pseudo_labels(undisturbed)


def test_every_listed_image_is_accounted_for(undisturbed):
    manifest = verify_pseudo_labels(undisturbed)
    rows = [_row(name) for name in NAMES]
    assert manifest["skipped"] == {r["file_name"]: r["skipped"] for r in rows if r["skipped"]}
    assert manifest["boxes"] == sum(len(r["scores"]) for r in rows)
    assert manifest["labeled"] == sum(len(r["scores"]) > 0 for r in rows)
    assert manifest["empty"] == sum(len(r["scores"]) == 0 and not r["skipped"] for r in rows)
    assert manifest["shards"] == {file.name: file.stat().st_size for file in _shards(undisturbed)}


def test_not_finished_without_all_shards(tmp_path):
    with PseudoLabelWriter(tmp_path, IDENTITY, NAMES) as writer:
        writer.write_shard(1, [_row(NAMES[i]) for i in writer.shard_range(1)])
        with pytest.raises(ValueError, match=r"without its shards \[0, 2, 3, 4, 5\]"):
            writer.finish()
    with pytest.raises(InputError, match="not finished"):
        load_pseudo_labels(tmp_path)


def test_a_folder_of_another_version(undisturbed):
    manifest = undisturbed / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(InputError, match="another version"):
        load_pseudo_labels(undisturbed)
    with pytest.raises(InputError, match="another format: 1 there, 2 now"):
        _label(undisturbed)


# ---- rows that cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, error, message",
    [
        ({"scores": [0.5]}, ValueError, "columns of a.jpg do not match"),
        ({"masks": ["x"]}, ValueError, "do not match"),
        ({"skipped": "broken"}, ValueError, "do not match"),
        ({"category_ids": [0, 2]}, InputError, "class id 2, but there are 2 class names"),
        ({"category_ids": [-1, 1]}, InputError, "class id -1"),
    ],
)
def test_rows_that_cannot_be(tmp_path, row, error, message):
    whole = {"boxes": np.ones((2, 4)), "scores": [0.5, 0.6], "category_ids": [0, 1]}
    with PseudoLabelWriter(tmp_path, IDENTITY, ["a.jpg"]) as writer:
        with pytest.raises(error, match=message):
            writer.write_shard(0, [make_row("a.jpg", 9, 9, **{**whole, **row})])
        assert writer.missing_shards() == [0]


def test_a_name_that_is_not_utf8(tmp_path):
    with pytest.raises(InputError, match="is not UTF-8: rename"):
        PseudoLabelWriter(tmp_path / "labels", IDENTITY, [os.fsdecode(b"\xff.jpg")])
    assert not (tmp_path / "labels").exists()


# ---- writers ----------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_until_the_first_has_finished(tmp_path):
    with PseudoLabelWriter(tmp_path, IDENTITY, NAMES) as writer:
        with pytest.raises(InputError, match=f"being written by process {os.getpid()} on host"):
            PseudoLabelWriter(tmp_path, IDENTITY, NAMES)
        # The other processes of the same run.
        helper = PseudoLabelWriter(tmp_path, IDENTITY, NAMES, exclusive=False)
        helper.write_shard(0, [_row(NAMES[i]) for i in helper.shard_range(0)])
        assert writer.missing_shards() == helper.missing_shards() == [1, 2, 3, 4, 5]
        _write_missing(writer)
        writer.finish()
        assert _label(tmp_path) == []  # finished, so it is free


def _slowly(folder, start):
    start.wait()
    with PseudoLabelWriter(folder, IDENTITY, NAMES) as writer:
        for shard in writer.missing_shards():
            time.sleep(0.01)
            writer.write_shard(shard, [_row(NAMES[i]) for i in writer.shard_range(shard)])
        writer.finish()


def _start(folder, start):
    process = multiprocessing.get_context("fork").Process(target=_slowly, args=(folder, start))
    process.start()
    return process


def test_two_processes_at_once(tmp_path, undisturbed):
    """One writes, the other is refused or comes after it; never both."""
    start = multiprocessing.get_context("fork").Event()
    processes = [_start(tmp_path / "labels", start) for _ in range(2)]
    start.set()
    for process in processes:
        process.join(60)
    assert sorted(process.exitcode for process in processes) in ([0, 0], [0, 1])
    assert _content(tmp_path / "labels") == _content(undisturbed)


def test_killed_at_twenty_random_moments(tmp_path, undisturbed):
    moments = random.Random(0)
    for number in range(20):
        start = multiprocessing.get_context("fork").Event()
        process = _start(tmp_path / str(number), start)
        start.set()
        time.sleep(moments.uniform(0, 0.12))
        process.kill()
        process.join()
        _label(tmp_path / str(number))
        assert _content(tmp_path / str(number)) == _content(undisturbed)


@pytest.mark.parametrize("stop_at", range(18))
def test_killed_at_each_step_of_a_file(tmp_path, undisturbed, stop_at, monkeypatch):
    """As if the process ended, without a chance to clean up, at every step that leaves a trace on the disk."""

    class Killed(BaseException):
        pass

    steps = iter(range(1000))

    def then_perhaps_killed(function):
        def step(*arguments, **options):
            result = function(*arguments, **options)
            if next(steps) == stop_at:
                # The dead do not tidy up.
                monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
                raise Killed
            return result

        return step

    with monkeypatch.context() as patched:
        monkeypatch = patched
        for owner, name in (
            (Path, "mkdir"), (Path, "write_text"), (Path, "write_bytes"), (os, "replace"),
        ):  # fmt: skip
            patched.setattr(owner, name, then_perhaps_killed(getattr(owner, name)))
        with pytest.raises(Killed):
            _label(tmp_path / "labels")
    _label(tmp_path / "labels")
    assert _content(tmp_path / "labels") == _content(undisturbed)


# ---- full disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", range(SHARDS + 2))
def test_a_full_disk_stops_cleanly_and_the_same_command_goes_on(tmp_path, undisturbed, fails, monkeypatch):
    """The disk fills at each file in turn: the first manifest, the shards, the last manifest."""
    files = iter(range(1000))

    def full(function):
        def write(self, content, **options):
            if next(files) == fails:
                function(self, content[: len(content) // 2], **options)
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(self, content, **options)

        return write

    with monkeypatch.context() as patched:
        for name in ("write_bytes", "write_text"):
            patched.setattr(Path, name, full(getattr(Path, name)))
        with pytest.raises(InputError, match=r"No space left on device.*make room.*same command again"):
            _label(tmp_path / "labels")
    assert not [p for p in (tmp_path / "labels").rglob(".*") if p.name != ".lock"]
    _label(tmp_path / "labels")
    assert _content(tmp_path / "labels") == _content(undisturbed)


def test_a_limit_of_the_system(tmp_path, undisturbed):
    """The real thing: the kernel refuses to write more than so many bytes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match=r"shard-000000.*File too large.*make room"):
            _label(tmp_path / "labels")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "labels" / "shards").iterdir()) == []
    _label(tmp_path / "labels")
    assert _content(tmp_path / "labels") == _content(undisturbed)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root can mount")
def test_a_disk_of_a_few_pages(tmp_path, undisturbed):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this system does not allow to mount")
    try:
        with pytest.raises(InputError, match=r"No space left on device.*make room"):
            _label(disk / "labels")
        assert not [p for p in disk.rglob(".*") if p.name != ".lock"]
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        assert 0 < len(_label(disk / "labels")) < SHARDS
        assert _content(disk / "labels") == _content(undisturbed)
    finally:
        subprocess.run(["umount", disk], check=True)
