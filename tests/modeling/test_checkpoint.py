import hashlib
import logging
import multiprocessing
import os
import pickle
import socket
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone import EfficientNet
from selftrain_d2.modeling.checkpoint import (
    SafeDetectionCheckpointer,
    check_input_statistics,
    file_sha256,
    load_weights,
)
from selftrain_d2.modeling.weight_conversion import convert_weights


class RunsCode:
    """Its pickle creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def make_detector(name="efficientnet-b0", classes=3, backbone="build_retinanet_efficientnet_fpn_backbone"):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.EFFICIENTNET.NAME = name
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RETINANET.NUM_CLASSES = classes
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def make_efficientnet(name="efficientnet-b0"):
    return EfficientNet(name=name, out_features=["res5"], norm=nn.BatchNorm2d)


@pytest.fixture(scope="module")
def backbone_state():
    torch.manual_seed(1)
    return make_efficientnet().state_dict()


@pytest.fixture(scope="module")
def detector():
    return make_detector()


def assert_same(model, state, prefix=""):
    for name, value in state.items():
        assert torch.equal(model.state_dict()[prefix + name], value), name


# ---- What can be read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"model": {f"backbone.bottom_up.{k}": v for k, v in s.items()}},
        lambda s: {"model": {**s, "_fc.weight": torch.zeros(3), "_bn1.bias": torch.zeros(40)}},
        lambda s: {"model": {k: v.numpy() for k, v in s.items()}, "__author__": "pickle"},
        lambda s: {"model_state": s, "epoch": 3},
    ],
)
def test_backbone_weights_of_many_layouts(wrap, backbone_state, detector, tmp_path):
    content = wrap(OrderedDict(backbone_state))
    suffix = {"__author__": ".pkl", "model_state": ".pyth"}
    path = tmp_path / f"weights{next((suffix[key] for key in content if key in suffix), '.pth')}"
    if path.suffix == ".pkl":
        content["model"] = {f"backbone.bottom_up.{k}": v for k, v in content["model"].items()}
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    for parameter in detector.backbone.parameters():
        nn.init.zeros_(parameter)
    report = load_weights(detector, str(path))
    assert_same(detector, backbone_state, "backbone.bottom_up.")
    assert {name.split(".")[0] for name in report.missing} == {"backbone", "head"}
    assert not report.unexpected
    assert len(report.matched) == len(backbone_state)


def test_whole_detector_weights_fill_a_bare_backbone(detector, tmp_path):
    torch.save({"model": detector.state_dict()}, tmp_path / "detector.pth")
    backbone = make_efficientnet()
    assert not load_weights(backbone, str(tmp_path / "detector.pth")).missing
    assert_same(detector, backbone.state_dict(), "backbone.bottom_up.")


def test_converted_files_also_work_in_plain_detectron2(backbone_state, detector, tmp_path):
    torch.save(backbone_state, tmp_path / "b0.pth")
    output = tmp_path / "converted.pth"
    convert_weights(tmp_path / "b0.pth", "efficientnet_pytorch", "efficientnet-b0", output)
    for parameter in detector.backbone.parameters():
        nn.init.zeros_(parameter)
    DetectionCheckpointer(detector).load(str(output))
    assert_same(detector, backbone_state, "backbone.bottom_up.")


def test_legacy_pickle_of_detectron2s_model_zoo(tmp_path):
    """Caffe2 names and numpy arrays, matched by detectron2's heuristics."""
    model = make_detector(backbone="build_retinanet_resnet_fpn_backbone")
    stem = np.random.default_rng(0).normal(size=(64, 3, 7, 7)).astype(np.float32)
    blobs = {"conv1_w": stem, "conv1_w_momentum": stem}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    with pytest.raises(InputError, match=r"fill only \d+ of the backbone's 265"):
        load_weights(model, str(tmp_path / "R-50.pkl"))
    assert np.array_equal(model.backbone.bottom_up.stem.conv1.weight.detach().numpy(), stem)


def test_safetensors(backbone_state, detector, tmp_path):
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in backbone_state.items()}, tmp_path / "b0.safetensors")
    assert load_weights(detector, str(tmp_path / "b0.safetensors")).matched
    assert_same(detector, backbone_state, "backbone.bottom_up.")


def test_training_resumes_with_all_its_states(tmp_path):
    def start():
        model = make_efficientnet()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        states = {"optimizer": optimizer, "scheduler": scheduler}
        return model, states, SafeDetectionCheckpointer(model, str(tmp_path), **states)

    model, states, checkpointer = start()
    model(torch.randn(2, 3, 32, 32))["res5"].sum().backward()
    states["optimizer"].step()
    states["scheduler"].step()
    checkpointer.save("model_0000001", iteration=1, hooks={"averages": [0.5, None]})

    other, others, checkpointer = start()
    extra = checkpointer.resume_or_load("", resume=True)
    assert (extra["iteration"], extra["hooks"]) == (1, {"averages": [0.5, None]})
    assert_same(other, model.state_dict())
    assert others["scheduler"].state_dict() == states["scheduler"].state_dict()
    momentum = [
        s.state_dict()["state"][0]["momentum_buffer"] for s in (states["optimizer"], others["optimizer"])
    ]
    assert torch.equal(*momentum)

    # Not resuming: weights alone, although there is a checkpoint in the folder.
    third, thirds, checkpointer = start()
    checkpointer.resume_or_load(str(tmp_path / "model_0000001.pth"), resume=False)
    assert_same(third, model.state_dict())
    assert not thirds["optimizer"].state_dict()["state"]


def test_no_weights_is_a_random_start(detector):
    assert SafeDetectionCheckpointer(detector).load("") == {}
    with pytest.raises(InputError, match=r"MODEL\.WEIGHTS is empty"):
        load_weights(detector, "")


def test_registered_path_prefixes_and_queries(backbone_state, detector, tmp_path, monkeypatch):
    torch.save(backbone_state, tmp_path / "b0.pth")
    monkeypatch.chdir(tmp_path)
    load_weights(detector, "b0.pth?matching_heuristics=True")
    assert_same(detector, backbone_state, "backbone.bottom_up.")
    with pytest.raises(InputError, match="cannot be fetched"):
        load_weights(detector, "catalog://no/such/model")


# ---- What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pth", "model.pkl", "model.pyth", "legacy.pth"])
def test_code_is_not_run(name, detector, tmp_path):
    target = tmp_path / "made"
    content = {"model": {"a": torch.zeros(1)}, "x": RunsCode(target)}
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=name != "legacy.pth")
    with pytest.raises(InputError, match="--allow-unsafe"):
        load_weights(detector, str(tmp_path / name))
    assert not target.exists()


def test_unsafe_files_are_read_when_allowed(detector, backbone_state, tmp_path):
    target = tmp_path / "made"
    torch.save({"model": backbone_state, "x": RunsCode(target)}, tmp_path / "a.pth")
    load_weights(detector, str(tmp_path / "a.pth"), allow_unsafe=True)
    assert target.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>" * 99])
def test_damaged_files(suffix, damage, detector, backbone_state, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in backbone_state.items()}, path)
    elif suffix == ".pkl":
        path.write_bytes(pickle.dumps({k: v.numpy() for k, v in backbone_state.items()}))
    else:
        torch.save(backbone_state, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"weights{suffix} is damaged"):
        load_weights(detector, str(path))


def test_a_checkpointer_can_load_again_after_a_failure(detector, backbone_state, tmp_path):
    torch.save(backbone_state, tmp_path / "good.pth")
    (tmp_path / "bad.pth").write_text("no")
    checkpointer = SafeDetectionCheckpointer(detector)
    with pytest.raises(InputError):
        checkpointer.load(str(tmp_path / "bad.pth"))
    checkpointer.load(str(tmp_path / "good.pth"))
    assert checkpointer.report.matched


@pytest.mark.parametrize("name", ["none.pth", "folder"])
def test_missing_files(name, detector, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=f"{name} do not exist"):
        load_weights(detector, str(tmp_path / name))


def test_interrupted_resume_names_the_missing_file(detector, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(InputError, match=r"model_0000009\.pth"):
        SafeDetectionCheckpointer(detector, str(tmp_path)).resume_or_load("", resume=True)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
@pytest.mark.parametrize("content", [{"a": 1}, [np.zeros(2)], np.zeros(2), {"model": {}}, {}])
def test_files_without_named_tensors(content, suffix, detector, tmp_path):
    path = tmp_path / f"a{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(torch.from_numpy(content) if isinstance(content, np.ndarray) else content, path)
    with pytest.raises(InputError, match=r"a file of model weights|damaged"):
        load_weights(detector, str(path))


def test_weights_that_fit_nothing(detector, tmp_path):
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="fit nothing in the model"):
        load_weights(detector, str(tmp_path / "a.pth"))


@pytest.mark.parametrize("name", ["efficientnet-b1", "efficientnet-b2", "efficientnet-lite0"])
def test_weights_of_another_backbone(name, detector, tmp_path):
    torch.save(make_efficientnet(name).state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"fill only \d+ of the backbone's 304 tensors .*_blocks"):
        load_weights(detector, str(tmp_path / "a.pth"))


def test_heads_alone_are_not_a_start(detector, tmp_path):
    heads = {k: v for k, v in detector.state_dict().items() if k.startswith("head.")}
    torch.save({"model": heads}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="fill only 0 of"):
        load_weights(detector, str(tmp_path / "a.pth"))


def test_other_classes_are_only_logged(detector, tmp_path, caplog):
    torch.save({"model": detector.state_dict()}, tmp_path / "a.pth")
    other = make_detector(classes=5)
    with caplog.at_level(logging.WARNING):
        report = load_weights(other, str(tmp_path / "a.pth"))
    assert [name for name, *_ in report.incorrect_shapes] == ["head.cls_score.weight", "head.cls_score.bias"]
    assert "head.cls_score.weight" in caplog.text
    assert_same(other, detector.backbone.state_dict(), "backbone.")


# ---- Input statistics -------------------------------------------------------------------------------


def test_input_statistics_are_compared_with_the_config(caplog):
    cfg = get_cfg()  # detectron2's default: BGR, std 1
    wanted = {"format": "RGB", "pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}
    with caplog.at_level(logging.WARNING):
        message = check_input_statistics(wanted, cfg)
    assert message in caplog.text
    # The warning's own words are the keys that end it.
    words = message.split("set ")[1].split(" (now")[0].replace(", ", ",").split()
    cfg.merge_from_list(words)
    assert check_input_statistics(wanted, cfg) is None
    assert check_input_statistics(None, cfg) is None
    assert check_input_statistics({"format": "RGB"}, cfg) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "BGR"),
        ("pixel_mean", [123.675, 116.28, 103.53]),
        ("pixel_std", [1.0, 1.0, 1.0]),
        ("pixel_std", [128.0]),
    ],
)
def test_each_statistic_counts(key, value):
    cfg = get_cfg()
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [127.5] * 3
    right = {"format": "RGB", "pixel_mean": [127.0] * 3, "pixel_std": [128.0] * 3}
    assert check_input_statistics(right, cfg) is None
    assert "INPUT.FORMAT" in check_input_statistics({**right, key: value}, cfg)


def test_converted_weights_bring_their_statistics(detector, backbone_state, tmp_path):
    torch.save(backbone_state, tmp_path / "b0.pth")
    convert_weights(tmp_path / "b0.pth", "efficientnet_pytorch", "efficientnet-b0", tmp_path / "out.pth")
    assert load_weights(detector, str(tmp_path / "out.pth")).input["format"] == "RGB"
    extra = SafeDetectionCheckpointer(detector).resume_or_load(str(tmp_path / "out.pth"), resume=False)
    assert extra["input"]["pixel_std"] == [58.395, 57.12, 57.375]


def test_file_sha256(tmp_path):
    content = bytes(range(256)) * 9000  # more than one read
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    with pytest.raises(InputError, match="cannot be read"):
        file_sha256(tmp_path / "b")


def _saved(folder, number):
    """So many checkpoints of a layer whose weight is the number of steps."""
    layer = nn.Linear(1, 1)
    checkpointer = SafeDetectionCheckpointer(layer, str(folder))
    for steps in range(1, number + 1):
        nn.init.constant_(layer.weight, steps)
        checkpointer.save(f"model_{steps - 1:07d}")
    return [folder / f"model_{step:07d}.pth" for step in range(number)]


def test_the_one_before_a_damaged_one_is_told_by_its_steps(tmp_path):
    """Not by a clock, which on another machine may go after."""
    files = _saved(tmp_path, 4)
    os.utime(files[0], (4e9, 4e9))
    os.truncate(files[2], 100)
    (tmp_path / "last_checkpoint").write_text(files[2].name)  # the last one is of a run that was gone back on
    layer = nn.Linear(1, 1)
    SafeDetectionCheckpointer(layer, str(tmp_path)).resume_or_load("")
    assert layer.weight.item() == 2


def _resume(rank, port, files):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    layer, folder = nn.Linear(1, 1), files[0].parent
    checkpointer = SafeDetectionCheckpointer(layer, str(folder))
    if rank == 1:  # a file server's client that still shows what was the last one before
        checkpointer.get_checkpoint_file = lambda: str(files[0])
    problem = ""
    try:
        checkpointer.resume_or_load("")
    except InputError as error:
        problem = str(error)
    (folder / f"{rank}.txt").write_text(problem or str(layer.weight.item()))
    torch.distributed.barrier()
    os._exit(0)  # as a process of its own would end, not as a part of pytest


@pytest.mark.parametrize("damaged", [False, True])
def test_all_processes_resume_from_the_checkpoint_that_the_main_one_takes(tmp_path, damaged):
    files = _saved(tmp_path, 2)
    if damaged:
        for file in files:
            os.truncate(file, 100)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_resume, args=(rank, port, files)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert said == ["2.0", "2.0"] if not damaged else all("No checkpoint in" in text for text in said)
