"""Write a trained model as one file for other programs: ONNX or TorchScript.

The file takes any number of images of any size, and is compared with the model on images of three shapes before it is
there.

    selftrain-d2 export-model output/student --format onnx --output student.onnx
"""

from __future__ import annotations

import argparse

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.cli.common import add_run_arguments, config_of_run
from selftrain_d2.deployment.export import FORMATS, export_model
from selftrain_d2.engine.logs import log_to_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the file")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Export, and print the deviations.

    Raises:
        InputError: see :func:`selftrain_d2.deployment.export.export_model`.
    """
    log_to_console()
    cfg = config_of_run(args)
    for name, largest in export_model(cfg, args.format, args.output, args.allow_unsafe).items():
        print(f"largest deviation of {name}: {largest:.2g}")
    print(f"Wrote {args.output}.")
