"""A batch whose loss was not finite: saved when it happens, looked at afterwards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.data.random_state import stage_seed
from selftrain_d2.engine.resume import step_seed
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint_file import save_weights
from selftrain_d2.modeling.meta_arch.classification import CLASSIFICATION_WEIGHT, add_classification_head

# What an image of a batch is saved with, besides its instances.
_SAVED = ("file_name", "image_id", "height", "width", "label_source", "image", "sem_seg", "class_id")


def save_batch(
    cfg: CfgNode,
    model: nn.Module,
    step: int,
    batch: list[dict],
    losses: dict[str, float],
) -> str:
    """Write all that is needed to repeat a step's forward and backward pass into OUTPUT_DIR.

    Args:
        cfg: the run's config.
        model: with the weights that the step began with.
        step: its number.
        batch: of this process.
        losses: weighted, by name.

    Returns:
        The file's path. It holds tensors, numbers and text: loading it runs no code.

    Raises:
        InputError: the disk is full, or the file cannot be written.
    """
    rank, seed = comm.get_rank(), stage_seed(cfg)
    file = Path(cfg.OUTPUT_DIR) / f"not_finite_step_{step:07d}_rank_{rank}.pth"
    content = {
        "step": step,
        "seed": None if seed is None else step_seed(seed, step, rank),
        "losses": losses,
        "loss_weights": list(model.loss_weights),
        "positive_anchor_averages": dict(getattr(model, "positive_anchor_averages", {})),
        "config": cfg.dump(),
        "model": model.state_dict(),
        "batch": [_to_plain(sample) for sample in batch],
    }
    save_weights(content, file)
    return str(file)


def replay(file: str | os.PathLike, device: str | None = None) -> dict[str, Any]:
    """Repeat the forward and backward pass of a saved batch, and say where it goes wrong.

    The losses are those of the run, but for batch norm of accumulated steps and positive anchors of other processes.

    Args:
        file: what :func:`save_batch` wrote.
        device: in place of the run's MODEL.DEVICE.

    Returns:
        ``step``; ``saved_losses`` and ``losses`` (weighted, by name); ``parameters``, the names of weights that
        are not finite; ``module``, the first module whose output was not finite in the forward pass, or None;
        ``gradients``, the names of weights with a gradient that is not finite; ``images``, one dict each with
        ``file_name, label_source, size`` (H, W), ``pixels`` (smallest, largest), ``boxes``, and ``problems`` of
        its boxes in words.

    Raises:
        InputError: the file is no saved batch.
    """
    content = _load(file)
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.set_new_allowed(True)  # a project may have keys of its own
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(content["config"])))
    if device is not None:
        cfg.MODEL.DEVICE = device
    elif cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    if CLASSIFICATION_WEIGHT in content["model"]:
        num_classes = len(content["model"][CLASSIFICATION_WEIGHT])
        add_classification_head(model, num_classes, cfg.SELFTRAIN.CLASSIFICATION_LOSS_WEIGHT)
    model.train()
    model.load_state_dict(content["model"], strict=False)
    model.loss_weights = tuple(content["loss_weights"])
    model.positive_anchor_averages = content["positive_anchor_averages"]
    batch = [_from_plain(sample) for sample in content["batch"]]
    if content["seed"] is not None:
        torch.manual_seed(content["seed"])
    culprits: list[str] = []
    handles = [m.register_forward_hook(_watch(name, culprits)) for name, m in model.named_modules() if name]
    precision = getattr(torch, cfg.SOLVER.AMP.PRECISION) if cfg.SOLVER.AMP.ENABLED else None
    device_type = torch.device(cfg.MODEL.DEVICE).type
    with EventStorage(), torch.autocast(device_type, precision, enabled=precision is not None):
        losses = model(batch)
    for handle in handles:
        handle.remove()
    sum(losses.values()).backward()
    return {
        "step": content["step"],
        "saved_losses": content["losses"],
        "losses": {name: loss.item() for name, loss in losses.items()},
        "parameters": [n for n, p in model.named_parameters() if not torch.isfinite(p).all()],
        "module": culprits[0] if culprits else None,
        "gradients": [
            n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
        ],
        "images": [_describe(sample) for sample in content["batch"]],
    }


def _load(file: str | os.PathLike) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if not {"batch", "config", "model", "positive_anchor_averages"} <= set(content):
            raise ValueError
        return content
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        reason = error.strerror if isinstance(error, OSError) else "it is damaged or has other content"
        raise InputError(f"{file} is not a batch saved by training ({reason}).") from error


def _watch(name: str, culprits: list[str]):
    """A forward hook. Inner modules end before outer ones, so the first name is the innermost."""

    def hook(module, inputs, output) -> None:
        if not culprits and not all(torch.isfinite(t).all() for t in _tensors(output)):
            culprits.append(f"{name} ({type(module).__name__})")

    return hook


def _tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (list, tuple)):
        return []
    return [tensor for part in output for tensor in _tensors(part)]


# ---- samples as tensors, numbers and text -------------------------------------------------------

# Field of Instances -> to and from what can be saved.
_FIELDS = {
    Boxes: ("boxes", lambda x: x.tensor, Boxes),
    BitMasks: ("bit_masks", lambda x: x.tensor, BitMasks),
    PolygonMasks: (
        "polygons",
        lambda x: [[torch.as_tensor(p) for p in polygons] for polygons in x.polygons],
        lambda x: PolygonMasks([[p.numpy() for p in polygons] for polygons in x]),
    ),
    Tensor: ("tensor", lambda x: x, lambda x: x),
}


def _to_plain(sample: dict[str, Any]) -> dict[str, Any]:
    plain = {key: sample[key] for key in _SAVED if key in sample}
    if "ignored_boxes" in sample:
        plain["ignored_boxes"] = sample["ignored_boxes"].tensor
    if "instances" in sample:
        fields = {}
        for name, value in sample["instances"].get_fields().items():
            for kind, (label, to_plain, _) in _FIELDS.items():
                if isinstance(value, kind):
                    fields[name] = (label, to_plain(value))
        plain["instances"] = {"image_size": list(sample["instances"].image_size), "fields": fields}
    return plain


def _from_plain(plain: dict[str, Any]) -> dict[str, Any]:
    sample = dict(plain)
    if "ignored_boxes" in plain:
        sample["ignored_boxes"] = Boxes(plain["ignored_boxes"])
    if "instances" in plain:
        restore = {label: from_plain for label, _, from_plain in _FIELDS.values()}
        sample["instances"] = Instances(tuple(plain["instances"]["image_size"]))
        for name, (label, value) in plain["instances"]["fields"].items():
            sample["instances"].set(name, restore[label](value))
    return sample


def _describe(plain: dict[str, Any]) -> dict[str, Any]:
    image = plain["image"]
    height, width = image.shape[-2:]
    boxes = torch.zeros(0, 4)
    if "instances" in plain and "gt_boxes" in plain["instances"]["fields"]:
        boxes = plain["instances"]["fields"]["gt_boxes"][1]
    problems = []
    if not torch.isfinite(boxes).all():
        problems.append("boxes that are not finite")
    if (boxes[:, 2:] <= boxes[:, :2]).any():
        problems.append("boxes without area")
    if ((boxes < -1) | (boxes > torch.tensor([width, height, width, height]) + 1)).any():
        problems.append("boxes outside the image")
    return {
        "file_name": plain.get("file_name", "?"),
        "label_source": plain.get("label_source", "human"),
        "size": (height, width),
        "pixels": (image.min().item(), image.max().item()),
        "boxes": len(boxes),
        "problems": problems,
    }
