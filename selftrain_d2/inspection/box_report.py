"""The report on a pseudo-label folder: one HTML page that needs nothing else, its numbers and its pictures.

Layout of the output folder::

    report.html     self-contained: pictures inside, no script, no network
    report.json     every number of the page
    *.png           the diagrams and contact sheets
"""

from __future__ import annotations

import base64
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from selftrain_d2.data.image_files import read_image
from selftrain_d2.files import write_json, write_text, writing
from selftrain_d2.inspection import box_figures as figures
from selftrain_d2.inspection.box_quality import expected_calibration_error
from selftrain_d2.inspection.box_reach import BoxReach
from selftrain_d2.inspection.box_sheet import image_tile, tile_sheet
from selftrain_d2.inspection.box_statistics import LabelStatistics
from selftrain_d2.inspection.checks import find_warnings
from selftrain_d2.inspection.inspect import Inspection, Judgement, SampledImage, group_reasons
from selftrain_d2.inspection.style import THEMES, save_figure
from selftrain_d2.inspection.thresholds import f1_scores, plain

REPORT, NUMBERS = "report.html", "report.json"
THRESHOLD_KEY = "SELFTRAIN.SCORE_THRESH_BY_CLASS"

SHEETS = {
    "random": ("Random images", "Drawn without regard to what was found in them."),
    "most_confident": ("Most confident", "The highest mean score of the boxes that reach the threshold."),
    "least_confident": ("Least confident", "The lowest mean score of the boxes that reach the threshold."),
    "most_crowded": ("Most crowded", "The most boxes that reach the threshold."),
    "empty": ("Empty", "No box reaches the threshold: drawn at random among those."),
}


def write_report(
    found: Inspection, output: str | os.PathLike, reach: BoxReach | None = None
) -> dict[str, Any]:
    """Write the report.

    Args:
        found: from ``inspect_labels``.
        output: folder, made if it is not there. Files of an earlier report in it are replaced.
        reach: which of the human boxes the detector can be taught, where that is known.

    Returns:
        What ``report.json`` holds.

    Raises:
        InputError: the folder cannot be made.
    """
    output = Path(output)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    sheets = {name: _draw_sheet(found, name) for name in SHEETS if found.samples[name]}
    numbers = report_numbers(found)
    if reach is not None:
        numbers["reach"] = reach.numbers()
        if reach.warned:
            numbers["warnings"].append(reach.warning())
    shown = {tile["file"]: tile["problem"] for sheet in sheets.values() for tile in sheet}
    unreadable = [file for file, problem in shown.items() if problem is not None]
    numbers["sampled_images"] = {"shown": len(shown), "not_readable": len(unreadable)}
    if unreadable:
        numbers["warnings"].append(
            f"{len(unreadable):,} of the {len(shown):,} images to show are not there as they were labeled, e.g. "
            f"{unreadable[0]}: say with --image-root where the images are now."
        )
    diagrams = _diagrams(found, reach)
    for name in (*(f"{key}.png" for key in DIAGRAMS), *(f"images_{key}.png" for key in SHEETS)):
        (output / name).unlink(missing_ok=True)  # of an earlier report, with other inputs
    pictures = {name: _themed(draw, output / f"{name}.png") for name, draw in diagrams.items()}
    for name, sheet in sheets.items():
        tile_sheet(
            output / f"images_{name}.png",
            [tile["picture"] for tile in sheet],
            [tile["caption"] for tile in sheet],
            SHEETS[name][0],
        )
    page = (
        _environment()
        .get_template("box_report.html.jinja")
        .render(
            numbers=numbers,
            threshold_words=config_words(numbers),
            diagrams=[(DIAGRAMS[name], picture) for name, picture in pictures.items()],
            sheets=[(*SHEETS[name], sheet) for name, sheet in sheets.items()],
        )
    )
    write_json(output / NUMBERS, numbers)
    write_text(output / REPORT, page)
    return numbers


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of files and classes are anybody's
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=lambda value: f"{value:,}",
        ratio=lambda value, digits=2: "-" if value is None else f"{value:,.{digits}f}",
        percent=lambda value: "-" if value is None else f"{value:.0%}",
    )
    return environment


def report_numbers(found: Inspection) -> dict[str, Any]:
    """Every number of the page, for JSON. Ratios are in [0, 1] and AP in percent; None where undefined."""
    manifest, statistics, human = found.manifest, found.statistics, found.human_statistics
    teacher = ("teacher_weights", "teacher_weights_sha256", "teacher_config_sha256", "date", "versions")
    return {
        "folder": os.path.abspath(found.folder),
        "image_root": manifest["image_root"],
        "teacher": {key: manifest.get(key) for key in teacher},
        "score_floor": manifest["score_floor"],
        "score_thresh": found.score_thresh,
        "images": {
            "listed": manifest["listed"],
            "labeled": manifest["labeled"],
            "empty": manifest["empty"],
            "skipped": len(manifest["skipped"]),
        },
        "skipped_reasons": group_reasons(manifest["skipped"]),
        "warnings": find_warnings(found),
        "pseudo": {"boxes_at_floor": int(statistics.boxes_at[:, 0].sum()), **_set_numbers(statistics)},
        "human": None if human is None else _set_numbers(human),
        "classes": _class_rows(found),
        "recommended": {
            "overall": {"threshold": found.overall.threshold, "reason": found.overall.reason},
            THRESHOLD_KEY: [value for r in found.recommended for value in (r.category, r.threshold)],
        },
        "quality": None if found.judgement is None else _quality_numbers(found.judgement, found),
    }


def _set_numbers(statistics: LabelStatistics) -> dict[str, Any]:
    return {
        "images": statistics.images,
        "images_with_boxes": statistics.images - statistics.empty,
        "images_without_boxes": statistics.empty,
        "share_without_boxes": statistics.empty / statistics.images if statistics.images else None,
        "boxes": statistics.boxes,
        "boxes_per_image": statistics.per_image(statistics.boxes),
        "images_by_boxes": {
            str(n): statistics.boxes_per_image[n] for n in sorted(statistics.boxes_per_image)
        },
        "sizes": dict(zip(("small", "medium", "large"), statistics.coco_sizes.tolist())),
        "whole_image_boxes": statistics.whole_image,
    }


def _class_rows(found: Inspection) -> list[dict[str, Any]]:
    statistics, human, judgement = found.statistics, found.human_statistics, found.judgement
    rows = []
    for i, (name, recommended) in enumerate(zip(found.class_names, found.recommended)):
        boxes = int(statistics.boxes_by_class[i])
        row = {
            "name": name,
            "boxes": boxes,
            "boxes_at_floor": int(statistics.boxes_at[i, 0]),
            "boxes_per_image": statistics.per_image(boxes),
            "recommended": recommended.threshold,
            "boxes_at_recommended": int(statistics.boxes_at[i, statistics.position(recommended.threshold)]),
            "reason": recommended.reason,
        }
        if human is not None:
            humans = int(human.boxes_by_class[i])
            row["human_boxes"], row["human_boxes_per_image"] = humans, human.per_image(humans)
            row["ratio"] = row["boxes_per_image"] / row["human_boxes_per_image"] if humans else None
        if judgement is not None:
            row.update(_judged(judgement, i, statistics.position(found.score_thresh)))
            row.update(judgement.average_precision.get(i, {"AP": None, "AP50": None, "AP75": None}))
        rows.append(row)
    return rows


def _judged(judgement: Judgement, classes: Any, threshold: int) -> dict[str, Any]:
    """Precision, recall and F1 at a position of the grid; classes: one id, or a slice of them."""
    boxes, correct = (int(np.sum(a[classes, threshold])) for a in (judgement.boxes, judgement.correct))
    truth = int(np.sum(judgement.truth[classes]))
    return {
        "judged_boxes": boxes,
        "correct": correct,
        "truth": truth,
        "precision": correct / boxes if boxes else None,
        "recall": correct / truth if truth else None,
        "f1": float(f1_scores(boxes, correct, truth)) if boxes + truth else None,
    }


def _quality_numbers(judgement: Judgement, found: Inspection) -> dict[str, Any]:
    everything = slice(None)
    position = found.statistics.position
    return {
        "images": judgement.images,
        "images_with_truth": judgement.images_with_truth,
        **judgement.average_precision[None],
        "at_threshold": _judged(judgement, everything, position(found.score_thresh)),
        "at_recommended": _judged(judgement, everything, position(found.overall.threshold)),
        "by_threshold": [
            {"threshold": plain(threshold), **_judged(judgement, everything, i)}
            for i, threshold in enumerate(found.thresholds)
        ],
        "reliability": [asdict(row) for row in judgement.reliability],
        "expected_calibration_error": expected_calibration_error(judgement.reliability),
        "expected_calibration_error_at_threshold": expected_calibration_error(judgement.reliability_kept),
    }


# Name of the file -> what the page says under it.
DIAGRAMS = {
    "precision_recall": "Precision, recall and F1 against the score threshold, all classes together.",
    "reliability": "Reliability: how many of the boxes of a score are correct. Pale bars: under 20 boxes.",
    "scores": "Boxes by score; in grey those under the threshold. The axis is logarithmic.",
    "threshold_counts": "Boxes per image that a threshold would leave.",
    "box_sizes": "Box sizes in pixels of the original images, with COCO's limits of small, medium and large.",
    "boxes_per_image": "Boxes per image at the threshold.",
    "reach": "Human boxes that the detector's anchors (or locations) reach, by the image size that it is trained at; "
    "the worst classes. Under the dashed line over a fifth is out of reach.",
    "precision_recall_by_class": "Precision, recall and F1 of the classes with the most true boxes.",
    "scores_by_class": "Boxes by score of the most frequent classes; the number is of boxes at the threshold.",
}


def _diagrams(found: Inspection, reach: BoxReach | None) -> dict[str, Callable[[], Figure]]:
    """What to draw, in the order of ``DIAGRAMS``."""
    statistics, human, judgement = found.statistics, found.human_statistics, found.judgement
    overall, recommended = found.overall.threshold, [r.threshold for r in found.recommended]
    several = len(found.class_names) > 1
    drawings: dict[str, Callable[[], Figure]] = {
        "scores": lambda: figures.score_histogram(statistics),
        "threshold_counts": lambda: figures.boxes_against_threshold(statistics, human, overall),
        "box_sizes": lambda: figures.box_sizes(statistics, human),
        "boxes_per_image": lambda: figures.boxes_per_image(statistics, human),
    }
    if several:
        drawings["scores_by_class"] = lambda: figures.score_histograms_by_class(statistics, found.class_names)
    if reach is not None:
        drawings["reach"] = lambda: figures.reach_by_size(reach)
    if judgement is not None:
        boxes, correct, truth = judgement.boxes, judgement.correct, judgement.truth
        drawings["precision_recall"] = lambda: figures.precision_recall(
            found.thresholds, boxes.sum(0), correct.sum(0), int(truth.sum()), found.score_thresh, overall
        )
        drawings["reliability"] = lambda: figures.reliability_diagram(judgement.reliability)
        if several:
            drawings["precision_recall_by_class"] = lambda: figures.precision_recall_by_class(
                found.thresholds, boxes, correct, truth, recommended, found.class_names
            )
    return {name: drawings[name] for name in DIAGRAMS if name in drawings}


def _themed(draw: Callable[[], Figure], path: Path) -> dict[str, Any]:
    """The picture for each theme as a data URI, and its size in CSS pixels; the light one is written to a file."""
    picture: dict[str, Any] = {}
    for name in ("dark", "light"):
        with rc_context(THEMES[name]):
            figure = draw()
            # The light one last: it is the file that stays.
            save_figure(figure, path)
        picture[name] = _data_uri("png", path.read_bytes())
        picture["width"], picture["height"] = (round(100 * inches) for inches in figure.get_size_inches())
    return picture


def _draw_sheet(found: Inspection, name: str) -> list[dict[str, Any]]:
    return [_draw_tile(sample, found.class_names) for sample in found.samples[name]]


def _draw_tile(sample: SampledImage, class_names: list[str]) -> dict[str, Any]:
    record = sample.record
    size = (record["height"], record["width"])
    image, problem = _read(record["file_name"], size)
    picture, counts = image_tile(
        image,
        size,
        record["annotations"],
        sample.truth,
        problem=problem or "",
        class_names=class_names,
    )
    scores = [a["score"] for a in record["annotations"]]
    if scores:
        counts += f", mean score {np.mean(scores):.2f}"
    _, jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return {
        "file": record["file_name"],
        "name": record["image_id"],
        "caption": counts,
        "problem": problem,
        "picture": picture,
        "uri": _data_uri("jpeg", jpeg.tobytes()),
        "height": picture.shape[0],
        "width": picture.shape[1],
    }


def _read(file: str, size: tuple[int, int]) -> tuple[np.ndarray | None, str | None]:
    """The image, or why there is none to show."""
    try:
        image = read_image(file, "RGB")
    except FileNotFoundError:
        return None, "image file not found"
    except Exception as error:  # Pillow's decoders raise anything on a broken file
        return None, f"image file cannot be read ({type(error).__name__})"
    if image.shape[:2] != size:
        return None, f"image file is {image.shape[1]} x {image.shape[0]}, labeled was {size[1]} x {size[0]}"
    return image, None


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def config_words(numbers: dict[str, Any]) -> str:
    """The recommended thresholds as the two words, key and value, of a shell's command line."""
    value = json.dumps(numbers["recommended"][THRESHOLD_KEY], ensure_ascii=False)
    return f"{THRESHOLD_KEY} {shlex.quote(value)}"
