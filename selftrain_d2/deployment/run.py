"""A run's config and weights."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.errors import InputError

#: Weights of a run below its folder, the averaged ones first.
WEIGHTS = (os.path.join("weight_average", "model_final.pth"), "model_final.pth")


def run_config(folder: str | os.PathLike, allow_unsafe: bool = False) -> CfgNode:
    """The config of a finished run, with its final weights as MODEL.WEIGHTS.

    Raises:
        InputError: there is no config.yaml or no final checkpoint.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} is no folder of a run: it has no config.yaml.")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise InputError(f"The run in {folder} has no model_final.pth: let its training end first.")
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.merge_from_file(str(folder / "config.yaml"), allow_unsafe=allow_unsafe)
    cfg.MODEL.WEIGHTS = str(weights)
    return cfg
