"""Draw the labeled images of each seed of docs/evidence.md: labeled.json, unlabeled.json (withheld truth), and links.

    python docs/evidence/draw_labeled.py train.json images --labeled 80 --seeds 0 1 2 3 4 --output data/playing_cards

The draw is that of `selftrain-d2 splits --stratified`: the first N images of the order of its seed.
"""

import argparse
import json
from pathlib import Path

from selftrain_d2.data.splits import make_splits


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--labeled", type=int, required=True, help="images that keep their labels")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    coco = json.loads(args.json.read_text())
    percent = f"{100 * args.labeled / len(coco['images']):.6f}".rstrip("0").rstrip(".")
    for seed in args.seeds:
        folder = args.output / f"seed_{seed}"
        make_splits(args.json, folder / "splits", [percent], seed=seed, stratified=True)
        labeled = json.loads((folder / "splits" / f"labeled_{percent}.json").read_text())
        assert len(labeled["images"]) == args.labeled
        names = {image["file_name"] for image in labeled["images"]}
        for part, wanted in (("labeled", True), ("unlabeled", False)):
            images = [image for image in coco["images"] if (image["file_name"] in names) == wanted]
            ids = {image["id"] for image in images}
            annotations = [one for one in coco["annotations"] if one["image_id"] in ids]
            (folder / f"{part}.json").write_text(
                json.dumps({**coco, "images": images, "annotations": annotations})
            )
            (folder / part).mkdir(exist_ok=True)
            for image in images:
                link = folder / part / image["file_name"]
                if not link.exists():
                    link.symlink_to((args.images / image["file_name"]).resolve())


if __name__ == "__main__":
    main()
