"""Where random numbers come from: a run's seed, and for a sample numpy's state, which the loader seeds for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode


@contextlib.contextmanager
def torch_seeded_by_numpy() -> Iterator[None]:
    """Inside, torch's random numbers on the CPU follow from numpy's global state; after, they are as if nothing was.

    For transforms of torchvision and lightly. GPUs' random states stay untouched (``torch.manual_seed`` resets them).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.randint(2**31)))
        yield


def stage_seed(cfg: CfgNode) -> int | None:
    """The seed of a run: a teacher's is SEED, each later stage's another one that follows from it; None without SEED.

    Were it the same, a student would see its teacher's images again, in the same order and cropped alike.

    Args:
        cfg: with SELFTRAIN.STAGE; -1 counts as 1 with pseudo labels, as 0 without.
    """
    if cfg.SEED < 0:
        return None
    stage = cfg.SELFTRAIN.STAGE if cfg.SELFTRAIN.STAGE >= 0 else int(bool(cfg.DATASETS.PSEUDO_TRAIN))
    return int(np.random.SeedSequence([cfg.SEED, stage]).generate_state(1)[0]) if stage else cfg.SEED
