"""SimCLR pre-training of a detector's backbone on images without labels."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.utils.data import DataLoader

from selftrain_d2.data.contrastive_views import ReadabilityCheck
from selftrain_d2.data.image_sources import check_distinct
from selftrain_d2.data.loader import use_one_thread
from selftrain_d2.data.pseudo_labels.manifest import NameHash
from selftrain_d2.engine.config_checks import amp_precision
from selftrain_d2.engine.logs import log_to_console, log_to_file
from selftrain_d2.engine.run_folder import held
from selftrain_d2.engine.simclr_training import SimCLRSettings, build_simclr, train_simclr
from selftrain_d2.errors import InputError
from selftrain_d2.files import NO_ROOM, check_unchanged, is_empty, read_json, write_json, writing
from selftrain_d2.modeling.checkpoint import file_sha256
from selftrain_d2.modeling.checkpoint_file import save_weights
from selftrain_d2.modeling.simclr import SimCLR
from selftrain_d2.modeling.torch_flags import torch_flag

logger = logging.getLogger(__name__)

#: In the output folder: what the run was begun with, and the images that could not be read.
RECORD = "simclr.json"
#: In the output folder: the pre-trained backbone, for MODEL.WEIGHTS; written last.
BACKBONE = "backbone.pth"


def pretrain_simclr(
    cfg: CfgNode,
    image_root: str,
    file_names: Sequence[str],
    output: str | os.PathLike,
    settings: SimCLRSettings,
    *,
    allow_unsafe: bool = False,
) -> Path:
    """Pre-train the backbone of a config and write it as ``backbone.pth``, for MODEL.WEIGHTS.

    Every parameter of the backbone trains, FREEZE_AT or not. MODEL.WEIGHTS, where set, is where it starts.
    Work that was stopped goes on when called again and ends, on a CPU, with the weights of work that was not.
    In several processes (detectron2's ``launch``) each takes its share of every batch.

    Args:
        cfg: a detector's; MODEL.DEVICE, DATALOADER.NUM_WORKERS, SOLVER.AMP and SEED count as in training.
        image_root, file_names: see :class:`~selftrain_d2.data.image_sources.ImageSource`. Images that cannot be
            read are left out and listed in ``output/simclr.json``.
        output: folder to write: checkpoints, ``metrics.json``, ``log.txt``.
        settings: how to train.
        allow_unsafe: load MODEL.WEIGHTS even if that is a pickle that can run code.

    Returns:
        The path of ``backbone.pth``.

    Raises:
        InputError: lightly is not installed; a setting is out of range; fewer readable images than a batch;
            ``output`` holds other work; see also :func:`~selftrain_d2.modeling.simclr.build_bottom_up`.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    _require_lightly()
    settings.check()
    _check_input(cfg)
    if cfg.SOLVER.AMP.ENABLED:
        amp_precision(cfg)
    _check_batch(settings.batch_size, len(file_names), 0)
    output = Path(output)
    check_distinct(file_names, "The list of images")
    identity = _identity(cfg, image_root, file_names, settings)
    record = _read_record(output, identity)
    if comm.all_gather((output / BACKBONE).exists())[0]:
        logger.info(f"{output} is finished already.")
        return output / BACKBONE
    if record is None:
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        record = {"settings": identity, "seed": seed, "skipped": None}
    seed_all_rng(record["seed"] + comm.get_rank())
    model = build_simclr(cfg, settings, allow_unsafe)
    if record["skipped"] is None:
        record["skipped"] = _unreadable(cfg, image_root, file_names)
        _check_batch(settings.batch_size, len(file_names), len(record["skipped"]))
    skipped = record["skipped"]
    suffix = f".rank{comm.get_rank()}" if comm.get_rank() else ""
    # All mistakes have been found: the work begins.
    with held(output), writing(output, NO_ROOM), log_to_file(output / f"log.txt{suffix}"):
        if comm.is_main_process() and not (output / RECORD).exists():
            write_json(output / RECORD, record)
        if comm.get_world_size() > 1 and comm.is_main_process():  # a new process
            log_to_console()
        if skipped:
            name, reason = next(iter(skipped.items()))
            logger.warning(
                f"{len(skipped)} images cannot be read and are left out, e.g. {name} ({reason}); all are listed in "
                f"{output / RECORD}."
            )
        paths = [os.path.join(image_root, name) for name in file_names if name not in skipped]
        with torch_flag(torch.backends.cudnn, "benchmark", cfg.CUDNN_BENCHMARK):
            train_simclr(cfg, model, paths, output, settings, record["seed"])
        if comm.is_main_process():
            _write_backbone(cfg, model, output / BACKBONE, identity)
            logger.info(f"Wrote {output / BACKBONE}: train a detector with MODEL.WEIGHTS {output / BACKBONE}")
    comm.synchronize()
    return output / BACKBONE


def _write_backbone(cfg: CfgNode, model: SimCLR, file: Path, identity: dict[str, Any]) -> None:
    """In the format of ``convert``."""
    content = {
        "model": {
            name: value.detach().cpu().contiguous() for name, value in model.backbone.state_dict().items()
        },
        "matching_heuristics": True,  # names lack the detector's prefix
        "input": {
            "format": cfg.INPUT.FORMAT,
            "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
            "pixel_std": list(cfg.MODEL.PIXEL_STD),
        },
        "source": {"format": "SimCLR pre-training", **identity},
    }
    save_weights(content, file)


def _require_lightly() -> None:
    try:
        import lightly.loss
        import lightly.transforms  # noqa: F401
    except ImportError as error:
        raise InputError(f"SimCLR needs the package lightly ({error}): pip install lightly.") from error


def _check_input(cfg: CfgNode) -> None:
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise InputError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}: SimCLR's colour augmentations need RGB or BGR."
        )
    if not len(cfg.MODEL.PIXEL_MEAN) == len(cfg.MODEL.PIXEL_STD) == 3:
        raise InputError("MODEL.PIXEL_MEAN and MODEL.PIXEL_STD need three values each, one a channel.")


def _check_batch(batch_size: int, images: int, skipped: int) -> None:
    readable, left_out = images - skipped, f" ({skipped} cannot be read)" if skipped else ""
    if readable < 2:
        raise InputError(f"SimCLR compares images, but there are only {readable}{left_out}: give it more.")
    if batch_size > readable:
        raise InputError(
            f"--batch-size is {batch_size}, more than the {readable} images{left_out}: make it at most {readable}."
        )
    if batch_size % comm.get_world_size():
        raise InputError(
            f"--batch-size {batch_size} does not divide by the {comm.get_world_size()} processes."
        )


def _identity(
    cfg: CfgNode, image_root: str, file_names: Sequence[str], settings: SimCLRSettings
) -> dict[str, Any]:
    """What the result depends on, as JSON reads it back."""
    return {
        **dataclasses.asdict(settings),
        "SEED": cfg.SEED,
        "INPUT.FORMAT": cfg.INPUT.FORMAT,
        "MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
        "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
        "SOLVER.AMP": cfg.SOLVER.AMP.dump(),
        "processes": comm.get_world_size(),
        "MODEL.BACKBONE.NAME": cfg.MODEL.BACKBONE.NAME,
        "MODEL.EFFICIENTNET": cfg.MODEL.EFFICIENTNET.dump(),
        "MODEL.SPINENET": cfg.MODEL.SPINENET.dump(),
        "MODEL.RESNETS": cfg.MODEL.RESNETS.dump(),
        "MODEL.FPN.IN_FEATURES": list(cfg.MODEL.FPN.IN_FEATURES),
        "starting weights": file_sha256(cfg.MODEL.WEIGHTS)
        if os.path.isfile(cfg.MODEL.WEIGHTS)
        else cfg.MODEL.WEIGHTS,
        "image root": image_root,
        "images": len(file_names),
        "image names (sha256)": NameHash(file_names).hexdigest(),
    }


def _read_record(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What an unfinished run wrote down, the same in all processes; None if there is none.

    Raises:
        InputError: it had other settings, or the folder holds something else.
    """
    file = output / RECORD
    record = comm.all_gather(read_json(file) if file.exists() else None)[0]
    if record is not None:
        check_unchanged(output, record["settings"], identity)
    elif not is_empty(output, RECORD):
        raise InputError(f"{output} is not empty and has no {RECORD}: choose another output folder.")
    return record


def _unreadable(cfg: CfgNode, image_root: str, file_names: Sequence[str]) -> dict[str, str]:
    """Names of images that cannot be read, with the reason. Each process reads its share."""
    share = file_names[comm.get_rank() :: comm.get_world_size()]
    logger.info(f"Reading {len(file_names)} images once, to leave out what cannot be read.")
    reasons = DataLoader(
        ReadabilityCheck(image_root),
        sampler=share,
        batch_size=None,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        worker_init_fn=use_one_thread,
        generator=torch.Generator(),
    )
    found = {name: reason for name, reason in zip(share, reasons) if reason}
    return {name: reason for part in comm.all_gather(found) for name, reason in part.items()}
