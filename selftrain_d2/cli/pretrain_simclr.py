"""Pre-train a detector's backbone on images without labels (SimCLR), as a starting point for MODEL.WEIGHTS.

Needs the package lightly. Stop it at any time: the same command goes on from there. Every layer trains, whatever
MODEL.BACKBONE.FREEZE_AT says; MODEL.WEIGHTS is where it starts, by default at random. Images that cannot be read
are left out and listed in simclr.json.

    selftrain-d2 pretrain-simclr --config-file aerial_digits/lite0_128.yaml --images photos --output output/simclr
    selftrain-d2 train --config-file aerial_digits/lite0_128.yaml ... MODEL.WEIGHTS output/simclr/backbone.pth
"""

from __future__ import annotations

import argparse
import dataclasses

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.cli.common import add_config_arguments, add_launch_arguments, processes_of, setup_config
from selftrain_d2.cli.image_arguments import add_image_arguments, images_of
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.engine.process_group import run_in_processes
from selftrain_d2.engine.simclr import SimCLRSettings, pretrain_simclr

_HELP = {
    "epochs": (int, "N", "passes over the images"),
    "batch_size": (int, "N", "images a step, over all processes; each is compared with all others"),
    "learning_rate": (float, "LR", "of SGD after the warm-up; falls to zero as a cosine"),
    "warmup_epochs": (float, "N", "in which the learning rate rises"),
    "weight_decay": (float, "W", "of all but batch norm and biases"),
    "temperature": (float, "T", "of the loss"),
    "color_strength": (float, "S", "of the colour jitter, 0 to 1"),
    "gaussian_blur": (float, "P", "probability of blur; 0 is faster"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    add_image_arguments(parser)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for checkpoints and backbone.pth"
    )
    parser.add_argument(
        "--crop-size",
        type=int,
        metavar="PIXELS",
        help="side of the views (default INPUT.AUGMENTATION.IMAGE_SIZE); smaller is faster",
    )
    defaults = {field.name: field.default for field in dataclasses.fields(SimCLRSettings)}
    for name, (kind, metavar, text) in _HELP.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=defaults[name],
            metavar=metavar,
            help=f"{text} (default {defaults[name]:g})",
        )
    add_launch_arguments(parser)
    add_config_arguments(parser)


def when_stopped(args: argparse.Namespace) -> str:
    """How to go on."""
    return "the same command goes on from its last checkpoint"


def run(args: argparse.Namespace) -> None:
    """Pre-train."""
    log_to_console()
    cfg = setup_config(args)
    cfg.freeze()
    size = cfg.INPUT.AUGMENTATION.IMAGE_SIZE if args.crop_size is None else args.crop_size
    settings = SimCLRSettings(crop_size=size, **{name: getattr(args, name) for name in _HELP})
    image_root, file_names = images_of(args)
    run_in_processes(
        _pretrain,
        processes_of(args),
        (cfg, image_root, file_names, args.output, settings, args.allow_unsafe),
        cfg.MODEL.DEVICE,
    )


def _pretrain(cfg, image_root, file_names, output, settings, allow_unsafe) -> None:
    pretrain_simclr(cfg, image_root, file_names, output, settings, allow_unsafe=allow_unsafe)
