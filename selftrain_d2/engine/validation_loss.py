"""The training loss on the images of evaluation, unaugmented."""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from selftrain_d2.data.augmentation import build_augmentations
from selftrain_d2.data.coco_datasets import reading_coco
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper
from selftrain_d2.errors import InputError

#: In the results of evaluation, as a task beside "bbox": ``validation/loss`` and its parts, ``validation/loss_cls``.
VALIDATION = "validation"


class ValidationLoss:
    """The loss of a model on human labels of DATASETS.TEST, by part and as their sum ``loss``.

    A mean over batches of SOLVER.IMS_PER_BATCH images, at the test size and without augmentation, weighted by their
    images. Batch norm and dropout are in evaluation mode, and the random numbers (sampled proposals) the same each
    time: equal weights have equal losses. Dense detectors divide by 1 + the positive anchors of the batch, whatever
    they do in training, where a moving average would have the training's history in it. In n processes up to n - 1
    images count twice, since all must go the same number of steps.

    Raises:
        InputError: a dataset has no labels.
    """

    def __init__(self, cfg: CfgNode):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST  # keypoints are mirrored as these say
        arguments = SelfTrainingDatasetMapper.from_config(cfg, is_train=True)
        arguments["augmentations"] = build_augmentations(cfg, is_train=False)
        self.mapper = SelfTrainingDatasetMapper(**arguments)
        self.batch_size = max(1, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size())
        self.num_workers = cfg.DATALOADER.NUM_WORKERS
        with reading_coco(cfg.DATASETS.TEST, masks=cfg.MODEL.MASK_ON):
            self.datasets = {name: DatasetCatalog.get(name) for name in cfg.DATASETS.TEST}
        for name, dicts in self.datasets.items():
            if not all("annotations" in d or "sem_seg_file_name" in d for d in dicts):
                raise InputError(
                    f"TEST.VALIDATION_LOSS needs labels, which {name!r} in DATASETS.TEST does not have."
                )

    def __call__(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Losses by dataset and name. To be called in every process; the model is left as it was.

        Args:
            model: one with ``LossesBySource``, not wrapped for several processes.
        """
        return {name: self._mean_losses(model, dicts) for name, dicts in self.datasets.items()}

    @torch.no_grad()
    def _mean_losses(self, model: nn.Module, dicts: list[dict[str, Any]]) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        with _computing_losses(model):
            for batch in self._loader(dicts):
                for name, loss in model(batch).items():
                    sums[name] += loss.item() * len(batch)
                    sums["loss"] += loss.item() * len(batch)
                sums["images"] += len(batch)
        parts = comm.all_gather(dict(sums))
        images = sum(part["images"] for part in parts)
        return {name: sum(part[name] for part in parts) / images for name in sums if name != "images"}

    def _loader(self, dicts: list[dict[str, Any]]) -> torch.utils.data.DataLoader:
        rank, processes = comm.get_rank(), comm.get_world_size()
        number = -(-len(dicts) // processes)  # of each process
        shares = itertools.islice(itertools.cycle(range(len(dicts))), rank, number * processes, processes)
        return build_detection_test_loader(
            dicts,
            mapper=self.mapper,
            sampler=list(shares),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )


def add_to_results(results: dict[str, Any], losses: dict[str, dict[str, float]]) -> None:
    """Put validation losses by dataset into the results of evaluation, in place."""
    if len(losses) == 1:
        results[VALIDATION] = next(iter(losses.values()))
    else:
        for name, values in losses.items():
            results[name][VALIDATION] = values


@contextlib.contextmanager
def _computing_losses(model: nn.Module) -> Iterator[None]:
    """Inside, ``forward`` gives losses and changes nothing that training goes on with."""
    modes = {module: module.training for module in model.modules()}
    # The last step's losses, moving averages of positive anchors.
    attributes = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(model).items()
        if not name.startswith("_")
    }
    model.train()
    if isinstance(getattr(model, "backbone", None), nn.Module):
        model.backbone.eval()  # drop connect too
    for module in model.modules():
        if isinstance(module, (_BatchNorm, _DropoutNd)):
            module.eval()
    if hasattr(model, "normalize_by_batch"):
        model.normalize_by_batch = True
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), EventStorage(1):  # what heads log is not the training's
            torch.manual_seed(comm.get_rank())
            yield
    finally:
        vars(model).update(attributes)
        for module, training in modes.items():
            module.training = training
