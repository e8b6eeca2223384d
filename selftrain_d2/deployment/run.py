"""A run's config and weights."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint import run_weights


def run_config(folder: str | os.PathLike, allow_unsafe: bool = False) -> CfgNode:
    """The config of a finished run, with the weights that it is used by as MODEL.WEIGHTS: see :func:`run_weights`.

    Args:
        folder: of a run; or the output of self-train, whose last student it is.

    Raises:
        InputError: there is no config.yaml, or these weights are not there.
    """
    folder = _last_student(Path(folder))
    if not (folder / "config.yaml").is_file():
        seeds = sorted(folder.glob("seed_*"))
        if seeds:
            raise InputError(f"{folder} holds runs of several seeds: name one of them, such as {seeds[0]}.")
        raise InputError(f"{folder} is no folder of a run: it has no config.yaml.")
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.merge_from_file(str(folder / "config.yaml"), allow_unsafe=allow_unsafe)
    weights = folder / run_weights(cfg)
    if not weights.is_file():
        raise InputError(
            f"The run in {folder} has no {run_weights(cfg)}, which its config.yaml says that it is used by: let its "
            "training end first."
        )
    cfg.MODEL.WEIGHTS = str(weights)
    return cfg


def _last_student(folder: Path) -> Path:
    """The student of the last round in the output folder of self-train; any other folder itself."""
    if (folder / "config.yaml").is_file():
        return folder
    rounds = [(int(p.name[len("round_") :]), p) for p in folder.glob("round_*") if p.name[6:].isdigit()]
    places = [folder, *(path for _, path in sorted(rounds))]
    students = [path / "student" for path in places if (path / "student" / "config.yaml").is_file()]
    return students[-1] if students else folder
