"""Several processes label one folder, and some of them die, hang or are slow: the labels are those of one process."""

import multiprocessing
import os
import signal
import socket
import time

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import comm

from selftrain_d2 import InputError, generate_pseudo_labels
from selftrain_d2.data.pseudo_labels import writer as pseudo_label_writer
from selftrain_d2.data.pseudo_labels.reader import verify_pseudo_labels
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.labeling import generate
from selftrain_d2.labeling.inference import Teacher

IMAGES, SHARD, PROCESSES = 24, 4, 3


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pseudo_label_writer, "SHARD_SIZE", SHARD)
    monkeypatch.setattr(generate, "_CHECKED_TOGETHER", 2)
    torch.set_num_threads(1)  # rounding depends on it


@pytest.fixture
def cfg(small_config, tmp_path):
    """A detector with random weights that finds something everywhere, and photos."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(IMAGES):
        pixels = rng.integers(0, 255, (48, 32 + 16 * (i % 2), 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "photos" / f"{i:03d}.png"), pixels)
    (tmp_path / "photos" / "007.png").write_bytes(b"no image")
    small_config.merge_from_list(["INPUT.AUGMENTATION.IMAGE_SIZE", 64, "TEST.DETECTIONS_PER_IMAGE", 5])
    small_config.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 20
    small_config.MODEL.WEIGHTS = str(tmp_path / "teacher.pth")
    small_config.SELFTRAIN.TAKE_OVER_SECONDS = 0.5
    torch.manual_seed(0)
    detector = build_model(small_config)
    torch.nn.init.normal_(detector.head.cls_score.weight, std=0.5)
    torch.nn.init.constant_(detector.head.cls_score.bias, -2.0)
    weights = {"model": detector.state_dict(), "classes": {"thing_classes": ["red", "green"]}}
    torch.save(weights, small_config.MODEL.WEIGHTS)
    return small_config


def _label(cfg, tmp_path, output):
    names = [f"{i:03d}.png" for i in range(IMAGES)]
    return generate_pseudo_labels(
        cfg, tmp_path / "photos", names, tmp_path / output, score_floor=0.001, batch_size=3
    )


def _content(folder):
    """Of all shards, and what the manifest says of them."""
    manifest = verify_pseudo_labels(folder)
    facts = ("listed", "labeled", "empty", "boxes", "skipped", "shards", "file_list_sha256")
    assert manifest["listed"] == IMAGES and len(manifest["skipped"]) == 1 and manifest["boxes"] > IMAGES
    files = {p.name: p.read_bytes() for p in (folder / "shards").iterdir()}
    return files, {key: manifest[key] for key in facts}


def _die(number):
    """This process is killed, or hangs, when it has labeled a shard and before the shard is written."""

    def write_shard(self, shard, rows):
        list(rows)
        os.kill(os.getpid(), number)

    PseudoLabelWriter.write_shard = write_shard


def _be_slow(seconds):
    call = Teacher.__call__

    def slowly(self, samples):
        time.sleep(seconds)
        return call(self, samples)

    Teacher.__call__ = slowly


def _run(rank, port, behaviour, cfg, tmp_path):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=PROCESSES, rank=rank)
    comm.synchronize()
    for collective in ("barrier", "all_gather", "all_gather_object", "all_reduce", "broadcast"):
        setattr(
            torch.distributed, collective, None
        )  # none is needed: there is nothing that could take too long
    check_shards = generate._check_shards

    def begin(*arguments):
        """All at once, so that each gets a shard."""
        (tmp_path / f"begun_{rank}").touch()
        while len(list(tmp_path.glob("begun_*"))) < PROCESSES:
            time.sleep(0.02)
        check_shards(*arguments)

    generate._check_shards = begin
    change, argument = behaviour.get(rank, (None, None))
    if change is not None:
        change(argument)
    _label(cfg, tmp_path, "together")
    os._exit(0)  # as a process of its own would end, not as a part of pytest


@pytest.fixture
def label_together(cfg, tmp_path):
    """``label_together({rank: (change, argument)})``: exit codes of the processes, None of those that hang."""
    context, processes = multiprocessing.get_context("fork"), []

    def run(behaviour):
        for file in tmp_path.glob("begun_*"):
            file.unlink()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = port, behaviour, cfg, tmp_path
        processes[:] = [context.Process(target=_run, args=(rank, *arguments)) for rank in range(PROCESSES)]
        for process in processes:
            process.start()
        end = time.monotonic() + 600
        while any(
            p.is_alive() and behaviour.get(r) != (_die, signal.SIGSTOP) for r, p in enumerate(processes)
        ):
            assert time.monotonic() < end
            time.sleep(0.02)
        return [process.exitcode for process in processes]

    yield run
    for process in processes:
        process.kill()
        process.join()


IDENTITY = {"thing_classes": ["red"], "score_floor": 0.1, "image_root": "/photos"}


def test_another_machine_sees_the_folder_a_little_later(tmp_path, monkeypatch):
    """A file server's client may say for half a minute that a file is not there which it did not find before."""
    looks = iter(range(1000))
    exists = os.path.exists
    monkeypatch.setattr(generate.os.path, "exists", lambda path: next(looks) >= 3 and exists(path))
    with PseudoLabelWriter(tmp_path / "labels", IDENTITY, ["a.jpg"]):
        helper = generate._join(tmp_path / "labels", IDENTITY, ["a.jpg"])
    assert helper.missing_shards() == [0] and next(looks) == 4


def test_machines_without_a_file_system_in_common(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "_SEEN_WITHIN_SECONDS", 0.2)
    with pytest.raises(
        InputError, match=r"labels has no manifest\.json here.*a folder that all machines share"
    ):
        generate._join(tmp_path / "labels", IDENTITY, ["a.jpg"])


def test_a_slow_one(cfg, tmp_path, label_together):
    _label(cfg, tmp_path, "alone")
    cfg.SELFTRAIN.TAKE_OVER_SECONDS = 60.0
    assert label_together({2: (_be_slow, 0.4)}) == [0, 0, 0]
    assert _content(tmp_path / "together") == _content(tmp_path / "alone")


@pytest.mark.parametrize(
    ("rank", "number"),
    [(1, signal.SIGKILL), (2, signal.SIGSTOP), (0, signal.SIGKILL)],
    ids=["killed", "hangs", "main"],
)
def test_others_finish_for_one_that(rank, number, cfg, tmp_path, label_together):
    """Of the main process also the store and the lock are gone."""
    _label(cfg, tmp_path, "alone")
    codes = label_together({rank: (_die, number)})
    assert codes.pop(rank) == (None if number == signal.SIGSTOP else -number)
    assert codes == [0, 0]
    assert _content(tmp_path / "together") == _content(tmp_path / "alone")


def test_a_damaged_folder_is_checked_and_made_whole_by_all(cfg, tmp_path, label_together, caplog):
    _label(cfg, tmp_path, "alone")
    assert label_together({}) == [0, 0, 0]
    shards = sorted((tmp_path / "together" / "shards").iterdir())
    shards[1].write_bytes(b"damaged")
    shards[4].write_bytes(b"damaged")
    shards[3].unlink()
    before = {
        path: path.stat().st_mtime_ns for path in shards if path not in (shards[1], shards[3], shards[4])
    }
    # The main process finds the folder to be checked by the others: each part is checked by one.
    assert label_together({0: (_be_slow, 0.2)}) == [0, 0, 0]
    assert _content(tmp_path / "together") == _content(tmp_path / "alone")
    assert before == {path: path.stat().st_mtime_ns for path in before}
