"""SimCLR (arXiv:2002.05709) on a detector's backbone: loss and projection head are lightly's."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone, build_backbone
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.backbone.bottom_up import bottom_up_of, coarsest_feature

logger = logging.getLogger(__name__)

# Of the paper's ResNet-50 (section 2.1, and its code): 2048 -> 2048 -> 128.
HIDDEN_CHANNELS = 2048
PROJECTION_CHANNELS = 128


class SimCLR(nn.Module):
    """A backbone that learns to tell which two views show the same image.

    In several processes the images of all are compared.

    Args:
        backbone: its feature of the largest stride is averaged over the view and projected.
        temperature: of the loss (NT-Xent).
    """

    def __init__(self, backbone: Backbone, temperature: float):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        super().__init__()
        self.backbone = backbone
        self.feature = coarsest_feature(backbone)
        channels = backbone.output_shape()[self.feature].channels
        self.head = SimCLRProjectionHead(channels, HIDDEN_CHANNELS, PROJECTION_CHANNELS)
        self.loss = NTXentLoss(temperature, gather_distributed=comm.get_world_size() > 1)

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        """
        Args:
            views: (N, 2, 3, H, W), normalized: two of each of N images.

        Returns:
            The loss, as ``loss_contrastive``. ``contrastive_accuracy`` goes to the EventStorage.
        """
        # Batch norm sees both views of all images, as in the paper's code.
        views = views.to(next(self.parameters()).device, non_blocking=True).transpose(0, 1).flatten(0, 1)
        feature = self.backbone(views)[self.feature]
        with torch.autocast(feature.device.type, enabled=False):
            first, second = self.head(feature.float().mean(dim=(2, 3))).chunk(2)
            loss = self.loss(first, second)
        get_event_storage().put_scalar("contrastive_accuracy", contrastive_accuracy(first, second))
        return {"loss_contrastive": loss}


@torch.no_grad()
def contrastive_accuracy(first: Tensor, second: Tensor) -> float:
    """Share of the 2N views whose most similar other view is that of the same image; by chance 1 / (2N - 1).

    Args:
        first, second: (N, C), the projections of two views of each of N images.
    """
    projections = nn.functional.normalize(torch.cat([first, second]), dim=1)
    similarities = (projections @ projections.T).fill_diagonal_(-torch.inf)
    partners = torch.arange(len(projections), device=projections.device).roll(len(first))
    return (similarities.argmax(dim=1) == partners).float().mean().item()


def build_bottom_up(cfg: CfgNode) -> Backbone:
    """The part of a config's backbone that can be pre-trained: without the pyramid, and with nothing frozen.

    MODEL.BACKBONE.FREEZE_AT counts as 0, and FrozenBN as batch norm over all processes.

    Raises:
        InputError: the backbone makes no feature map with a stride.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        logger.info("MODEL.BACKBONE.FREEZE_AT does not count here: every layer trains.")
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
    for keys in (cfg.MODEL.EFFICIENTNET, cfg.MODEL.SPINENET):
        if keys.NORM == "FrozenBN":
            keys.NORM = "SyncBN"
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":  # detectron2's SyncBN works on GPUs alone
        cfg.MODEL.RESNETS.NORM = "BN" if comm.get_world_size() == 1 else "naiveSyncBN"
    bottom_up = bottom_up_of(build_backbone(cfg))
    shapes = bottom_up.output_shape()
    if not shapes or any(shape.stride is None or shape.channels is None for shape in shapes.values()):
        raise InputError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} has no feature maps that SimCLR could train: use one "
            "with an EfficientNet, a SpineNet or a ResNet."
        )
    return bottom_up
