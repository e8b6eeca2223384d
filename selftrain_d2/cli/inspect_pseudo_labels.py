"""Judge a folder of pseudo labels: one HTML page with counts, diagrams, images and recommended thresholds.

    selftrain-d2 inspect pseudo_labels --human-labels labeled.json --truth withheld.json

The page needs nothing but a browser. --truth are human labels of (some of) the same images; --human-labels are those
that the student will train on as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from selftrain_d2.labeling.inspection.inspect import inspect_labels
from selftrain_d2.labeling.inspection.report import REPORT, config_words, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("folder", metavar="DIR", help="the pseudo-label folder")
    parser.add_argument("--truth", metavar="JSON", help="COCO JSON of human labels of the same images")
    parser.add_argument(
        "--human-labels", metavar="JSON", help="COCO JSON of the labeled set, to compare with"
    )
    parser.add_argument(
        "--image-root", metavar="DIR", help="where the images are, if not where they were when labeled"
    )
    parser.add_argument(
        "--score-thresh", type=float, default=0.5, metavar="S", help="threshold to judge at (default 0.5)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="OUT", help="folder of the report (default: DIR_report, beside DIR)"
    )


def run(args: argparse.Namespace) -> None:
    """Write the report, and say the most important of it."""
    folder = Path(args.folder)
    output = args.output or folder.resolve().with_name(f"{folder.resolve().name}_report")
    found = inspect_labels(
        folder,
        score_thresh=args.score_thresh,
        truth_json=args.truth,
        human_json=args.human_labels,
        image_root=args.image_root,
    )
    numbers = write_report(found, output)
    images, pseudo = numbers["images"], numbers["pseudo"]
    print(
        "{listed} images listed = {labeled} labeled + {empty} empty + {skipped} skipped.".format(**images),
        f"At {args.score_thresh:g}: {pseudo['boxes']} boxes on {pseudo['images_with_boxes']} images.",
    )
    for warning in numbers["warnings"]:
        print(f"Warning: {warning}")
    overall = numbers["recommended"]["overall"]
    print(f"Recommended threshold: {overall['threshold']:g} ({overall['reason']})")
    print(config_words(numbers))
    print(output / REPORT)
