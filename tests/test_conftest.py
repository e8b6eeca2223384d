"""What a test leaves behind is gone before the next one."""

import logging
import os
import random

import cv2
import numpy as np
import torch
from conftest import process_as_it_was
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng

from selftrain_d2 import AUGMENTATION_REGISTRY
from selftrain_d2.engine.logs import log_to_console


def _state():
    return (
        [(n, g.propagate, g.level, list(g.handlers)) for n, g in _named_loggers().items()],
        (torch.get_num_threads(), cv2.getNumThreads()),
        (os.getcwd(), {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}),
        (set(DatasetCatalog.list()), [name for name, _ in AUGMENTATION_REGISTRY]),
        (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
    )


def _named_loggers():
    return {name: logging.getLogger(name) for name in ("selftrain_d2", "detectron2", "fvcore", "a.new.one")}


def test_everything_is_as_it_was(tmp_path):
    before = _state()
    with process_as_it_was():
        log_to_console()
        logging.getLogger("a.new.one").addHandler(logging.NullHandler())
        torch.set_num_threads(before[1][0] + 1)
        cv2.setNumThreads(1 if before[1][1] > 1 else 2)
        os.chdir(tmp_path)
        seed_all_rng(3)
        os.environ.pop("PATH")
        DatasetCatalog.register("left behind", list)
        MetadataCatalog.get("left behind").set(thing_classes=["a"])
        AUGMENTATION_REGISTRY._do_register("LeftBehind", lambda cfg, is_train: [])
        random.random(), np.random.rand(), torch.rand(1)
        assert all(one != other for one, other in zip(_state(), before))
    assert _state() == before
    assert "left behind" not in MetadataCatalog


def test_caplog_hears_a_package_whose_command_has_run(caplog):
    with process_as_it_was():
        log_to_console()
    with caplog.at_level("INFO", "selftrain_d2"):
        logging.getLogger("selftrain_d2.engine").info("heard")
    assert caplog.messages == ["heard"]
