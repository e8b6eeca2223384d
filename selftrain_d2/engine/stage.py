"""Which stage of the loop a run is: a teacher, a student of it, a student of that student, ..."""

from __future__ import annotations

import os
from typing import Any

import torch
from detectron2.config import CfgNode
from fvcore.common.checkpoint import Checkpointer
from torch import nn


def with_stage(cfg: CfgNode, resume: bool = False) -> CfgNode:
    """A config whose SELFTRAIN.STAGE is a number; the config itself where it is one already.

    -1 becomes one more than the stage of the run that MODEL.WEIGHTS come from, and at least 1 with pseudo labels. So a
    student and its control, which start from one teacher, are of one stage, and draw the same human images.

    Args:
        cfg: of a run.
        resume: a run that was begun in OUTPUT_DIR keeps its stage.
    """
    if cfg.SELFTRAIN.STAGE >= 0:
        return cfg
    stage = None
    checkpointer = Checkpointer(nn.Module(), cfg.OUTPUT_DIR)
    if resume and checkpointer.has_checkpoint():
        stage = stage_of_weights(checkpointer.get_checkpoint_file())
    if stage is None:
        before = stage_of_weights(cfg.MODEL.WEIGHTS)
        stage = 0 if before is None else before + 1
        stage = max(stage, 1 if cfg.DATASETS.PSEUDO_TRAIN else 0)
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.SELFTRAIN.STAGE = stage
    if frozen:
        cfg.freeze()
    return cfg


def stage_of_weights(path: str) -> int | None:
    """The stage that a checkpoint of training says it is from: 0 for those written before stages were; None for other
    files, and for what cannot be read, which is told when the weights are loaded."""
    if not os.path.isfile(path):
        return None
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # no tensor is read
        return int(content["stage"]["stage"]) if "stage" in content else 0 if "classes" in content else None
    except Exception:  # torch.load raises many kinds for a file that is not its own
        return None
