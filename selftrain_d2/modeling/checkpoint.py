"""Loading weights into a model: safely, completely, and with the input statistics they were made for."""

from __future__ import annotations

import glob
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlparse

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from selftrain_d2.errors import InputError
from selftrain_d2.files import write_text
from selftrain_d2.modeling.backbone.bottom_up import bottom_up_name
from selftrain_d2.modeling.backbone.efficientnet import EfficientNet
from selftrain_d2.modeling.checkpoint_file import (
    averaged_weights,
    file_sha256,
    read_checkpoint,
    save_weights,
    state_dict_of,
)
from selftrain_d2.modeling.classes import is_segmentor, stored_classes
from selftrain_d2.modeling.meta_arch.classification import CLASSIFICATION_HEAD
from selftrain_d2.modeling.named_weights import load_named

__all__ = [
    "BEST_WEIGHTS",
    "FINAL_WEIGHTS",
    "WEIGHT_AVERAGE",
    "LoadReport",
    "SafeDetectionCheckpointer",
    "anchor_sizes",
    "check_input_statistics",
    "checkpoints_in",
    "file_sha256",
    "load_weights",
    "other_anchors",
    "require_complete",
    "require_same_anchors",
    "require_same_backbone",
    "require_same_model",
    "run_weights",
    "steps_of",
]

logger = logging.getLogger(__name__)

#: What a finished run leaves below its folder: its weights; their moving average (SELFTRAIN.WEIGHT_EMA_DECAY), and the
#: best that were evaluated (TEST.BEST_METRIC), where it has them.
FINAL_WEIGHTS = "model_final.pth"
WEIGHT_AVERAGE = os.path.join("weight_average", FINAL_WEIGHTS)
BEST_WEIGHTS = os.path.join("best", "model_best.pth")

_INPUT_KEYS = {"format", "pixel_mean", "pixel_std"}


@dataclass
class LoadReport:
    """What a checkpoint and a model had in common. Names are those of state dicts.

    Attributes:
        matched: tensors of the model that the file filled.
        missing: tensors of the model that keep their values. (Statistics that older files lack and PyTorch
            knows defaults for are neither matched nor missing.)
        unexpected: tensors of the file that the model has no use for.
        incorrect_shapes: (name, shape in the file, shape in the model); also in ``missing``.
        input: input statistics that came with the file (see :func:`check_input_statistics`), or None.
        classes, image_classes: names of the classes that came with the file, of boxes (or pixels) and of the head for
            joint training, each by id; or None.
        anchor_sizes: that came with the file (see :func:`anchor_sizes`), or None.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    incorrect_shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    input: dict[str, Any] | None = None
    classes: list[str] | None = None
    image_classes: list[str] | None = None
    anchor_sizes: list | None = None


class SafeDetectionCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer for files from anywhere.

    It does all that its base does (model zoo names and formats, resuming with optimizer, scheduler and
    hooks), and besides

    * runs no code from a file unless told to,
    * reads ``.safetensors``, and EfficientNet weights under efficientnet-pytorch's own names
      (``_blocks.7._expand_conv.weight``) behind any prefix,
    * refuses files that leave a part of the backbone at its initial values. Heads may differ, as in
      fine-tuning to other classes: that is only logged.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        allow_unsafe: bool = False,
        averaged: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            model, save_dir, kwargs: of ``DetectionCheckpointer``.
            allow_unsafe: unpickle files that can run any code. Only for trusted sources.
            averaged: load the moving average that a checkpoint of training carries, in place of its weights.
        """
        super().__init__(model, save_dir, **kwargs)
        self.allow_unsafe = allow_unsafe
        self.averaged = averaged
        # Of the last successful load.
        self.report: LoadReport | None = None

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint. An empty path loads nothing.

        Raises:
            InputError: the file is missing, damaged, not safe to read, or does not fit the model. The model
                may be partly loaded then.
        """
        if path:
            self._require_file(path)
        self._path = path
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # the base forgets this after an exception

    def save(self, name: str, **kwargs: Any) -> None:
        """Save as the base does, but the file is there whole or not at all.

        Raises:
            InputError: the disk is full, or the file cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        file = os.path.join(self.save_dir, f"{name}.pth")
        logger.info(f"Saving checkpoint to {file}")
        save_weights({"model": self.model.state_dict(), **state, **kwargs}, file)
        self.tag_last_checkpoint(os.path.basename(file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As the base does; where the last checkpoint is damaged, resume from the one before, with a warning.

        Of several processes, which must all call this, the main one chooses for all: a file server may show another
        machine an older state of the folder for a while.

        Raises:
            InputError: see :meth:`load`; or every checkpoint in ``save_dir`` is damaged.
        """
        choice = self._whole_checkpoint() if resume and comm.is_main_process() else ("", "")
        file, problem = comm.all_gather(choice)[0]
        if problem:
            raise InputError(problem)
        return self.load(file) if file else super().resume_or_load(path, resume=False)

    def _whole_checkpoint(self) -> tuple[str, str]:
        """The last checkpoint that can be read, and why none can, though there are some; each may be empty."""
        if not self.has_checkpoint():
            return "", ""
        last = self.get_checkpoint_file()
        newest = steps_of(last) if last else math.inf
        # By their steps, those of a run that was gone back on at the end; clocks of machines differ.
        files = sorted(
            checkpoints_in(self.save_dir), key=lambda f: (f != last, steps_of(f) > newest, -steps_of(f))
        )
        for file in files:
            try:
                read_checkpoint(file, self.allow_unsafe)
            except InputError as error:
                logger.warning(f"Cannot resume from {file}, trying the one before: {error}")
            else:
                return file, ""
        return "", (
            f"No checkpoint in {self.save_dir} can be read (the last was {last}): delete that folder to start anew."
        )

    def has_checkpoint(self) -> bool:
        """Also where a process was killed between its first checkpoint and the file that names the last."""
        return super().has_checkpoint() or bool(self.save_dir and checkpoints_in(self.save_dir))

    def _require_file(self, path: str) -> None:
        name = urlparse(path)._replace(query="").geturl()
        try:
            local = self.path_manager.get_local_path(name)
            found = self.path_manager.isfile(local)
        except (OSError, RuntimeError, KeyError) as error:
            raise InputError(f"Weights {path} cannot be fetched ({error}): check MODEL.WEIGHTS.") from error
        if not found:
            raise InputError(f"Weights {path} do not exist: check MODEL.WEIGHTS.")

    def _load_file(self, filename: str) -> dict[str, Any]:
        if self.averaged:
            loaded = read_checkpoint(filename, self.allow_unsafe)
            return {**loaded, "model": averaged_weights(loaded, self._path)}
        named = load_named(self._path, filename, self.allow_unsafe)
        if named is not None:
            return named
        if filename.endswith((".safetensors", ".pyth")):  # .pyth: pycls
            state = state_dict_of(read_checkpoint(filename, self.allow_unsafe), self._path)
            return {"model": state, "matching_heuristics": filename.endswith(".pyth")}
        # The base knows the many layouts of .pkl but unpickles anything: read it safely before.
        if filename.endswith(".pkl") and not isinstance(read_checkpoint(filename, self.allow_unsafe), dict):
            raise InputError(f"Weights {self._path} hold no named tensors: give a file of model weights.")
        loaded = super()._load_file(filename)
        loaded["model"] = state_dict_of(loaded, self._path)
        return loaded

    def _torch_load(self, filename: str) -> dict[str, Any]:
        loaded = read_checkpoint(filename, self.allow_unsafe)
        state = state_dict_of(loaded, self._path)
        return {**loaded, "model": state} if "model" in loaded else {"model": state}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        state = _with_model_prefix(checkpoint["model"], self.model)
        if state is checkpoint["model"] and checkpoint.get("matching_heuristics", False):
            caffe2 = checkpoint.get("__author__") == "Caffe2"
            state = align_and_update_state_dicts(self.model.state_dict(), state, c2_conversion=caffe2)
        if getattr(self.model, CLASSIFICATION_HEAD, None) is None:  # a head for joint training alone
            state = {n: value for n, value in state.items() if not n.startswith(f"{CLASSIFICATION_HEAD}.")}
        checkpoint.update(model=state, matching_heuristics=False)
        # In place, the base drops a prefix "module." and tensors of other shapes from the state dict.
        incompatible = super()._load_model(checkpoint)
        self.report = LoadReport(
            matched=[name for name in self.model.state_dict() if name in state],
            missing=list(incompatible.missing_keys),
            unexpected=list(incompatible.unexpected_keys),
            incorrect_shapes=list(incompatible.incorrect_shapes),
            input=checkpoint.get("input"),
            classes=stored_classes(checkpoint, "classes", "thing_classes"),
            image_classes=stored_classes(checkpoint, "classification", "classification_classes"),
            anchor_sizes=dict(checkpoint.get("anchors") or {}).get("anchor_sizes"),
        )
        _require_fit(self.model, self.report, self._path)
        return incompatible


def checkpoints_in(folder: str | os.PathLike) -> list[str]:
    """Checkpoints that training wrote into a folder. Batches saved for `replay` lie beside them."""
    return sorted(glob.glob(os.path.join(glob.escape(os.fspath(folder)), "model_*.pth")))


def steps_of(checkpoint: str | os.PathLike) -> float:
    """After how many steps a checkpoint of :func:`checkpoints_in` was written, by its name; infinity: the final one."""
    match = re.fullmatch(r"model_(\d+)\.pth", os.path.basename(checkpoint))
    return int(match[1]) + 1 if match else math.inf


def run_weights(cfg: CfgNode) -> str:
    """The weights that a finished run is used by, below its folder: to label, as a student's start, to be exported.

    The best ones where SELFTRAIN.TEACHER_CHECKPOINT says so, else the average where there is one, else the last.
    """
    if cfg.SELFTRAIN.TEACHER_CHECKPOINT == "best":
        return BEST_WEIGHTS
    return WEIGHT_AVERAGE if cfg.SELFTRAIN.WEIGHT_EMA_DECAY else FINAL_WEIGHTS


def load_weights(
    model: nn.Module, path: str, allow_unsafe: bool = False, averaged: bool = False
) -> LoadReport:
    """Load weights for inference or as a starting point: nothing but the model's tensors.

    Args:
        model: a detector, or a backbone alone.
        path: local file, URL, or a name: ``detectron2://...``, ``timm://...``.
        allow_unsafe, averaged: see :class:`SafeDetectionCheckpointer`.

    Raises:
        InputError: see :meth:`SafeDetectionCheckpointer.load`; also an empty path.
    """
    if not path:
        raise InputError("MODEL.WEIGHTS is empty: give a file of weights.")
    checkpointer = SafeDetectionCheckpointer(model, allow_unsafe=allow_unsafe, averaged=averaged)
    checkpointer.load(path, checkpointables=[])
    return checkpointer.report


def check_input_statistics(checkpoint_input: Mapping[str, Any] | None, cfg: CfgNode) -> str | None:
    """Compare the input that weights were trained with to the one that the config gives them.

    Args:
        checkpoint_input: ``format`` ("RGB" or "BGR"), ``pixel_mean`` and ``pixel_std`` (per channel in that
            order, for pixels in 0-255): entry ``input`` of a file of ``convert_weights.py``. None: unknown.
        cfg: INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are looked at.

    Returns:
        The warning that was logged, with the right values; None if all is well or unknown.
    """
    if not isinstance(checkpoint_input, Mapping) or not checkpoint_input.keys() >= _INPUT_KEYS:
        return None
    wanted = (checkpoint_input["format"], checkpoint_input["pixel_mean"], checkpoint_input["pixel_std"])
    given = (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    # One grey level: 127 and 127.5 are both in use for the same weights.
    if wanted[0] == given[0] and all(
        len(a) == len(b) and np.allclose(a, b, rtol=0, atol=1.0) for a, b in zip(wanted[1:], given[1:])
    ):
        return None
    message = (
        "The weights were trained with another input than the config gives them; set "
        "INPUT.FORMAT {} MODEL.PIXEL_MEAN {} MODEL.PIXEL_STD {} (now {}, {}, {})."
    ).format(*(list(v) if not isinstance(v, str) else v for v in (*wanted, *given)))
    logger.warning(message)
    return message


def _with_model_prefix(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """EfficientNet weights under the names they have in this model; ``state`` itself if all is well."""
    stem = "_conv_stem.weight"
    source = next((name[: -len(stem)] for name in state if name.endswith(stem)), None)
    modules = model.named_modules()
    target = next((f"{name}." if name else "" for name, m in modules if isinstance(m, EfficientNet)), None)
    if source is None or target is None or source == target:
        return state
    classifier = tuple(source + name for name in ("_conv_head.", "_bn1.", "_fc."))
    return {
        target + name[len(source) :] if name.startswith(source) else name: value
        for name, value in state.items()
        if not name.startswith(classifier)
    }


def _require_fit(model: nn.Module, report: LoadReport, path: str) -> None:
    """All of the backbone, or of whatever model it is at least something, must have been filled."""
    if not report.matched:
        raise InputError(
            f"Weights {path} fit nothing in the model ({len(report.unexpected)} tensors, none of the model's "
            f"{len(report.missing)}): check MODEL.WEIGHTS, or convert them with tools/convert_weights.py."
        )
    prefix = _backbone_prefix(model)
    if prefix is None:
        return
    names = [n for n in model.state_dict() if n.startswith(prefix) and not n.endswith("num_batches_tracked")]
    missing = set(report.missing)
    absent = [name for name in names if name in missing]
    if absent:
        examples = ", ".join(absent[:3]) + (" ..." if len(absent) > 3 else "")
        raise InputError(
            f"Weights {path} fill only {len(names) - len(absent)} of the backbone's {len(names)} tensors "
            f"(absent or of another shape: {examples}): give weights of the same backbone "
            "(MODEL.EFFICIENTNET.NAME, MODEL.SPINENET.NAME, MODEL.RESNETS.DEPTH), or convert them with "
            "tools/convert_weights.py."
        )


def require_same_backbone(source: nn.Module, target: nn.Module, path: str) -> None:
    """Raise InputError if a model cannot start from the weights that another will have. Only shapes are looked at.

    Args:
        path: where the weights will be, for the message.
    """
    shapes = {name: value.shape for name, value in source.state_dict().items()}
    fits = {name: shapes.get(name) == value.shape for name, value in target.state_dict().items()}
    report = LoadReport(
        matched=[name for name, fit in fits.items() if fit],
        missing=[name for name, fit in fits.items() if not fit],
        unexpected=[name for name in shapes if name not in fits],
        incorrect_shapes=[],
    )
    _require_fit(target, report, path)


def require_complete(report: LoadReport, path: str) -> None:
    """Raise InputError if weights left a part of a model as it was, which those of a trained model do not."""
    missing = [name for name in report.missing if not name.endswith("num_batches_tracked")]
    if missing:
        examples = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise InputError(
            f"Weights {path} are not those of a trained model of this config: {len(missing)} tensors are absent or of "
            f"another shape ({examples}): give the config that they were trained with, its NUM_CLASSES included."
        )


def anchor_sizes(cfg: CfgNode) -> list | None:
    """MODEL.ANCHOR_GENERATOR.SIZES as checkpoints of our trainer carry them; None for a segmentor."""

    def plain(sizes: Any) -> Any:
        return [plain(size) for size in sizes] if isinstance(sizes, (list, tuple)) else float(sizes)

    return None if is_segmentor(cfg) else plain(cfg.MODEL.ANCHOR_GENERATOR.SIZES)


def other_anchors(report: LoadReport, cfg: CfgNode) -> str | None:
    """What is wrong where weights were trained with anchors of other sizes than the config's; None if nothing is."""
    known, given = report.anchor_sizes, anchor_sizes(cfg)
    if known is None or given is None or known == given:
        return None
    return f"Weights {cfg.MODEL.WEIGHTS} were trained with MODEL.ANCHOR_GENERATOR.SIZES {known}, the config has {given}"


def require_same_anchors(report: LoadReport, cfg: CfgNode) -> None:
    """Raise InputError if a detector's boxes would be decoded from other anchors than it was trained with."""
    problem = other_anchors(report, cfg)
    if problem:
        raise InputError(f"{problem}: give the config.yaml of the run that made them.")


def require_same_model(report: LoadReport, folder: str) -> None:
    """Raise InputError if the checkpoint that a run in ``folder`` is to go on from was of another model."""
    other = [
        name for name in (*report.missing, *report.unexpected) if not name.endswith("num_batches_tracked")
    ]
    if other:
        raise InputError(
            f"The checkpoint in {folder} is of another model than this config's ({len(other)} tensors are absent, left "
            f"over, or of another shape, e.g. {other[0]}): give the config that the run was begun with, or another "
            "OUTPUT_DIR."
        )


def _backbone_prefix(model: nn.Module) -> str | None:
    """Prefix of the part that can be pre-trained, without the pyramid."""
    if isinstance(model, EfficientNet):
        return ""
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        return None
    inner = bottom_up_name(backbone)
    return f"backbone.{inner}." if inner else "backbone."
