"""A config as one flat table."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode


def flat_config(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """The keys of a config, such as "SOLVER.MAX_ITER", with their values."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        key = f"{prefix}{key}"
        if isinstance(value, CfgNode):
            flat.update(flat_config(value, f"{key}."))
        else:
            flat[key] = value
    return flat
