"""Recall of tiles against whole images on the large photograph of trees, for the table of docs/deployment.md.

    python docs/evidence/tiles_on_trees.py output/trees/teacher --output output/tiles_on_trees

RUN is a detector trained on the labeled tiles of `selftrain-d2 prepare-neon-trees`, eleven of which are a strip of this
photograph: crowns that touch the strip, and what is found in it, count neither way.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from selftrain_d2.cli import main as selftrain_d2
from selftrain_d2.experiments.datasets.neon_trees import REGIONS, TILE, read_wheel

SCORES = (0.05, 0.2, 0.3, 0.4, 0.5)
# Limits of an image, which has as many trees as all tiles together.
MANY = ["TEST.DETECTIONS_PER_IMAGE", "20000", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "20000"]


def at_size(pixels):
    keys = ("INPUT.AUGMENTATION.IMAGE_SIZE", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST")
    return [word for key in keys for word in (key, str(pixels))]


# The tiles are trained on at 256 pixels, 4 / 3 of their size: so is the photograph of 2472 rows at 3296.
ARMS = {
    "whole": ([], []),
    "whole, 1024 pixels": ([], [*at_size(1024), *MANY]),
    "whole, 3296 pixels": ([], [*at_size(3296), *MANY]),
    f"tiles of {TILE}": (["--tile", str(TILE), "--overlap", "0.2"], []),
    f"tiles of {2 * TILE}": (["--tile", str(2 * TILE), "--overlap", "0.2"], []),
}


def truth_of(boxes, width, height, strip):
    top, bottom = strip
    in_strip = (boxes[:, 1] < bottom) & (boxes[:, 3] > top)
    boxes = np.vstack([boxes, [0, top, width, bottom]])
    crowd = [*in_strip, True]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1, "file_name": "photograph.png", "width": width, "height": height}],
        "categories": [{"id": 1, "name": "Tree"}],
        "annotations": [
            {
                "id": i,
                "image_id": 1,
                "category_id": 1,
                "bbox": [*box[:2], *(box[2:] - box[:2])],
                "area": float(np.prod(box[2:] - box[:2])),
                "iscrowd": int(seen),
            }
            for i, (box, seen) in enumerate(zip(boxes, crowd), start=1)
        ],
    }
    coco.createIndex()
    return coco


def judged(truth, results):
    """AP at IoU 0.5, and recall and precision from each of SCORES on."""
    row = {"boxes": len(results), "recall": {}, "precision": {}}
    for least in SCORES:
        kept = [{**r, "image_id": 1, "category_id": 1} for r in results if r["score"] >= least]
        if not kept:
            continue
        judge = COCOeval(truth, truth.loadRes(kept), "bbox")
        judge.params.maxDets, judge.params.iouThrs = [1, 100, len(kept)], np.array([0.5])
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
        judge.accumulate()
        (one,) = judge.evalImgs
        counts = ~one["dtIgnore"][0].astype(bool)
        right = int(((one["dtMatches"][0] > 0) & counts).sum())
        row["recall"][least] = right / int((~np.array(one["gtIgnore"], bool)).sum())
        row["precision"][least] = right / max(int(counts.sum()), 1)
        if least == SCORES[0]:
            row["AP50"] = 100 * float(judge.eval["precision"][0, :, 0, 0, -1].mean())
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of the detector")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    strip = next(region for region in REGIONS if region.part == "labeled")
    photograph = read_wheel()[0][strip.image]
    height, width = photograph.pixels.shape[:2]
    args.output.mkdir(parents=True, exist_ok=True)
    image = args.output / "photograph.png"
    cv2.imwrite(str(image), photograph.pixels)
    truth = truth_of(photograph.boxes, width, height, (strip.y, strip.y + strip.rows * TILE))
    rows = {}
    run = ["--config-file", f"{args.run}/config.yaml"]
    weights = ["MODEL.WEIGHTS", f"{args.run}/model_final.pth"]
    for name, (options, keys) in ARMS.items():
        folder = args.output / name.replace(",", "").replace(" ", "_")
        words = ["--images", str(image), "--output", str(folder), "--no-pictures", *options]
        if selftrain_d2(["predict", *run, *words, *weights, *keys]):
            raise SystemExit(f"{name}: predict failed.")
        rows[name] = judged(truth, json.loads((folder / "predictions.json").read_text()))
        print(name, rows[name], flush=True)
    (args.output / "figures.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
