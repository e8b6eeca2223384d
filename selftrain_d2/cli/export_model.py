"""Write a trained model as one file for other programs: ONNX or TorchScript.

The file takes any number of images of any size, and is compared with the model on images of three shapes before it is
there.

    selftrain-d2 export-model output/student --format onnx --output student.onnx
"""

from __future__ import annotations

import argparse

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.cli.common import add_allow_unsafe_argument, setup_config
from selftrain_d2.deployment.export import FORMATS, export_model
from selftrain_d2.deployment.run import run_config
from selftrain_d2.engine.config_values import merge_options
from selftrain_d2.engine.logs import log_to_console
from selftrain_d2.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the file")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--config-file", metavar="FILE", help="in place of RUN: a config, with MODEL.WEIGHTS")
    add_allow_unsafe_argument(parser)
    # Not two arguments: argparse would give the words after RUN, --format among them, to the second.
    parser.add_argument(
        "run_and_opts",
        nargs="*",
        metavar="RUN | KEY VALUE",
        help="the folder of a finished run, then config keys to change, in pairs; all in one place",
    )


def run(args: argparse.Namespace) -> None:
    """Export, and print the deviations.

    Raises:
        InputError: see :func:`selftrain_d2.deployment.export.export_model`.
    """
    log_to_console()
    has_run = len(args.run_and_opts) % 2 == 1
    args.opts = args.run_and_opts[has_run:]
    if has_run == (args.config_file is not None):
        raise InputError("Give either the folder of a run or --config-file with MODEL.WEIGHTS.")
    if has_run:
        cfg = run_config(args.run_and_opts[0], args.allow_unsafe)
        merge_options(cfg, args.opts)
    else:
        cfg = setup_config(args)
    for name, largest in export_model(cfg, args.format, args.output, args.allow_unsafe).items():
        print(f"largest deviation of {name}: {largest:.2g}")
    print(f"Wrote {args.output}.")
