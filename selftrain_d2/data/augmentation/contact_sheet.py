"""Pictures of what augmentation does: policies on a data set, and every operation at several levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances, PolygonMasks
from fvcore.transforms.transform import NoOpTransform
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from selftrain_d2.data.augmentation.ops import (
    BOX_OPERATIONS,
    OPERATION_NAMES,
    OperationSettings,
    RandomOperation,
)

# Okabe and Ito's colors, which people with any color vision can tell apart.
_CLASS_COLORS = ("#F0E442", "#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#0072B2", "#FFFFFF")
_LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
_DPI = 100


def policy_sheet(
    mappers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]],
    records: Sequence[dict[str, Any]],
    image_format: str,
    seed: int,
) -> Figure:
    """Draw augmented samples: a row a policy, a column an image.

    Args:
        mappers: for each row's name the mapper that makes its samples.
        records: dataset dicts, one a column.
        image_format: channel order of the samples' images.
        seed: of the random numbers; those of a column are the same in every row.

    Returns:
        A figure, to be saved.
    """
    rows = []
    for mapper in mappers.values():
        row = []
        for column, record in enumerate(records):
            np.random.seed(seed + column)
            sample = mapper(record)
            image = utils.convert_image_to_rgb(sample["image"].permute(1, 2, 0), image_format)
            row.append((image, sample["instances"]))
        rows.append(row)
    figure, axes = _grid(rows, tile_inches=2.0, gap=0.03)
    for row_axes, name in zip(axes, mappers):
        row_axes[0].text(
            0.03, 0.94, name, transform=row_axes[0].transAxes, fontsize=9, va="top", bbox=_LABEL_BOX
        )
    return figure


def operation_sheet(
    image: np.ndarray,
    boxes: np.ndarray,
    settings: OperationSettings,
    seed: int,
    levels: Sequence[float] = (3, 6, 10, 15),
) -> Figure:
    """Draw every operation on one image, at rising levels.

    Args:
        image: (H, W, 3) uint8, in the settings' channel order.
        boxes: (N, 4) XYXY in pixels.
        settings: as the policies have them.
        seed: of the random numbers (signs, places, boxes), the same for every level.
        levels: one a picture of each operation.

    Returns:
        A figure, to be saved.
    """
    series = {}
    for name in OPERATION_NAMES:
        row = []
        for level in levels:
            np.random.seed(seed)
            transform = NoOpTransform()
            # Inside boxes an operation is done for a third of them: look for a draw that has some.
            for _ in range(20 if name in BOX_OPERATIONS else 1):
                if isinstance(transform, NoOpTransform):
                    transform = RandomOperation(name, 1.0, level, settings).get_transform(image, boxes)
            sample = T.AugInput(image, boxes=boxes.copy())
            sample.transform(transform)
            instances = Instances(image.shape[:2])
            instances.gt_boxes = Boxes(sample.boxes)
            instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
            rgb = utils.convert_image_to_rgb(sample.image, settings.image_format)
            row.append((rgb, utils.filter_empty_instances(instances)))
        series[name] = row
    names = list(series)
    half = (len(names) + 1) // 2  # two operations beside each other
    rows = [[picture for name in names[i::half] for picture in series[name]] for i in range(half)]
    figure, axes = _grid(rows, tile_inches=1.3, gap=0.22)
    for index, name in enumerate(names):
        first = axes[index % half, index // half * len(levels) :]
        first[0].set_title(name, fontsize=8, loc="left", pad=3)
        for ax, level in zip(first, levels):
            ax.text(0.04, 0.05, f"{level:g}", transform=ax.transAxes, fontsize=7, bbox=_LABEL_BOX)
    return figure


def _grid(rows, tile_inches: float, gap: float) -> tuple[Figure, np.ndarray]:
    """Rows of pictures (an RGB image and what is on it); ``gap`` is a share of a tile, between rows."""
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(tile_inches * columns, tile_inches * len(rows) * (1 + gap)), dpi=_DPI)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=1 - 0.9 * gap / len(rows))
    spacing = {"wspace": 0.03, "hspace": gap}
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=spacing)
    for row_axes, row in zip(axes, rows):
        for ax, picture in zip(row_axes, row):
            _draw(ax, *picture)
        for ax in row_axes[len(row) :]:
            ax.set_axis_off()
    return figure, axes


def _draw(ax: Axes, image: np.ndarray, instances: Instances) -> None:
    """Boxes and masks, colored by class, on an RGB image (H, W, 3)."""
    ax.imshow(image)
    ax.set(xticks=[], yticks=[], xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))
    for index, (box, class_id) in enumerate(
        zip(instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist())
    ):
        color = _CLASS_COLORS[class_id % len(_CLASS_COLORS)]
        x0, y0, x1, y1 = box
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=0.9))
        if not instances.has("gt_masks"):
            continue
        if isinstance(instances.gt_masks, PolygonMasks):
            for polygon in instances.gt_masks.polygons[index]:
                ax.add_patch(Polygon(np.reshape(polygon, (-1, 2)), facecolor=color, alpha=0.4))
        else:
            ax.imshow(instances.gt_masks.tensor[index].numpy()[..., None] * to_rgba(color, 0.4))
