"""Anchors of given widths and heights. Importing this module registers the generator with detectron2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator


@ANCHOR_GENERATOR_REGISTRY.register()
class ShapeAnchorGenerator(DefaultAnchorGenerator):
    """Anchors whose width and height are each a factor of their size: MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS are pairs.

    detectron2's ratios keep the area of an anchor. EfficientDet's (1.4, 0.7) and (0.7, 1.4) do not quite
    (github.com/google/automl, efficientdet/hparams_config.py), and its weights are trained for them:
    ``ASPECT_RATIOS [[[1.0, 1.0], [1.4, 0.7], [0.7, 1.4]]]``, a list for all levels, of (width, height).
    """

    def generate_cell_anchors(
        self, sizes: Sequence[float], aspect_ratios: Sequence[tuple[float, float]]
    ) -> torch.Tensor:
        """All shapes of the first size, then of the next: (sizes * shapes, 4), XYXY around (0, 0), in pixels."""
        half = torch.tensor([(size * w, size * h) for size in sizes for w, h in aspect_ratios]) / 2
        return torch.cat([-half, half], dim=1)
