"""Judge a folder of pseudo labels: a page with counts, diagrams and images; for boxes also recommended thresholds.

    selftrain-d2 inspect pseudo_labels --human-labels labeled.json --truth withheld.json
    selftrain-d2 inspect pseudo_masks --truth withheld_masks

The page on boxes, report.html, needs nothing but a browser; that on masks is report.md. --truth are human labels of
(some of) the same images; --human-labels are those that the student will train on as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.cli.common import setup_config
from selftrain_d2.cli.label_arguments import add_image_and_class_arguments
from selftrain_d2.data.pseudo_labels.manifest import kind_of, read_manifest
from selftrain_d2.engine.box_reach import box_reach
from selftrain_d2.engine.checks import build_without_memory
from selftrain_d2.errors import InputError
from selftrain_d2.inspection.box_reach import BoxReach
from selftrain_d2.inspection.box_report import REPORT, config_words, write_report
from selftrain_d2.inspection.inspect import Inspection, inspect_labels
from selftrain_d2.inspection.mask_report import REPORT as MASK_REPORT
from selftrain_d2.inspection.mask_report import write_mask_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("folder", metavar="DIR", help="the pseudo-label folder")
    parser.add_argument(
        "--truth",
        metavar="JSON",
        help="human labels of the same images; of pseudo masks the folder of true ones, of all images",
    )
    parser.add_argument(
        "--human-labels",
        "--labels",
        metavar="PATH",
        help="the labeled set, to compare with; boxes alone. Like --truth a COCO JSON, a YOLO data.yaml or folder, or "
        "a VOC folder",
    )
    add_image_and_class_arguments(parser)
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="config of the detector, e.g. output/teacher/config.yaml: shows which of the --human-labels its anchors "
        "reach at which image size",
    )
    parser.add_argument(
        "--image-root", metavar="DIR", help="where the images are, if not where they were when labeled"
    )
    parser.add_argument(
        "--score-thresh", type=float, default=0.5, metavar="S", help="threshold to judge at (default 0.5)"
    )
    parser.add_argument(
        "--localization-thresh",
        type=float,
        metavar="L",
        help="look at boxes of at least this localization score alone (SELFTRAIN.LOCALIZATION_THRESH)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="OUT", help="folder of the report (default: DIR_report, beside DIR)"
    )


def run(args: argparse.Namespace) -> None:
    """Write the report, and say the most important of it."""
    folder = Path(args.folder)
    output = args.output or folder.resolve().with_name(f"{folder.resolve().name}_report")
    reports = {"boxes": _report_boxes, "pixels": _report_masks}
    reports[kind_of(read_manifest(folder)).name](args, folder, output)


def _report_masks(args: argparse.Namespace, folder: Path, output: Path) -> None:
    for option, value in (
        ("--human-labels", args.human_labels),
        ("--labeled-images", args.labeled_images),
        ("--classes", args.classes),
        ("--config-file", args.config_file),
        ("--localization-thresh", args.localization_thresh),
    ):
        if value is not None:
            raise InputError(f"{option} compares boxes, but the pseudo labels are masks: leave it out.")
    write_mask_report(
        folder,
        output,
        score_thresh=args.score_thresh,
        image_root=args.image_root,
        truth_masks=args.truth,
    )
    print((output / MASK_REPORT).read_text(encoding="utf-8"))
    print(output / MASK_REPORT)


def _reach(args: argparse.Namespace, found: Inspection) -> BoxReach | None:
    if args.config_file is None:
        return None
    if found.human is None:
        raise InputError(
            "--config-file shows which human boxes the detector reaches: give --human-labels as well."
        )
    cfg = setup_config(argparse.Namespace(config_file=args.config_file, allow_unsafe=False, opts=[]))
    reach = box_reach(cfg, build_without_memory(cfg), found.human.dicts, found.class_names, by_size=True)
    if reach is None:
        raise InputError(
            f"--config-file {args.config_file}: {cfg.MODEL.META_ARCHITECTURE} has no upright anchors to compare "
            f"with, or {args.human_labels} no boxes: leave it out."
        )
    return reach


def _report_boxes(args: argparse.Namespace, folder: Path, output: Path) -> None:
    found = inspect_labels(
        folder,
        score_thresh=args.score_thresh,
        localization_thresh=args.localization_thresh,
        truth_json=args.truth,
        human_json=args.human_labels,
        human_images=args.labeled_images,
        label_classes=args.classes,
        image_root=args.image_root,
    )
    numbers = write_report(found, output, _reach(args, found))
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
