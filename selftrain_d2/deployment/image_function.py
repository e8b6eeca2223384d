"""What the models have in common as functions of images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from selftrain_d2.errors import InputError


class ImageFunction(nn.Module):
    """Input, normalization and padding.

    Attributes:
        outputs: names of what ``forward`` returns.
        score_threshold: of the config, for those that take one.
    """

    outputs: tuple[str, ...]
    score_threshold: float = 0.0

    def __init__(self, model: nn.Module, image_format: str):
        super().__init__()
        self.model = model
        self.flips_channels = image_format == "BGR"
        constraints = model.backbone.padding_constraints
        if constraints.get("square_size", 0):
            raise InputError(
                "A backbone that needs images of one square size cannot be exported at any size."
            )
        self.divisor = max(constraints.get("size_divisibility", model.backbone.size_divisibility), 1)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Of RGB images (N, 3, H, W), uint8."""
        x = images.flip(1) if self.flips_channels else images
        x = (x.float() - self.model.pixel_mean) / self.model.pixel_std
        bottom, right = -x.shape[2] % self.divisor, -x.shape[3] % self.divisor
        return self.model.backbone(F.pad(x, (0, right, 0, bottom)))
