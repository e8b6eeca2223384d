"""Look at a batch whose loss or gradient was not finite.

Training saves such a batch as OUTPUT_DIR/not_finite_step_*.pth. This repeats its forward and backward pass with
the weights of that step, and says where it goes wrong: in which module, from which images.

    selftrain-d2 replay output/student/not_finite_step_0001234_rank_0.pth
"""

from __future__ import annotations

import argparse
import math

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.engine.replay import replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("file", metavar="FILE", help="the saved batch")
    parser.add_argument("--device", metavar="D", help="cpu or cuda; by default where the run was")


def run(args: argparse.Namespace) -> None:
    """Replay and print."""
    found = replay(args.file, args.device)
    print(f"Step {found['step']}")
    for name, value in found["losses"].items():
        print(f"  {name}: {value:.6g} (in the run: {found['saved_losses'].get(name, math.nan):.6g})")
    for image in found["images"]:
        low, high = image["pixels"]
        problems = "".join(f"; {problem}" for problem in image["problems"])
        print(
            f"  {image['label_source']}: {image['file_name']}, {image['size'][1]} x {image['size'][0]}, pixels "
            f"{low:g} to {high:g}, {image['boxes']} boxes{problems}"
        )
    print(f"First output that is not finite: {found['module'] or 'none'}")
    for what in ("parameters", "gradients"):
        names = found[what]
        print(f"{what.capitalize()} that are not finite: {_shortened(names)}")


def _shortened(names: list[str]) -> str:
    if not names:
        return "none"
    return f"{len(names)}, e.g. {', '.join(names[:3])}"
