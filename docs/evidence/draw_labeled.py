"""Draw the labeled images of each seed of docs/evidence.md: labeled.json, unlabeled.json (withheld truth), and links.

    python docs/evidence/draw_labeled.py train.json images --labeled 80 --seeds 0 1 2 3 4 --output data/playing_cards

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
    args = parser.parse_args()
    for seed in args.seeds:
        for file in draw_labeled(args.json, args.output / f"seed_{seed}", args.labeled, seed):
            folder = file.with_suffix("")
            folder.mkdir(exist_ok=True)
            for image in json.loads(file.read_text())["images"]:
                link = folder / image["file_name"]
                if not link.exists():
                    link.symlink_to((args.images / image["file_name"]).resolve())


if __name__ == "__main__":
    main()
