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
    for name, mapper in mappers.items():
        row = []
        for column, record in enumerate(records):
            np.random.seed(seed + column)
            sample = mapper(record)
            image = utils.convert_image_to_rgb(sample["image"].permute(1, 2, 0), image_format)
            row.append((image, sample["instances"]))
        rows.append([(name, row)])
    return _grid(rows, tile_inches=2.0)


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
        series[name.replace("_", "\n", 1)] = row
    names = list(series)
    half = (len(names) + 1) // 2  # two operations beside each other
    rows = [[(n, series[n]) for n in names[i::half]] for i in range(half)]
    return _grid(rows, tile_inches=1.3, column_titles=[f"level {level:g}" for level in levels])


def _grid(rows, tile_inches: float, column_titles: Sequence[str] = ()) -> Figure:
    """Rows of series, each a name and its pictures (an RGB image and what is on it)."""
    columns = sum(len(pictures) for _, pictures in rows[0])
    size = tile_inches * columns + 0.3 * len(rows[0]), tile_inches * len(rows) + 0.2 * bool(column_titles)
    figure = Figure(figsize=size, dpi=_DPI, layout="tight")
    figure.get_layout_engine().set(pad=0.3, w_pad=0.1, h_pad=0.1)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row_axes, row in zip(axes, rows):
        for ax in row_axes:
            ax.set_axis_off()
        start = 0
        for name, pictures in row:
            for ax, (image, instances) in zip(row_axes[start:], pictures):
                _draw(ax, image, instances)
            row_axes[start].set_ylabel(name, fontsize=7)
            start += len(pictures)
    for index, ax in enumerate(axes[0] if column_titles else ()):
        ax.set_title(column_titles[index % len(column_titles)], fontsize=8, pad=3)
    return figure


def _draw(ax: Axes, image: np.ndarray, instances: Instances) -> None:
    """Boxes and masks, colored by class, on an RGB image (H, W, 3)."""
    ax.set_axis_on()
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
