"""Batches that come from loader processes in few tensors, whatever their samples hold."""

from __future__ import annotations

import io
import itertools
import math
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

#: The pickled batch without its tensors; and these, flat, one for all of a data type.
Packed = tuple


class PackedLoader(DataLoader):
    """A DataLoader whose batches are lists of samples.

    PyTorch keeps a file open for each tensor that a worker hands over, until it is no longer used: large batches of
    samples of several tensors need more than the 1,024 files that a process usually may have. Here a batch is
    handed over in as many tensors as it has data types; the samples' own are views of these.

    Args:
        dataset, num_workers, options: of ``DataLoader``.
        pin_memory: put batches that workers made into pinned memory, from which they go to a GPU faster.
    """

    def __init__(self, dataset: Dataset, *, num_workers: int = 0, pin_memory: bool = False, **options: Any):
        super().__init__(
            dataset,
            num_workers=num_workers,
            collate_fn=pack if num_workers else list,
            pin_memory=pin_memory and num_workers > 0,
            **options,
        )

    def __iter__(self) -> Iterator[list[Any]]:
        batches = super().__iter__()
        return itertools.starmap(unpack, batches) if self.num_workers else batches


class _Pickler(pickle.Pickler):
    """Puts tensors aside, by data type, and writes where they are."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: dict[torch.dtype, list[Tensor]] = {}
        self.sizes: dict[torch.dtype, int] = {}

    def persistent_id(self, value: Any) -> tuple[int, int, tuple[int, ...]] | None:
        """Which flat tensor, from where, and the shape; None for what is pickled as ever."""
        # Subclasses and sparse tensors would come back as plain ones; others cannot be joined.
        plain = type(value) is Tensor and value.layout is torch.strided and value.is_cpu
        if not plain or value.requires_grad:
            return None
        start = self.sizes.get(value.dtype, 0)
        self.tensors.setdefault(value.dtype, []).append(value.reshape(-1))
        self.sizes[value.dtype] = start + value.numel()
        return list(self.tensors).index(value.dtype), start, tuple(value.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, flat: list[Tensor]):
        super().__init__(file)
        self.flat = flat

    def persistent_load(self, where: tuple[int, int, tuple[int, ...]]) -> Tensor:
        index, start, shape = where
        return self.flat[index][start : start + math.prod(shape)].view(shape)


def pack(batch: list[Any]) -> Packed:
    """A batch, of anything that can be pickled, in few tensors."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(batch)
    return file.getvalue(), [torch.cat(tensors) for tensors in pickler.tensors.values()]


def unpack(pickled: bytes, flat: list[Tensor]) -> list[Any]:
    """The batch that :func:`pack` was given; its tensors are views of the flat ones."""
    return _Unpickler(io.BytesIO(pickled), flat).load()
