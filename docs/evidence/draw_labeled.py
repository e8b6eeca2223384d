"""Draw the labeled images of each seed of docs/evidence.md: labeled.json, unlabeled.json (withheld truth), and links.

    python docs/evidence/draw_labeled.py train.json images --labeled 80 --seeds 0 1 2 3 4 --output data/playing_cards

With --also two parts of a data set, whose images differ in name, are one to draw from:

    python docs/evidence/draw_labeled.py data/neon_trees/labeled.json data/neon_trees/images/labeled --labeled 20 \\
        --also data/neon_trees/unlabeled_truth.json data/neon_trees/images/unlabeled --seeds 0 1 \\
        --output data/neon_trees_20

The draw is that of `selftrain-d2 self-train --draw`. A grid, which runs single commands, needs a folder of each part.
"""

import argparse
import json
from pathlib import Path

from selftrain_d2.data.labeled_draw import draw_labeled


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--labeled", type=int, required=True, help="images that keep their labels")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--also", type=Path, nargs=2, metavar=("JSON", "IMAGES"), help="a second part, drawn from together"
    )
    args = parser.parse_args()
    parts = [(args.json, args.images), *([args.also] if args.also else [])]
    contents = [json.loads(file.read_text()) for file, _ in parts]
    folders = {
        image["file_name"]: folder
        for content, (_, folder) in zip(contents, parts)
        for image in content["images"]
    }
    labels = args.json
    if args.also:
        args.output.mkdir(parents=True, exist_ok=True)
        labels = args.output / "all.json"
        labels.write_text(json.dumps(joined(*contents)))
    for seed in args.seeds:
        for file in draw_labeled(labels, args.output / f"seed_{seed}", args.labeled, seed):
            folder = file.with_suffix("")
            folder.mkdir(exist_ok=True)
            for image in json.loads(file.read_text())["images"]:
                link = folder / image["file_name"]
                if not link.exists():
                    link.symlink_to((folders[image["file_name"]] / image["file_name"]).resolve())


def joined(first, second):
    """Two contents of COCO files with the same classes as one."""
    images, annotations = list(first["images"]), list(first["annotations"])
    offset = max(image["id"] for image in images)
    images += [{**image, "id": image["id"] + offset} for image in second["images"]]
    annotations += [{**a, "image_id": a["image_id"] + offset} for a in second["annotations"]]
    annotations = [{**a, "id": number} for number, a in enumerate(annotations, start=1)]
    return {**first, "images": images, "annotations": annotations}


if __name__ == "__main__":
    main()
