"""The teacher at work: boxes for images that nobody labeled."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import detectron2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from selftrain_d2.data.augmentation import build_augmentations
from selftrain_d2.data.mapper import read_image
from selftrain_d2.data.pseudo_label_store import PseudoLabelWriter, make_row
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint import SafeDetectionCheckpointer, file_sha256

logger = logging.getLogger(__name__)


def generate_pseudo_labels(
    cfg: CfgNode,
    image_root: str | os.PathLike,
    file_names: Sequence[str],
    output: str | os.PathLike,
    *,
    score_floor: float = 0.05,
    batch_size: int = 8,
    thing_classes: Sequence[str] | None = None,
    allow_unsafe: bool = False,
) -> dict[str, Any]:
    """Label images with a trained detector, without augmentation, and write a pseudo-label folder.

    Work that was stopped goes on where it stopped when called again. In several processes (detectron2's
    ``launch``) each takes its share.

    Args:
        cfg: the teacher's config; MODEL.WEIGHTS is the teacher.
        image_root: folder of the images.
        file_names: the images, relative to ``image_root``. Those that cannot be read are written down as
            skipped, with the reason.
        output: the pseudo-label folder (see ``selftrain_d2.data.pseudo_label_store``).
        score_floor: boxes with a lower score are not written. The threshold for training comes later,
            when the labels are loaded.
        batch_size: images per forward pass. Images of different shapes never share one: padding would
            change their scores.
        thing_classes: class names by contiguous id. By default those in the checkpoint, else those of
            DATASETS.TRAIN.
        allow_unsafe: load MODEL.WEIGHTS even if that is a pickle that can run code.

    Returns:
        The manifest: how many images were labeled, empty and skipped, by which teacher, and when.

    Raises:
        InputError: no weights; unknown classes; ``output`` holds pseudo labels of another teacher, other
            images or another floor.
    """
    if not cfg.MODEL.WEIGHTS:
        raise InputError("MODEL.WEIGHTS is empty: give the trained teacher.")
    if not 0 <= score_floor < 1:
        raise InputError(f"The score floor must be in [0, 1), not {score_floor}.")
    if batch_size < 1:
        raise InputError(f"The batch size must be at least 1, not {batch_size}.")
    start = time.perf_counter()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = score_floor
    teacher = build_model(cfg).eval()
    extras = SafeDetectionCheckpointer(teacher, allow_unsafe=allow_unsafe).load(
        cfg.MODEL.WEIGHTS, checkpointables=[]
    )
    identity = {
        "thing_classes": _class_names(cfg, thing_classes, extras),
        "teacher_weights_sha256": file_sha256(cfg.MODEL.WEIGHTS),
        "teacher_config_sha256": teacher_config_sha256(cfg),
        "score_floor": score_floor,
        "image_root": os.path.abspath(image_root),
    }
    if comm.is_main_process():
        PseudoLabelWriter(output, identity, list(file_names))
    comm.synchronize()
    writer = PseudoLabelWriter(output, identity, list(file_names))
    missing = writer.missing_shards()
    if not missing and writer.finished:
        logger.info(f"{output}: all {len(file_names)} images are labeled already.")
        return writer.manifest
    comm.synchronize()  # no process writes before all have listed what is missing

    shards = missing[comm.get_rank() :: comm.get_world_size()]
    positions = list(itertools.chain.from_iterable(writer.shard_range(shard) for shard in shards))
    images = _Images(
        str(image_root), list(file_names), build_augmentations(cfg, is_train=False), cfg.INPUT.FORMAT
    )
    loader = DataLoader(
        images,
        sampler=positions,
        batch_size=batch_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
    )
    rows = _label(teacher, loader)
    if comm.is_main_process():
        rows = iter(tqdm(rows, desc="pseudo labels", unit="image", total=len(positions)))
    for shard in shards:
        writer.write_shard(shard, itertools.islice(rows, len(writer.shard_range(shard))))
    next(rows, None)  # so that the progress bar sees the end
    comm.synchronize()
    if not comm.is_main_process():
        return writer.manifest
    manifest = writer.finish(
        teacher_weights=os.path.abspath(cfg.MODEL.WEIGHTS),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds_of_last_run=round(time.perf_counter() - start, 1),
        versions={"torch": torch.__version__, "detectron2": detectron2.__version__},
    )
    logger.info(
        f"{output}: {manifest['labeled']} images with boxes, {manifest['empty']} without, "
        f"{len(manifest['skipped'])} skipped; {manifest['boxes']} boxes of score {score_floor} or more."
    )
    return manifest


class _Images(Dataset):
    """Images ready for the teacher, or the reason why one cannot be read."""

    def __init__(self, image_root: str, file_names: list[str], augmentations, image_format: str):
        self.image_root = image_root
        self.file_names = file_names
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, position: int) -> dict[str, Any]:
        name = self.file_names[position]
        try:
            image = read_image(os.path.join(self.image_root, name), self.image_format)
        except Exception as error:  # Pillow's decoders raise anything on a broken file
            return {"file_name": name, "skipped": f"{type(error).__name__}: {error}"}
        height, width = image.shape[:2]
        aug_input = T.AugInput(image)
        self.augmentations(aug_input)
        tensor = torch.as_tensor(aug_input.image.transpose(2, 0, 1).copy())
        return {"file_name": name, "image": tensor, "height": height, "width": width}


def _label(teacher: torch.nn.Module, loader: DataLoader) -> Iterator[dict[str, Any]]:
    """Rows of the store for all images of a loader, in its order."""
    for batch in loader:
        outputs: dict[int, Any] = {}
        by_shape: dict[torch.Size, list[int]] = {}
        for i, sample in enumerate(batch):
            if "image" in sample:
                by_shape.setdefault(sample["image"].shape, []).append(i)
        for group in by_shape.values():
            with torch.no_grad():
                results = teacher([batch[i] for i in group])
            outputs.update(zip(group, (r["instances"].to("cpu") for r in results)))
        for i, sample in enumerate(batch):
            if "skipped" in sample:
                yield make_row(sample["file_name"], skipped=sample["skipped"])
            else:
                instances = outputs[i]
                yield make_row(
                    sample["file_name"],
                    sample["height"],
                    sample["width"],
                    instances.pred_boxes.tensor.float().numpy(),
                    instances.scores.float().numpy(),
                    instances.pred_classes.numpy(),
                    _run_lengths(instances.pred_masks) if instances.has("pred_masks") else None,
                )


def _run_lengths(masks: torch.Tensor) -> list[str]:
    """COCO's compressed RLE of masks (N, H, W)."""
    # One mask at a time: pycocotools wants Fortran order, and N of them at image size are large.
    encoded = (mask_util.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8)) for mask in masks)
    return [rle["counts"].decode("ascii") for rle in encoded]


def teacher_config_sha256(cfg: CfgNode) -> str:
    """Hash of the config keys that a teacher's output depends on.

    Where it runs and is stored do not count, and its score thresholds give way to the floor.
    """
    model = cfg.MODEL.clone()
    model.defrost()
    model.WEIGHTS = model.DEVICE = ""
    model.RETINANET.SCORE_THRESH_TEST = model.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    parts = [model.dump(), cfg.INPUT.FORMAT, cfg.INPUT.AUGMENTATION.IMAGE_SIZE, cfg.TEST.DETECTIONS_PER_IMAGE]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _class_names(cfg: CfgNode, given: Sequence[str] | None, checkpoint: dict[str, Any]) -> list[str]:
    names = given or checkpoint.get("classes", {}).get("thing_classes")
    if not names and cfg.DATASETS.TRAIN:
        names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    if not names:
        raise InputError(
            f"{cfg.MODEL.WEIGHTS} does not say what classes it detects: give their names with --classes, "
            "in the order of training."
        )
    return list(names)
