"""The teacher at work: boxes, or classes of pixels, for images that nobody labeled."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import detectron2
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from selftrain_d2.data.augmentation import set_test_size
from selftrain_d2.data.datasets import check_same_classes, class_names
from selftrain_d2.data.image_sources import absolute_root, check_distinct
from selftrain_d2.data.pseudo_labels.manifest import MANIFEST
from selftrain_d2.data.pseudo_labels.masks import MASKS, make_mask_row
from selftrain_d2.data.pseudo_labels.shards import BOXES
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.data.scaled_images import scale_augmentations
from selftrain_d2.data.tiles import Tiles
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.claims import Claims
from selftrain_d2.labeling.inference import Teacher, label_in_order, read_ahead
from selftrain_d2.labeling.segment import SegmentationTeacher, makes_masks
from selftrain_d2.labeling.tiles import check_tiles, label_tiles_in_order, read_pictures
from selftrain_d2.labeling.views import views
from selftrain_d2.modeling.checkpoint import (
    SafeDetectionCheckpointer,
    file_sha256,
    require_complete,
    require_same_anchors,
)
from selftrain_d2.modeling.classes import number_of_classes, stored_classes
from selftrain_d2.processes import on_main_process, shared_store, wait_until

logger = logging.getLogger(__name__)

# A client of a file server may say for so long that a file is not there which it did not find before (NFS: acdirmax).
_SEEN_WITHIN_SECONDS = 90.0
# Shards that a process checks at a time, of a folder that is there.
_CHECKED_TOGETHER = 64


def generate_pseudo_labels(
    cfg: CfgNode,
    image_root: str | os.PathLike,
    file_names: Sequence[str],
    output: str | os.PathLike,
    *,
    score_floor: float = 0.05,
    batch_size: int = 8,
    thing_classes: Sequence[str] | None = None,
    tiles: Tiles | None = None,
    allow_unsafe: bool = False,
    alone: bool = False,
) -> dict[str, Any]:
    """Label images with a trained detector or segmentor and write a pseudo-label folder.

    Images are seen at the test size, unchanged unless SELFTRAIN.TTA says otherwise. Work that was stopped
    goes on where it stopped when called again, and ends with the same rows. Several processes (detectron2's
    ``launch``, torchrun) take shards as they become free, check those that are there together, and make shards of a
    process that died or hangs as well: when nothing was finished for SELFTRAIN.TAKE_OVER_SECONDS. They wait for each
    other without collectives, so that no time limit of the process group ends the work.

    Args:
        cfg: the teacher's config; MODEL.WEIGHTS is the teacher.
        image_root: folder of the images, or the root that ``selftrain_d2.data.image_sources`` gives.
        file_names: the images, relative to ``image_root``. Those that cannot be read are written down as
            skipped, with the reason.
        output: the pseudo-label folder (see ``selftrain_d2.data.pseudo_labels.writer``).
        score_floor: boxes and pixels with a lower score are not written. The threshold for training comes
            later, when the labels are loaded.
        batch_size: images per forward pass. Images of different shapes never share one: padding would
            change their scores.
        thing_classes: class names by contiguous id, for weights that do not carry them; where these do, they must be
            the same. By default those in the checkpoint, else those of DATASETS.TRAIN.
        tiles: look at images tile by tile; the boxes are in pixels of the images, each object once.
        allow_unsafe: load MODEL.WEIGHTS even if that is a pickle that can run code.
        alone: in this process, though it is one of several, of which the others do not call this.

    Returns:
        The manifest: how many images were labeled, empty and skipped, by which teacher, and when.

    Raises:
        InputError: no weights, or not those of the whole model; unknown classes; an image listed twice; a teacher
            that makes no boxes, or with ``tiles`` masks; ``output`` holds pseudo labels of another teacher, other
            images, another floor or other tiles.
    """
    check_labeling(cfg, score_floor, batch_size)
    check_distinct(file_names, "The list of images")
    start = time.perf_counter()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = score_floor
    model = build_model(cfg)
    checkpointer = SafeDetectionCheckpointer(model, allow_unsafe=allow_unsafe)
    extras = checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    require_complete(
        checkpointer.report, cfg.MODEL.WEIGHTS
    )  # a head without training finds nothing, in silence
    require_same_anchors(checkpointer.report, cfg)
    if tiles is not None:
        check_tiles(tiles, model)
    kind = MASKS if makes_masks(model) else BOXES
    teacher = SegmentationTeacher(cfg, model) if kind is MASKS else Teacher(cfg, model)
    image_root = absolute_root(image_root)
    identity = {
        kind.classes_key: known_classes(
            cfg, thing_classes, stored_classes(extras, "classes", "thing_classes")
        ),
        "teacher_weights_sha256": file_sha256(PathManager.get_local_path(cfg.MODEL.WEIGHTS)),
        "teacher_config_sha256": teacher_config_sha256(cfg),
        "score_floor": score_floor,
        "tiles": None if tiles is None else dataclasses.asdict(tiles),
        "image_root": image_root,
    }
    names = list(file_names)
    store = dist.HashStore() if alone else shared_store()

    def open_folder() -> PseudoLabelWriter:
        return PseudoLabelWriter(output, identity, names, check=False)

    writer = open_folder() if alone else on_main_process(open_folder)
    leads = writer is not None
    if writer is None:
        writer = _join(output, identity, names)
    with writer:  # the main process holds the folder to the end
        _check_shards(writer, Claims(dist.PrefixStore("check", store), cfg.SELFTRAIN.TAKE_OVER_SECONDS))
        missing = writer.missing_shards()
        if not missing and writer.finished:
            logger.info(f"{output}: all {len(names)} images are labeled already.")
            return writer.manifest

        labeling_start = time.perf_counter()
        images = sum(len(writer.shard_range(shard)) for shard in missing)
        claims = Claims(dist.PrefixStore("label", store), cfg.SELFTRAIN.TAKE_OVER_SECONDS)
        with tqdm(desc="pseudo labels", unit="image", total=images, disable=not leads) as progress:
            for shards in claims.rounds(writer.missing_shards):
                _label_shards(cfg, teacher, image_root, writer, shards, batch_size, tiles, claims, progress)
        if not leads and not _is_left_to_finish(writer, cfg.SELFTRAIN.TAKE_OVER_SECONDS):
            return writer.manifest
        manifest = writer.finish(
            teacher_weights=absolute_root(cfg.MODEL.WEIGHTS),
            views=len(views(cfg)),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            seconds_of_last_run=round(time.perf_counter() - start, 1),
            images_per_second_of_last_run=round(images / (time.perf_counter() - labeling_start), 2),
            versions={"torch": torch.__version__, "detectron2": detectron2.__version__},
        )
        logger.info(
            f"{output}: {manifest['labeled']} images with {kind.name}, {manifest['empty']} without, "
            f"{len(manifest['skipped'])} skipped; {manifest[kind.name]} {kind.name} of score {score_floor} or more."
        )
        if manifest["skipped"]:
            name, reason = next(iter(manifest["skipped"].items()))
            logger.warning(
                f"{output}: {len(manifest['skipped'])} of {len(names)} images were skipped, e.g. {name} "
                f"({reason}); manifest.json names all."
            )
        return manifest


def _join(
    output: str | os.PathLike, identity: dict[str, Any], file_names: Sequence[str]
) -> PseudoLabelWriter:
    """A writer of a folder that the main process, perhaps on another machine, opened a moment ago."""
    manifest = os.path.join(output, MANIFEST)
    if not wait_until(lambda: os.path.exists(manifest), _SEEN_WITHIN_SECONDS):
        raise InputError(
            f"{output} has no {MANIFEST} here, which the main process wrote: give a folder that all machines share."
        )
    return PseudoLabelWriter(output, identity, file_names, exclusive=False)


def _check_shards(writer: PseudoLabelWriter, claims: Claims) -> None:
    """Remove what is damaged of the shards that are there; each process checks some of them."""
    parts = collections.defaultdict(list)
    for shard, file in writer.shards():
        parts[shard // _CHECKED_TOGETHER].append((shard, file))
    for claimed in claims.rounds(lambda: claims.unmarked(parts)):
        for part in claimed:
            writer.check_shards(parts[part])
            claims.mark(part)


def _is_left_to_finish(writer: PseudoLabelWriter, patience: float) -> bool:
    """Wait for the main process to finish the folder; True if it is gone, and this process now holds the folder."""
    while not wait_until(lambda: writer.finished, patience):
        if writer.take():
            return not writer.finished
    return False


def _label_shards(
    cfg: CfgNode,
    teacher: Teacher | SegmentationTeacher,
    image_root: str,
    writer: PseudoLabelWriter,
    shards: Iterator[int],
    batch_size: int,
    tiles: Tiles | None,
    claims: Claims,
    progress: tqdm,
) -> None:
    """Label and write some shards, one after the other, while images of the next are read.

    Args:
        shards: each is taken when the first of its images is to be read.
    """
    begun: collections.deque[int] = collections.deque()  # shards whose images are read, or soon will be

    def names_of(shards: Iterator[int]) -> Iterator[str]:
        for shard in shards:
            begun.append(shard)
            yield from (writer.file_names[i] for i in writer.shard_range(shard))

    first = next(shards, None)
    if first is None:  # reading processes would be started for nothing
        return
    names = names_of(itertools.chain([first], shards))
    makes_rows = {}
    if isinstance(teacher, SegmentationTeacher):
        # A mask is written when it is made: those of a shard are large together.
        makes_rows = {
            "labeled_row": lambda sample, labels: writer.write_mask(sample["file_name"], labels),
            "skipped_row": make_mask_row,
        }
    if tiles is None:
        samples = read_ahead(cfg, image_root, names, batch_size)
        label = functools.partial(label_in_order, **makes_rows)
    else:
        samples = read_pictures(image_root, names, cfg.INPUT.FORMAT)
        label = functools.partial(
            label_tiles_in_order,
            tiles=tiles,
            augmentations=scale_augmentations(cfg),
            progress=not progress.disable,
        )
    for sample in samples:
        shard = begun.popleft()
        number = len(writer.shard_range(shard))
        of_shard = itertools.chain([sample], itertools.islice(samples, number - 1))
        del sample  # or it would keep a large image
        # Shards share no batch: so the rows of a shard are the same whatever was labeled before it, and where.
        rows = label(of_shard, teacher, batch_size)
        writer.write_shard(shard, _counted(rows, progress))
        progress.n = claims.count(number)  # by all processes
        progress.refresh()


def _counted(rows: Iterator[dict[str, Any]], progress: tqdm) -> Iterator[dict[str, Any]]:
    for row in rows:
        progress.update()
        yield row


def teacher_config_sha256(cfg: CfgNode) -> str:
    """Hash of the config keys that a teacher's output depends on.

    Where it runs and is stored do not count, and its score thresholds give way to the floor.
    """
    model = cfg.MODEL.clone()
    model.defrost()
    model.WEIGHTS = model.DEVICE = ""
    model.RETINANET.SCORE_THRESH_TEST = model.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    test = cfg.clone()
    test.defrost()
    set_test_size(test)
    parts = [
        model.dump(),
        cfg.INPUT.FORMAT,
        cfg.INPUT.AUGMENTATION.IMAGE_SIZE,
        test.INPUT.MIN_SIZE_TEST,
        test.INPUT.MAX_SIZE_TEST,
        cfg.TEST.DETECTIONS_PER_IMAGE,
        cfg.SELFTRAIN.LABEL_PRECISION,
        cfg.SELFTRAIN.TTA.dump(),
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def check_labeling(cfg: CfgNode, score_floor: float, batch_size: int) -> None:
    """Check what needs neither images nor weights; see :func:`generate_pseudo_labels`.

    Raises:
        InputError: no weights are named, or a number is out of range.
    """
    if not cfg.MODEL.WEIGHTS:
        raise InputError("MODEL.WEIGHTS is empty: give the trained teacher.")
    if not 0 <= score_floor < 1:
        raise InputError(f"The score floor must be in [0, 1), not {score_floor}.")
    if batch_size < 1:
        raise InputError(f"The batch size must be at least 1, not {batch_size}.")


def known_classes(cfg: CfgNode, given: Sequence[str] | None, known: Sequence[str] | None) -> list[str]:
    """Names of a model's classes, by id: those that the weights carry, else those given, else DATASETS.TRAIN's.

    Args:
        given: by the user.
        known: by the weights.

    Raises:
        InputError: nobody knows them, or they are not those of the weights, or not as many as the model has.
    """
    if given:
        check_distinct(given, "--classes")
        if known:
            check_same_classes(known, given, "--classes", f"the teacher {cfg.MODEL.WEIGHTS}")
    names, source = given, "--classes"
    if not names and not known and cfg.DATASETS.TRAIN:
        names, source = class_names(cfg.DATASETS.TRAIN[0]), f"DATASETS.TRAIN {cfg.DATASETS.TRAIN[0]!r}"
    names = known or names
    if not names:
        raise InputError(
            f"{cfg.MODEL.WEIGHTS} does not say what classes it knows: give their names with --classes, "
            "in the order of training."
        )
    key, number = number_of_classes(cfg) or ("", len(names))
    if not known and len(names) != number:
        raise InputError(
            f"{source} has {len(names)} classes, but {key} is {number}: give the names of the teacher's classes with "
            "--classes, in the order of training."
        )
    return list(names)
