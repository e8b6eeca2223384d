"""Pictures of pseudo labels: boxes on images, one by one or side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke

from selftrain_d2.data.image_files import read_image
from selftrain_d2.errors import InputError
from selftrain_d2.inspection.box_quality import Annotations, BoxMatches, match_boxes
from selftrain_d2.inspection.style import (
    GREY,
    SKY_BLUE,
    VERMILION,
    WHITE,
    YELLOW,
    save_figure,
    shortened,
)

# Kinds of boxes: line style, and the legend's words.
STYLES = {
    "human": ({"color": YELLOW}, "human box"),
    "plain": ({"color": SKY_BLUE}, "predicted box"),
    "correct": ({"color": SKY_BLUE}, "correct (IoU at least 0.5)"),
    "wrong": ({"color": VERMILION}, "wrong"),
    "missed": ({"color": WHITE, "linestyle": (0, (2, 1.5))}, "missed"),
    "ignored": ({"color": "#BBBBBB", "linestyle": (0, (1, 1))}, "ignored, not counted"),
}

INCHES = 6  # width of the sheet; what is measured in points keeps its size relative to it
# In thousandths of the contact sheet's width: between tiles, above them, below them.
GAP, HEADER, FOOTER = 8, 62, 46


def contact_sheet(
    path: str | os.PathLike,
    images: Sequence[str | os.PathLike | np.ndarray],
    predictions: Sequence[tuple[str, Sequence[Annotations]]],
    truth: Sequence[Annotations] | None = None,
    *,
    truth_title: str = "Human boxes",
    class_names: Sequence[str] | None = None,
    width: int = 1200,
) -> None:
    """Draw images in rows: the human boxes, then one column for each source of predicted boxes.

    With ``truth`` every predicted box is coloured by whether it is right (matched at IoU 0.5 as in
    ``quality.match_boxes``), and what it missed is dashed.

    Args:
        path: picture to write; its suffix (``.png``, ``.jpg``) gives the format.
        images: files, or arrays ``(H, W, 3)`` uint8 RGB; one a row.
        predictions: columns: a title and the boxes of every image, as detectron2 annotations with ``score``.
        truth: human boxes of every image, in the same form; ``iscrowd`` marks what does not count.
        class_names: by contiguous category id: written beside the score if there are several classes.
        width: of the picture, in pixels.

    Raises:
        InputError: no image, or a column with more or fewer box lists than images.
    """
    columns = [(truth_title, truth)] if truth is not None else []
    columns += predictions
    for title, boxes in columns:
        if len(boxes) != len(images):
            raise InputError(
                f"Column {title!r} has boxes for {len(boxes)} images, but {len(images)} are shown."
            )
    if not images or not columns:
        raise InputError("A contact sheet needs at least one image and one column of boxes.")

    gap, header, footer = (round(length * width / 1000) for length in (GAP, HEADER, FOOTER))
    cell = (width - gap * (len(columns) + 1)) // len(columns)
    pictures = [image if isinstance(image, np.ndarray) else read_image(image, "RGB") for image in images]
    scales = [cell / picture.shape[1] for picture in pictures]
    heights = [round(picture.shape[0] * scale) for picture, scale in zip(pictures, scales)]
    total = header + footer + sum(heights) + gap * (len(heights) - 1)
    dpi = width / INCHES
    figure = Figure((INCHES, total / dpi), dpi=dpi, facecolor="white")

    used: set[str] = set()
    for column, (title, boxes) in enumerate(columns):
        left, top = gap + column * (cell + gap), header
        matches = match_boxes(boxes, truth) if truth is not None and boxes is not truth else None
        center = (left + cell / 2) / width
        figure.text(center, 1 - 0.36 * header / total, title, size=8, weight="bold", ha="center", va="center")
        counts = _counts(boxes, matches)
        figure.text(center, 1 - 0.74 * header / total, counts, size=6.2, color=GREY, ha="center", va="center")
        kinds = _kinds(boxes, truth, matches)
        for row, (picture, height) in enumerate(zip(pictures, heights)):
            rectangle = (left / width, 1 - (top + height) / total, cell / width, height / total)
            axes = figure.add_axes(rectangle, xlim=(0, cell), ylim=(height, 0), xticks=[], yticks=[])
            enlarged = cv2.resize(picture, (cell, height), interpolation=cv2.INTER_CUBIC)
            axes.imshow(enlarged, extent=(0, cell, height, 0), interpolation="nearest", aspect="auto")
            axes.spines[:].set_visible(False)
            for annotation, kind in kinds[row]:
                _draw_box(axes, annotation, kind, scales[row], class_names)
                used.add(kind)
            top += height + gap
    _write_legend(figure, [kind for kind in STYLES if kind in used])
    save_figure(figure, path)


def image_tile(
    image: np.ndarray | None,
    size: tuple[int, int],
    boxes: Annotations,
    truth: Annotations | None = None,
    *,
    problem: str = "",
    class_names: Sequence[str] | None = None,
    side: int = 512,
) -> tuple[np.ndarray, str]:
    """Draw one image with its boxes, and masks where they have some.

    Args:
        image: (H, W, 3) uint8 RGB, or None where there is none to show: then the boxes are drawn on grey.
        size: (height, width) in pixels that the boxes are meant for.
        boxes: predicted ones, coloured by their outcome if there is ``truth``.
        problem: words to write over the picture.
        side: the longer side of the picture, in pixels.

    Returns:
        The picture, (h, w, 3) uint8 RGB, and the counts in words.
    """
    scale = side / max(size)
    height, width = (max(1, round(length * scale)) for length in size)
    if image is None:
        picture = np.full((height, width, 3), 110, np.uint8)
    else:
        shrinks = image.shape[0] > height
        picture = cv2.resize(
            image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        )
    matches = None if truth is None else match_boxes([boxes], [truth])
    (kinds,) = _kinds([boxes], None if truth is None else [truth], matches)
    for annotation, kind in kinds:
        _paint_mask(picture, annotation, STYLES[kind][0]["color"])
    dpi = side / 2  # lines and words are measured in points: this keeps them legible at half the size
    figure = Figure((width / dpi, height / dpi), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    names = None if class_names is None else [shortened(name) for name in class_names]
    for annotation, kind in kinds:
        _draw_box(axes, annotation, kind, scale, names)
    if problem:
        axes.text(
            width / 2,
            height / 2,
            problem,
            color="white",
            fontsize=6.5,
            ha="center",
            va="center",
            wrap=True,
            bbox={"facecolor": "#1C2128", "edgecolor": "none", "pad": 3, "alpha": 0.8},
        )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy(), _counts([boxes], matches)


def tile_sheet(
    path: str | os.PathLike,
    tiles: Sequence[np.ndarray],
    captions: Sequence[str],
    title: str,
    columns: int = 4,
) -> None:
    """Write pictures (h, w, 3) as a grid with a line under each."""
    rows = -(-len(tiles) // columns)
    figure = Figure((2.2 * columns, 2.45 * rows + 0.35), dpi=130, facecolor="white", layout="constrained")
    figure.suptitle(title, size=9, weight="bold")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, tile, caption in zip(figure.axes, tiles, captions):
        axes.imshow(tile)
        axes.set_title(caption, size=5.5, y=-0.02, va="top", color=GREY)
    save_figure(figure, path)


def _paint_mask(picture: np.ndarray, annotation: Mapping[str, Any], color: str) -> None:
    """Tint the pixels of an annotation's mask, if it has one in COCO's RLE."""
    mask = annotation.get("segmentation")
    if not isinstance(mask, Mapping):
        return
    inside = mask_util.decode(dict(mask))
    inside = cv2.resize(inside, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
    tint = 255 * np.array(to_rgb(color))
    picture[inside] = (0.6 * picture[inside] + 0.4 * tint).astype(np.uint8)


def _kinds(
    boxes: Sequence[Annotations], truth: Sequence[Annotations] | None, matches: BoxMatches | None
) -> list[list[tuple[Mapping[str, Any], str]]]:
    """Per image: what to draw, in drawing order, each annotation with a key of ``STYLES``."""
    if matches is None:
        kind = "human" if boxes is truth else "plain"
        return [[(a, "ignored" if a.get("iscrowd") else kind) for a in image] for image in boxes]
    outcomes = np.where(matches.correct, "correct", np.where(matches.ignored, "ignored", "wrong"))
    outcome = iter(outcomes.tolist())
    missed = iter((~matches.truth_found & ~matches.truth_ignored).tolist())
    return [
        [(a, "missed") for a in true if next(missed)] + [(a, next(outcome)) for a in predicted]
        for predicted, true in zip(boxes, truth)
    ]


def _counts(boxes: Sequence[Annotations], matches: BoxMatches | None) -> str:
    if matches is None:
        total = sum(not a.get("iscrowd") for image in boxes for a in image)
        return f"{total} box" if total == 1 else f"{total} boxes"
    wrong = int((~matches.correct & ~matches.ignored).sum())
    return f"{int(matches.correct.sum())} of {int((~matches.truth_ignored).sum())} found, {wrong} wrong"


def _draw_box(
    axes: Axes,
    annotation: Mapping[str, Any],
    kind: str,
    scale: float,
    class_names: Sequence[str] | None,
) -> None:
    box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    left, top, right, bottom = (scale * side for side in box)
    style = STYLES[kind][0]
    # A thin dark rim keeps the line visible on bright ground.
    rim = [Stroke(linewidth=1.7, foreground="black", alpha=0.55), Normal()]
    axes.add_patch(
        Rectangle(
            (left, top), right - left, bottom - top, fill=False, linewidth=0.9, path_effects=rim, **style
        )
    )
    if "score" not in annotation or kind == "ignored":
        return
    label = f"{annotation['score']:.2f}".removeprefix("0")
    if class_names is not None and len(class_names) > 1:
        label = f"{class_names[annotation['category_id']]} {label}"
    axes.text(
        # Inside the picture, also for a box that reaches out of it.
        max(left, 0) + 1,
        max(top, 0) + 1,
        label,
        fontsize=4.6,
        va="top",
        clip_on=True,
        bbox={"facecolor": style["color"], "edgecolor": "none", "pad": 0.5, "alpha": 0.85},
    )


def _write_legend(figure: Figure, kinds: Sequence[str]) -> None:
    handles = [
        Line2D(
            [],
            [],
            linewidth=1.6,
            path_effects=[Stroke(linewidth=2.4, foreground="#444444"), Normal()],
            **style,
        )
        for style, _ in (STYLES[kind] for kind in kinds)
    ]
    figure.legend(
        handles,
        [STYLES[kind][1] for kind in kinds],
        loc="lower center",
        ncols=max(1, len(kinds)),
        fontsize=6.2,
        frameon=False,
        borderaxespad=0.6,
        handlelength=2.4,
        columnspacing=2.0,
    )
