"""One source of random numbers for a sample: numpy's, which the loader seeds for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def torch_seeded_by_numpy() -> Iterator[None]:
    """Inside, torch's random numbers on the CPU follow from numpy's global state; after, they are as if nothing was.

    For transforms of torchvision and lightly. GPUs' random states stay untouched (``torch.manual_seed`` resets them).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.randint(2**31)))
        yield
