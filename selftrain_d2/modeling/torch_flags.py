"""Settings of PyTorch for the whole process, for a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def torch_flag(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Inside, a flag such as ``torch.backends.cudnn.benchmark`` has this value."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
