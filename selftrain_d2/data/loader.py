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
from detectron2.config import configurable
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from selftrain_d2.data.classification import ClassificationMapper, get_classification_dicts
from selftrain_d2.data.coco_datasets import reading_coco
from selftrain_d2.data.coco_file import nothing_to_learn
from selftrain_d2.data.datasets import check_same_classes, class_names
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper
from selftrain_d2.data.packed_loader import PackedLoader
from selftrain_d2.data.pseudo_labels.dataset import PseudoImageDataset, PseudoLabelDataset
from selftrain_d2.data.random_state import stage_seed
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

    Attributes:
        first_batch: batches to leave out at the start. Training resumed at step n continues with batch n.
    """

    def __init__(
        self,
        samplers: Sequence[Sampler | None],
        batch_sizes: Sequence[int],
        groups: Sequence[Sequence[int] | None],
    ):
        self.samplers = samplers
        self.batch_sizes = batch_sizes
        self.groups = groups
        self.first_batch = 0

    def __iter__(self) -> Iterator[list[SampleKey]]:
        streams = [
            self._batches(source, sampler, size, group)
            for source, (sampler, size, group) in enumerate(zip(self.samplers, self.batch_sizes, self.groups))
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


def get_human_dicts(cfg) -> list[dict[str, Any]]:
    """Dataset dicts of DATASETS.TRAIN, stamped as human-labeled.

    Raises:
        InputError: a dataset is not registered, or has other classes than the first; a COCO file cannot be used (see
            :func:`selftrain_d2.data.coco_file.read_coco`); there is no object to learn from, or none of the kind
            that MODEL.MASK_ON and MODEL.KEYPOINT_ON ask for.
    """
    names = cfg.DATASETS.TRAIN
    check_registered("DATASETS.TRAIN", names)
    check_classes(names[0], names[1:], "human-labeled")
    with reading_coco(names, masks=cfg.MODEL.MASK_ON):
        dicts = get_detection_dataset_dicts(names, filter_empty=False, check_consistency=False)
    check_classes(names[0], names[1:], "human-labeled")  # those that were unknown before they were read
    if "annotations" in dicts[0]:
        _check_objects(cfg, dicts)
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            dicts = filter_images_with_only_crowd_annotations(dicts)
        if class_names(names[0]):
            print_instances_class_histogram(dicts, class_names(names[0]))
    return [{**d, "label_source": "human"} for d in dicts]


def _check_objects(cfg, dicts: Sequence[dict[str, Any]]) -> None:
    """Raise InputError unless there are objects to learn from, with masks and keypoints where they are learned."""
    objects = (a for d in dicts for a in d.get("annotations", ()) if not a.get("iscrowd", 0))
    if not any(_has_area(annotation) for annotation in objects):
        annotations = [a for d in dicts for a in d.get("annotations", ())]
        raise InputError(nothing_to_learn(f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}", annotations))
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        for d in dicts:
            if any(
                isinstance(a.get("segmentation"), dict) and not a.get("iscrowd", 0) for a in d["annotations"]
            ):
                raise InputError(
                    f"Image {d['file_name']} (id {d['image_id']}) has a mask in run lengths, which INPUT.MASK_FORMAT "
                    "'polygon' does not take: set INPUT.MASK_FORMAT bitmask."
                )
    if cfg.MODEL.KEYPOINT_ON:
        check_keypoints(cfg, cfg.DATASETS.TRAIN)


def _has_area(annotation: dict[str, Any]) -> bool:
    x0, y0, x1, y1 = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return x1 > x0 and y1 > y0


def check_keypoints(cfg, names: Sequence[str]) -> None:
    """Raise InputError unless registered datasets name the keypoints that MODEL.ROI_KEYPOINT_HEAD learns, all alike."""
    number, expected = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, None
    for name in names:
        points = MetadataCatalog.get(name).get("keypoint_names")
        if not points:
            raise InputError(
                f"MODEL.KEYPOINT_ON needs the names of the keypoints of {name!r}: a COCO JSON has them in each of its "
                "'categories', as 'keypoints'."
            )
        if len(points) != number:
            raise InputError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}, but {name!r} has {len(points)} keypoints."
            )
        expected = expected or points
        if list(points) != list(expected):
            raise InputError(f"{name!r} has other keypoints than {names[0]!r}: {points} against {expected}.")


def get_pseudo_dicts(cfg) -> Sequence[dict[str, Any]]:
    """Dataset dicts of DATASETS.PSEUDO_TRAIN, stamped as pseudo-labeled.

    Pseudo-label folders stay as small as they are loaded: their dicts are made when asked for. Images without
    boxes stay: the paper trains on them as all-negative.

    Raises:
        InputError: a dataset is not registered, is empty, or has other classes than DATASETS.TRAIN.
    """
    check_registered("DATASETS.PSEUDO_TRAIN", cfg.DATASETS.PSEUDO_TRAIN)
    parts = [_one_pseudo_dataset(name) for name in cfg.DATASETS.PSEUDO_TRAIN]
    check_classes(cfg.DATASETS.TRAIN[0], cfg.DATASETS.PSEUDO_TRAIN, "pseudo-labeled")
    return parts[0] if len(parts) == 1 else ConcatDataset(map(_shared, parts))


# FiftyOne and Label Studio write classes by the alphabet.
_IN_ORDER = (
    "they must be in the same order, which `selftrain-d2 import --classes NAME ...` gives to pseudo labels of other "
    "tools"
)


def check_classes(human: str, others: Sequence[str], kind: str) -> None:
    """Raise InputError unless registered datasets have the classes of the human-labeled one.

    Those registered by ``register_coco_instances`` are known by their classes only once they were read: until then
    they pass.

    Args:
        kind: what the others are, for the message.
    """
    expected = class_names(human)
    for name in others:
        found = class_names(name)
        if expected is not None and found is not None:
            where, reference = f"The {kind} dataset {name!r}", f"the human-labeled dataset {human!r}"
            check_same_classes(expected, found, where, reference, advice=_IN_ORDER)


def _one_pseudo_dataset(name: str) -> Sequence[dict[str, Any]]:
    """With the checks of detectron2's ``get_detection_dataset_dicts``, which would make all dicts at once."""
    dicts = DatasetCatalog.get(name)
    if not len(dicts):
        raise InputError(f"The pseudo-labeled dataset {name!r} has no image.")
    names = class_names(name) or []
    if isinstance(dicts, PseudoImageDataset):
        logger.info(f"{name}: {len(dicts)} images, {dicts.described(names)}")
        return dicts
    if names and "annotations" in dicts[0]:
        print_instances_class_histogram(dicts, names)
    return [{**d, "label_source": "pseudo"} for d in dicts]


def check_registered(key: str, names: Sequence[str]) -> None:
    """Raise InputError if a config key names no dataset, or one that detectron2's catalog does not have."""
    if not names:
        raise InputError(f"{key} is empty: name at least one registered dataset.")
    for name in names:
        if name not in DatasetCatalog:
            raise InputError(
                f"{key} names {name!r}, which is not registered; known: {DatasetCatalog.list()}."
            )


def check_sources(cfg) -> None:
    """Check, before anything is read, that a config's sources of images fit together.

    Raises:
        InputError: a source has datasets but no images a step, or the other way round; a dataset is not registered.
    """
    if bool(cfg.DATASETS.PSEUDO_TRAIN) != bool(cfg.SOLVER.PSEUDO_IMS_PER_BATCH):
        raise InputError(
            "DATASETS.PSEUDO_TRAIN and SOLVER.PSEUDO_IMS_PER_BATCH belong together: set both to train a "
            f"student, neither to train a teacher (now {cfg.DATASETS.PSEUDO_TRAIN} and "
            f"{cfg.SOLVER.PSEUDO_IMS_PER_BATCH})."
        )
    if bool(cfg.DATASETS.CLASSIFICATION_TRAIN) != bool(cfg.SOLVER.CLASSIFICATION_IMS_PER_BATCH):
        raise InputError(
            "DATASETS.CLASSIFICATION_TRAIN and SOLVER.CLASSIFICATION_IMS_PER_BATCH belong together: set both for joint "
            f"training, or neither (now {cfg.DATASETS.CLASSIFICATION_TRAIN} and "
            f"{cfg.SOLVER.CLASSIFICATION_IMS_PER_BATCH})."
        )
    check_registered("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    for key in ("PSEUDO_TRAIN", "CLASSIFICATION_TRAIN"):
        if cfg.DATASETS[key]:
            check_registered(f"DATASETS.{key}", cfg.DATASETS[key])


def _from_config(cfg, *, mapper=None, classification_mapper=None):
    check_sources(cfg)
    human_dicts = get_human_dicts(cfg)
    pseudo_dicts = get_pseudo_dicts(cfg) if cfg.DATASETS.PSEUDO_TRAIN else []
    return {
        "human_dicts": human_dicts,
        "pseudo_dicts": pseudo_dicts,
        "mapper": SelfTrainingDatasetMapper(cfg, is_train=True) if mapper is None else mapper,
        "human_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "pseudo_batch_size": cfg.SOLVER.PSEUDO_IMS_PER_BATCH,
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


def _shared(dicts: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Workers would copy the Python objects of a list when they touch them."""
    return DatasetFromList(dicts, copy=False) if isinstance(dicts, list) and dicts else dicts


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

    Call it as ``build_selftrain_train_loader(cfg)`` or with the arguments.

    Args:
        human_dicts, pseudo_dicts: detectron2 dataset dicts; ``pseudo_dicts`` is empty for a teacher. Lists are
            serialized, so that workers share them; other sequences are used as they are.
        mapper: makes a sample of a dict; :class:`SelfTrainingDatasetMapper` by default.
        human_batch_size, pseudo_batch_size: images a step over all processes; each process has its share.
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
            [_shared(ds) for ds in dicts],
            [mapper, mapper, classification_mapper],
            seed,
        ),
        batch_sampler=MixedBatchSampler(samplers, [size // world_size for size in sizes], groups),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=use_one_thread,
        # Starting the loader draws a number; not from the state that training depends on.
        generator=torch.Generator().manual_seed(seed),
    )
