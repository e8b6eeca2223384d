"""Predict on many images, or on a video, and write files and pictures."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selftrain_d2 import storage
from selftrain_d2.data.coco_file import read_coco_listing
from selftrain_d2.data.image_files import read_image
from selftrain_d2.data.image_sources import ImageSource, check_outside, images_of_coco_entries
from selftrain_d2.data.unlabeled_images import collect_images
from selftrain_d2.deployment.detector import Detector
from selftrain_d2.deployment.pictures import drawn, write_picture
from selftrain_d2.deployment.prediction_files import PredictionFiles
from selftrain_d2.deployment.video import EXTENSIONS, Video, written_video
from selftrain_d2.errors import InputError

logger = logging.getLogger(__name__)


def predict(
    detector: Detector,
    places: Sequence[str],
    output: str | os.PathLike,
    *,
    image_root: str | None = None,
    pictures: bool = True,
    score_thresh: float = 0.5,
) -> dict[str, Any]:
    """Write predictions, and pictures of them.

    Args:
        places: one video file; or what ``collect_images`` takes: folders, image files, lists, COCO files,
            tar archives. Of a single COCO file the ids are used.
        output: folder of ``predictions.json``, ``predictions.csv``, ``pictures/`` (of a video: ``<its name>.mp4``) and,
            of a segmentor, ``masks/`` (PNG: class and percent).
        image_root: what paths in lists and COCO files are relative to.
        score_thresh: pictures show boxes from here; the files have all.

    Returns:
        Numbers of images, of predictions, and ``skipped``: a reason by file name.

    Raises:
        InputError: see those; every image is unreadable.
    """
    if len(places) == 1 and places[0].lower().endswith(EXTENSIONS):
        return _predict_video(detector, places[0], Path(output), pictures, score_thresh)
    for place in places:
        if os.path.isdir(place):
            check_outside(output, place)
    if _is_coco(places):
        source, ids = _coco_images(places[0], image_root, detector.class_names)
    else:
        source, ids = collect_images(places, image_root, ("--images", "--image-root")), {}
    skipped: dict[str, str] = {}
    with PredictionFiles(output, detector.class_names, pixels=detector.makes_masks, **ids) as files:
        found = detector.files(*source)
        for sample, prediction in tqdm(found, desc="predict", unit="image", total=len(source.file_names)):
            name = sample["file_name"]
            if isinstance(prediction, str):
                skipped[name] = prediction
                continue
            files.add(name, prediction)
            if pictures:
                path = os.path.join(source.image_root, name)
                image = read_image(path, "RGB", large=detector.tiles is not None)
                write_picture(output, name, drawn(image, prediction, detector.class_names, score_thresh))
        if len(skipped) == len(source.file_names):
            name, reason = next(iter(skipped.items()))
            raise InputError(f"None of the {len(skipped)} images can be read, e.g. {name} ({reason}).")
    if skipped:
        name, reason = next(iter(skipped.items()))
        logger.warning(
            f"{len(skipped)} of {len(source.file_names)} images were skipped, e.g. {name} ({reason})."
        )
    return {
        "images": len(source.file_names) - len(skipped),
        "predictions": files.number,
        "skipped": skipped,
    }


def _predict_video(
    detector: Detector, path: str, output: Path, pictures: bool, score_thresh: float
) -> dict[str, Any]:
    """Frames are named ``<file name>#<number>``, from 0."""
    if detector.channel_order != "RGB":
        raise InputError("Frames of a video are RGB: make the Detector with channel_order='RGB'.")
    video, name = Video(path), os.path.basename(path)
    target = output / f"{Path(name).stem}.mp4"
    if target.resolve() == Path(path).resolve():
        raise InputError(f"The video {path} would be written over: choose another --output.")
    number, names = 0, detector.class_names
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(PredictionFiles(output, names, pixels=detector.makes_masks))
        add = stack.enter_context(written_video(target, video.rate)) if pictures else None
        shown, seen = itertools.tee(video.frames())  # apart by a batch at most
        frames = tqdm(detector.stream(seen), desc="predict", unit="frame", total=video.number or None)
        for number, prediction in enumerate(frames, start=1):
            frame = next(shown)
            files.add(f"{name}#{number - 1}", prediction)
            if add is not None:
                add(drawn(frame, prediction, names, score_thresh))
    return {"images": number, "predictions": files.number, "skipped": {}}


def _is_coco(places: Sequence[str]) -> bool:
    return len(places) == 1 and places[0].lower().endswith(".json") and not storage.is_folder(places[0])


def _coco_images(
    json_file: str, image_root: str | None, class_names: Sequence[str]
) -> tuple[ImageSource, dict[str, Any]]:
    """The images of a COCO file, with its ``image_ids`` and ``category_ids``."""
    content = read_coco_listing(json_file)
    source = images_of_coco_entries(json_file, content["images"], image_root or storage.folder_of(json_file))
    image_ids = {name: image.get("id", name) for name, image in zip(source.file_names, content["images"])}
    known = {
        c["name"]: c["id"]
        for c in content.get("categories") or ()
        if isinstance(c, dict) and {"name", "id"} <= c.keys()
    }
    missing = [name for name in class_names if name not in known]
    if missing and known:
        logger.warning(
            f"{json_file} has no category {missing[0]!r}, which the model knows: category_id counts its classes from 1."
        )
    return source, {"image_ids": image_ids, "category_ids": None if missing else known}
