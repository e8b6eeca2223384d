"""Batches with a fixed number of images of each source: human-labeled, pseudo-labeled, classification."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from selftrain_d2.data.classification import ClassificationMapper, get_classification_dicts
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper
from selftrain_d2.data.packed_loader import PackedLoader
from selftrain_d2.data.pseudo_labels.dataset import PseudoImageDataset, PseudoLabelDataset
from selftrain_d2.data.random_state import stage_seed
from selftrain_d2.data.training_sets import (
    check_sources,
    get_human_dicts,
    get_pseudo_dicts,
    labeled_in_the_step,
    shared,
)
from selftrain_d2.data.unlabeled_mapper import UnlabeledImageMapper
from selftrain_d2.errors import InputError

logger = logging.getLogger(__name__)

#: What DATALOADER.SAMPLER_TRAIN and PSEUDO_SAMPLER_TRAIN may be.
SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")

# One sample: which source, which image of it, and its position in that source's stream over all processes.
SampleKey = tuple


class MixedBatchSampler(Sampler):
    """Endless batches of sample keys: the images of the first source first (human), then those of the next.

    Each source has its own stream of indices (any of detectron2's training samplers, which deal one stream
    out to all processes), so a batch has the same number of each in every process and every step.

    Args:
        samplers: one endless sampler a source, each already restricted to this process; None for a source of no
            images.
        batch_sizes: images of each source per batch of this process, or 0.
        groups: for each source the group of every image, or None. A batch takes the images of a source
            from one group only (aspect-ratio grouping).
        last_batches: for each source how many batches have its images, or None for all; by default all.

    Attributes:
        first_batch: batches to leave out at the start. Training resumed at step n continues with batch n.
    """

    def __init__(
        self,
        samplers: Sequence[Sampler | None],
        batch_sizes: Sequence[int],
        groups: Sequence[Sequence[int] | None],
        last_batches: Sequence[int | None] | None = None,
    ):
        self.samplers = samplers
        self.batch_sizes = batch_sizes
        self.groups = groups
        self.last_batches = last_batches or [None] * len(samplers)
        self.first_batch = 0

    def __iter__(self) -> Iterator[list[SampleKey]]:
        columns = zip(self.samplers, self.batch_sizes, self.groups, self.last_batches)
        streams = [
            _then_nothing(self._batches(source, sampler, size, group), last)
            for source, (sampler, size, group, last) in enumerate(columns)
            if size
        ]
        batches = (list(itertools.chain.from_iterable(parts)) for parts in zip(*streams))
        # Only indices are drawn for the batches left out: a million take seconds.
        return itertools.islice(batches, self.first_batch, None)

    @staticmethod
    def _batches(source: int, sampler: Sampler, size: int, group: Sequence[int] | None):
        rank, world_size = comm.get_rank(), comm.get_world_size()
        waiting: dict[int, list[SampleKey]] = {}
        for draw, index in enumerate(sampler):
            batch = waiting.setdefault(0 if group is None else group[index], [])
            batch.append((source, index, rank + draw * world_size))
            if len(batch) == size:
                yield list(batch)
                batch.clear()


def _then_nothing(batches: Iterator[list[SampleKey]], number: int | None) -> Iterator[list[SampleKey]]:
    """The first ``number`` batches (None: all), then empty ones without end."""
    if number is None:
        return batches
    return itertools.chain(itertools.islice(batches, number), itertools.repeat([]))


class MixedDataset(Dataset):
    """Maps sample keys to samples mapped by their source's mapper, each with random numbers of its own.

    The random state of a sample (Python's, numpy's and torch's) depends on the seed and its key alone. So the same
    seed gives the same samples whatever the number of loader workers or processes, and wherever a resumed run starts.
    """

    def __init__(self, sources: Sequence[Dataset], mappers: Sequence[Callable[[dict], dict]], seed: int):
        self.sources = sources
        self.mappers = mappers
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        source, index, draw = key
        seed = np.random.SeedSequence([self.seed, source, draw]).generate_state(1)[0]
        before = random.getstate(), np.random.get_state()
        random.seed(int(seed))
        np.random.seed(seed)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(seed))  # torch.manual_seed would reset GPUs' too
                return self.mappers[source](self.sources[source][index])
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def use_one_thread(worker: int) -> None:
    """A ``worker_init_fn``: OpenCV would start as many threads as there are cores in every worker."""
    cv2.setNumThreads(0)


def mixed_steps(cfg: CfgNode) -> int | None:
    """Steps of a run before the last SELFTRAIN.REFINE_ITERS, which see no pseudo-labeled images; None if all do."""
    return cfg.SOLVER.MAX_ITER - cfg.SELFTRAIN.REFINE_ITERS if cfg.SELFTRAIN.REFINE_ITERS else None


def _from_config(cfg, *, mapper=None, pseudo_mapper=None, classification_mapper=None):
    check_sources(cfg)
    if pseudo_mapper is None and labeled_in_the_step(cfg):
        pseudo_mapper = UnlabeledImageMapper(cfg)
    human_dicts = get_human_dicts(cfg)
    pseudo_dicts = get_pseudo_dicts(cfg) if cfg.DATASETS.PSEUDO_TRAIN else []
    return {
        "human_dicts": human_dicts,
        "pseudo_dicts": pseudo_dicts,
        "mapper": SelfTrainingDatasetMapper(cfg, is_train=True) if mapper is None else mapper,
        "pseudo_mapper": pseudo_mapper,
        "human_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "pseudo_batch_size": cfg.SOLVER.PSEUDO_IMS_PER_BATCH,
        "pseudo_steps": mixed_steps(cfg),
        "human_repeat_factors": _repeat_factors(cfg, "SAMPLER_TRAIN", human_dicts),
        "pseudo_repeat_factors": _repeat_factors(cfg, "PSEUDO_SAMPLER_TRAIN", pseudo_dicts),
        "classification_dicts": get_classification_dicts(cfg) if cfg.DATASETS.CLASSIFICATION_TRAIN else [],
        "classification_mapper": ClassificationMapper(cfg)
        if classification_mapper is None
        else classification_mapper,
        "classification_batch_size": cfg.SOLVER.CLASSIFICATION_IMS_PER_BATCH,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "pin_memory": torch.device(cfg.MODEL.DEVICE).type == "cuda",
        "seed": stage_seed(cfg),
    }


def _repeat_factors(cfg, key: str, dicts: Sequence[dict[str, Any]]) -> torch.Tensor | None:
    sampler = cfg.DATALOADER[key]
    if sampler == "TrainingSampler":
        return None
    if sampler == "RepeatFactorTrainingSampler":
        return repeat_factors(dicts, cfg.DATALOADER.REPEAT_THRESHOLD)
    raise InputError(f"DATALOADER.{key} {sampler!r} is not supported: use {' or '.join(SAMPLERS)}.")


def repeat_factors(dicts: Sequence[dict[str, Any]], threshold: float) -> torch.Tensor:
    """How often each image comes in an epoch, by its rarest class: detectron2's
    ``RepeatFactorTrainingSampler.repeat_factors_from_category_frequency`` (LVIS, Appendix B.2), over columns where
    the dataset has them.

    Args:
        threshold: share of the images; classes in fewer images are repeated.

    Returns:
        (len(dicts),) float32, at least 1.
    """
    parts = _parts(dicts)
    if not all(isinstance(part, PseudoLabelDataset) for part in parts):
        if "annotations" not in dicts[0]:
            raise InputError(
                "RepeatFactorTrainingSampler repeats images by their boxes; for masks use TrainingSampler."
            )
        return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, threshold)
    category_ids = np.concatenate([part.category_ids for part in parts])
    image_of_box = np.repeat(np.arange(len(dicts)), np.concatenate([part.box_counts for part in parts]))
    classes = category_ids.max(initial=0) + 1
    in_images = np.unique(image_of_box * classes + category_ids) % classes  # each class once an image
    frequency = np.bincount(in_images, minlength=classes) / len(dicts)
    with np.errstate(divide="ignore", invalid="ignore"):  # classes that no image has
        of_class = np.maximum(1.0, np.sqrt(threshold / frequency))
    factors = np.ones(len(dicts))
    np.maximum.at(factors, image_of_box, of_class[category_ids])
    return torch.from_numpy(factors.astype(np.float32))


def _is_wide(dicts: Sequence[dict[str, Any]]) -> np.ndarray:
    """(len(dicts),) uint8."""
    parts = [
        part.sizes
        if isinstance(part, PseudoImageDataset)
        else np.array([(d["height"], d["width"]) for d in part])
        for part in _parts(dicts)
    ]
    return np.concatenate([sizes[:, 1] > sizes[:, 0] for sizes in parts]).astype(np.uint8)


def _sampler(number: int, repeat_factors: torch.Tensor | None, seed: int) -> Sampler:
    if repeat_factors is None:
        return TrainingSampler(number, seed=seed)
    return RepeatFactorTrainingSampler(repeat_factors, seed=seed)


def _parts(dicts: Sequence[dict[str, Any]]) -> list[Sequence[dict[str, Any]]]:
    return dicts.datasets if isinstance(dicts, ConcatDataset) else [dicts]


@configurable(from_config=_from_config)
def build_selftrain_train_loader(
    *,
    human_dicts: Sequence[dict[str, Any]],
    pseudo_dicts: Sequence[dict[str, Any]],
    mapper: Callable[[dict], dict],
    human_batch_size: int,
    pseudo_batch_size: int,
    pseudo_mapper: Callable[[dict], dict] | None = None,
    pseudo_steps: int | None = None,
    human_repeat_factors: torch.Tensor | None = None,
    pseudo_repeat_factors: torch.Tensor | None = None,
    classification_dicts: Sequence[dict[str, Any]] = (),
    classification_mapper: Callable[[dict], dict] | None = None,
    classification_batch_size: int = 0,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
    seed: int | None = None,
) -> DataLoader:
    """An endless loader whose every batch has the same number of human, of pseudo and of classification images.

    But for ``pseudo_steps``, after which there are no pseudo images.

    Call it as ``build_selftrain_train_loader(cfg)`` or with the arguments.

    Args:
        human_dicts, pseudo_dicts: detectron2 dataset dicts; ``pseudo_dicts`` is empty for a teacher. Lists are
            serialized, so that workers share them; other sequences are used as they are.
        mapper: makes a sample of a dict; :class:`SelfTrainingDatasetMapper` by default.
        human_batch_size, pseudo_batch_size: images a step over all processes; each process has its share.
        pseudo_mapper: of pseudo images, in place of ``mapper``; :class:`UnlabeledImageMapper` where SELFTRAIN.TEACHER
            is "moving_average".
        pseudo_steps: steps with pseudo images; those after them have none. None: all.
        human_repeat_factors, pseudo_repeat_factors: float tensors ``(len(dicts),)``, how often an image comes in
            an epoch (detectron2's RepeatFactorTrainingSampler), or None for once.
        classification_dicts, classification_mapper, classification_batch_size: the same of images for joint training
            (see :class:`ClassificationMapper`), if there are any.
        aspect_ratio_grouping: whether the human (pseudo) images of a batch are all wide or all tall.
            Of use where training images have different shapes, which those of S1-S4 have not.
        num_workers: loader processes.
        pin_memory: of the batches that these make; for training on a GPU.
        seed: of the order of images and of augmentation. None: random, the same in all processes.

    Returns:
        A DataLoader of lists of samples, human, pseudo, classification, each with ``label_source``.
        ``loader.batch_sampler.first_batch`` may be set before the iteration starts, to resume there.

    Raises:
        InputError: a batch size does not divide by the number of processes, or a dataset is empty.
    """
    world_size = comm.get_world_size()
    samplers, groups = [], []
    seed = comm.shared_random_seed() if seed is None else seed
    dicts = [human_dicts, pseudo_dicts, classification_dicts]
    sizes = [human_batch_size, pseudo_batch_size, classification_batch_size]
    factors = [human_repeat_factors, pseudo_repeat_factors, None]
    for source, name in enumerate(("", "PSEUDO_", "CLASSIFICATION_")):
        key, number, size = f"SOLVER.{name}IMS_PER_BATCH", len(dicts[source]), sizes[source]
        least = 0 if name else 1
        if size < least:
            raise InputError(f"{key} is {size}: a step needs at least {least} such images.")
        if size % world_size:
            raise InputError(f"{key} = {size} does not divide by the {world_size} processes.")
        if size and not number:
            raise InputError(f"{key} = {size}, but there are no such images.")
        samplers.append(_sampler(number, factors[source], seed + source) if size else None)
        # Classification images are square when they are batched.
        grouped = aspect_ratio_grouping and size and name != "CLASSIFICATION_"
        groups.append(_is_wide(dicts[source]) if grouped else None)
    return PackedLoader(
        MixedDataset(
            [shared(ds) for ds in dicts],
            [mapper, pseudo_mapper or mapper, classification_mapper],
            seed,
        ),
        batch_sampler=MixedBatchSampler(
            samplers, [size // world_size for size in sizes], groups, [None, pseudo_steps, None]
        ),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=use_one_thread,
        # Starting the loader draws a number; not from the state that training depends on.
        generator=torch.Generator().manual_seed(seed),
    )
