"""Batches between processes: what samples may hold, and how many files they keep open."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from selftrain_d2 import build_selftrain_train_loader
from selftrain_d2.data.packed_loader import PackedLoader, pack, unpack

# As many tensors for each descriptor as 64 + 64 images, 4 workers and the usual limit of 1,024 have.
FEW_FILES = """
import itertools, resource
import torch
from detectron2.structures import Boxes, Instances
from selftrain_d2 import build_selftrain_train_loader

def mapper(d):
    instances = Instances((8, 8))
    instances.gt_boxes, instances.gt_classes = Boxes(torch.full((2, 4), float(d["id"]))), torch.tensor([d["id"], 0])
    return {**d, "image": torch.full((3, 8, 8), d["id"], dtype=torch.uint8), "instances": instances}

dicts = [{"id": i} for i in range(100)]
loader = build_selftrain_train_loader(
    human_dicts=dicts, pseudo_dicts=dicts, mapper=mapper, human_batch_size=16, pseudo_batch_size=16,
    num_workers=2, seed=0,
)
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
for batch in itertools.islice(loader, 6):
    assert len(batch) == 32
    for sample in batch:
        assert (sample["image"] == sample["id"]).all() and (sample["instances"].gt_boxes.tensor == sample["id"]).all()
        assert sample["instances"].gt_classes.tolist() == [sample["id"], 0]
print("six batches")
"""


def test_large_batches_need_few_open_files():
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "six batches\n", done.stderr[-2000:]


class _Labeled(torch.Tensor):
    pass


def _sample(number):
    generator = torch.Generator().manual_seed(number)
    instances = Instances((20, 30))
    instances.gt_boxes = Boxes(torch.rand(number, 4, generator=generator))
    instances.gt_classes = torch.arange(number)
    instances.gt_masks = BitMasks(torch.rand(number, 20, 30, generator=generator) > 0.5)
    instances.polygons = PolygonMasks([[np.arange(6.0) + i] for i in range(number)])
    instances.gt_keypoints = Keypoints(np.ones((number, 5, 3)))
    return {
        "file_name": f"{number}.png",
        "image": torch.randint(0, 255, (3, 20, 30), generator=generator, dtype=torch.uint8),
        "turned": torch.rand(4, 6, generator=generator).T,  # not contiguous
        "scalar": torch.tensor(number, dtype=torch.bfloat16),
        "array": np.arange(number),
        "instances": instances,
        "nested": [(torch.full((2,), number), None), {"more": torch.zeros(0, 3)}],
        "kind": torch.ones(2).as_subclass(_Labeled),
    }


def _assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            _assert_equal(a, b)
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other)
    elif hasattr(one, "__dict__"):
        _assert_equal(vars(one), vars(other))
    else:
        assert one == other


def test_any_sample_comes_back_as_it_was():
    batch = [_sample(number) for number in (2, 0, 3)]
    pickled, flat = pack(batch)
    assert sorted(str(tensor.dtype) for tensor in flat) == [
        "torch.bfloat16", "torch.bool", "torch.float32", "torch.int64", "torch.uint8"
    ]  # fmt: skip
    assert len(pickled) < 4000  # no pixels
    _assert_equal(unpack(pickled, flat), batch)


class _Samples(torch.utils.data.Dataset):
    def __getitem__(self, number):
        return _sample(number)

    def __len__(self):
        return 4


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_change_nothing(workers):
    loader = PackedLoader(_Samples(), batch_size=3, num_workers=workers)
    _assert_equal(list(loader), [[_sample(0), _sample(1), _sample(2)], [_sample(3)]])


def test_memory_is_pinned_for_a_gpu_alone(student_config):
    """Not without workers: the training process would copy in place of working."""
    pinned = {}
    for device in ("cuda", "cuda:1", "cpu"):
        for workers in (0, 2):
            student_config.MODEL.DEVICE, student_config.DATALOADER.NUM_WORKERS = device, workers
            pinned[device, workers] = build_selftrain_train_loader(student_config).pin_memory
    assert {key for key, value in pinned.items() if value} == {("cuda", 2), ("cuda:1", 2)}
