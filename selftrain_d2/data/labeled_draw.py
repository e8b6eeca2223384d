"""A labeled set of which a few images keep their labels: the others become unlabeled images with withheld truth."""

from __future__ import annotations

import json
from pathlib import Path

from selftrain_d2.data.splits import image_order, read_labels
from selftrain_d2.errors import InputError
from selftrain_d2.files import write_text, writing

LABELED, UNLABELED = "labeled.json", "unlabeled.json"


def draw_labeled(json_file: str | Path, folder: Path, number: int, seed: int) -> tuple[Path, Path]:
    """Draw the images that keep their labels, as ``splits --stratified`` does: the first of the order of the seed.

    Args:
        json_file: COCO JSON with the labels of all images.
        folder: gets ``labeled.json`` and ``unlabeled.json``, the source with some of its images each, in its order.
            What is there already must be the same draw.
        number: images to draw.

    Returns:
        The two files.

    Raises:
        InputError: the source is no COCO file of labels or has too few images, or ``folder`` holds another draw.
    """
    coco = read_labels(json_file).file.content
    total = len(coco["images"])
    if not 1 <= number < total:
        raise InputError(
            f"Of the {total} images of {json_file} {number} are to be drawn as labeled ones: draw at least 1, and "
            "leave at least 1."
        )
    drawn = {image["id"] for image in image_order(coco, seed, stratified=True)[:number]}
    files = folder / LABELED, folder / UNLABELED
    for file, labeled in zip(files, (True, False)):
        images = [image for image in coco["images"] if (image["id"] in drawn) is labeled]
        annotations = [a for a in coco["annotations"] if (a["image_id"] in drawn) is labeled]
        content = json.dumps({**coco, "images": images, "annotations": annotations}) + "\n"
        if file.exists() and file.read_text(encoding="utf-8") != content:
            raise InputError(
                f"{file} was drawn from other labels, or as another number of images: choose another output folder."
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(file, content)
    return files
