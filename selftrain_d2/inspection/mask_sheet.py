"""Label maps side by side: the image, and a column for each source of masks, with a legend of colours."""

from __future__ import annotations

import os
from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from selftrain_d2.data.image_files import read_image
from selftrain_d2.data.label_maps import VOID, voc_colours
from selftrain_d2.errors import InputError
from selftrain_d2.inspection.box_sheet import GAP, HEADER, INCHES
from selftrain_d2.inspection.style import GREY, save_figure, shortened

IGNORED = "#8A8A8A"
LEGEND_COLUMNS, LEGEND_ROW = 6, 26  # the height of a row in thousandths of the sheet's width
STRIPE = 6  # pixels of the sheet
CLASSES_SHOWN = 24  # in the legend


def mask_contact_sheet(
    path: str | os.PathLike,
    images: Sequence[str | os.PathLike],
    columns: Sequence[tuple[str, Sequence[np.ndarray]]],
    class_names: Sequence[str],
    *,
    width: int = 1200,
) -> None:
    """Draw images in rows: as they are, then with the label map of each column over them.

    Pixels of the label 255 are hatched in grey; those of a class named "background" show the image.

    Args:
        path: picture to write; its suffix (``.png``, ``.jpg``) gives the format.
        images: one a row.
        columns: a title and a label map (H, W) for each image.
        class_names: by class id.
        width: of the picture, in pixels.

    Raises:
        InputError: no image, or a column with more or fewer label maps than images.
    """
    if not images or not columns:
        raise InputError("A contact sheet needs at least one image and one column of masks.")
    for title, maps in columns:
        if len(maps) != len(images):
            raise InputError(f"Column {title!r} has {len(maps)} masks, but {len(images)} images are shown.")
    colours = class_colours(class_names)
    present = np.unique(np.concatenate([np.unique(labels) for _, maps in columns for labels in maps]))
    shown = [i for i in present.tolist() if i < len(class_names) and not _is_background(class_names[i])]
    patches = [Patch(color=colours[i] / 255, label=shortened(class_names[i])) for i in shown[:CLASSES_SHOWN]]
    if VOID in present:
        patches.append(Patch(facecolor="#D0D0D0", edgecolor=IGNORED, hatch="////", label="ignored"))

    scale = width / 1000
    gap, header = round(GAP * scale), round(0.6 * HEADER * scale)
    footer = round(LEGEND_ROW * scale * (-(-len(patches) // LEGEND_COLUMNS) + 0.5))
    number = len(columns) + 1
    cell = (width - gap * (number + 1)) // number
    pictures = [read_image(image, "RGB") for image in images]
    heights = [round(cell * picture.shape[0] / picture.shape[1]) for picture in pictures]
    total = header + footer + sum(heights) + gap * (len(heights) - 1)
    figure = Figure((INCHES, INCHES * total / width), dpi=width / INCHES, facecolor="white")
    for column in range(number):
        left, top = gap + column * (cell + gap), header
        title = "Image" if column == 0 else columns[column - 1][0]
        middle = (left + cell / 2) / width
        figure.text(middle, 1 - 0.5 * header / total, title, size=7, weight="bold", ha="center", va="center")
        for row, (picture, height) in enumerate(zip(pictures, heights)):
            tile = cv2.resize(picture, (cell, height), interpolation=cv2.INTER_CUBIC)
            if column:
                tile = painted(tile, columns[column - 1][1][row], colours, class_names)
            axes = figure.add_axes((left / width, 1 - (top + height) / total, cell / width, height / total))
            axes.imshow(tile, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            top += height + gap
    figure.legend(
        handles=patches,
        loc="lower center",
        ncols=LEGEND_COLUMNS,
        fontsize=7,
        labelcolor=GREY,
        frameon=False,
        borderaxespad=0.2,
    )
    save_figure(figure, path)


def painted(
    tile: np.ndarray, labels: np.ndarray, colours: np.ndarray, class_names: Sequence[str]
) -> np.ndarray:
    """A picture (h, w, 3) uint8 with the label map (H, W) over it, enlarged by nearest neighbours."""
    height, width = tile.shape[:2]
    labels = cv2.resize(np.asarray(labels, np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    grey = np.repeat(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    result = (0.6 * grey).astype(np.uint8)
    for i in np.unique(labels):
        inside = labels == i
        if i < len(class_names) and not _is_background(class_names[i]):
            result[inside] = (0.15 * grey[inside] + 0.85 * colours[i]).astype(np.uint8)
    y, x = np.indices((height, width))
    stripes = np.where(((x + y) // STRIPE) % 2, 138, 208).astype(np.uint8)[..., None]
    return np.where((labels == VOID)[..., None], stripes, result)


def class_colours(class_names: Sequence[str]) -> np.ndarray:
    """(C, 3) uint8 RGB. Up to 20 classes besides the background: well apart; else PASCAL VOC's."""
    objects = [i for i, name in enumerate(class_names) if not _is_background(name)]
    colours = voc_colours()[: len(class_names)].copy()
    if len(objects) <= 20:
        palette = colormaps["tab10" if len(objects) <= 10 else "tab20"].colors
        colours[objects] = np.rint(255 * np.array(palette[: len(objects)])).reshape(-1, 3)
    return colours


def _is_background(name: str) -> bool:
    return name.lower() == "background"
