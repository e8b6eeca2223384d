"""The command line: ``selftrain-d2 COMMAND`` and the scripts in ``tools/``.

A command is one module of this package with ``add_arguments(parser)``, ``run(args)`` and a docstring
whose first line is its help text. ``COMMANDS`` names them all. One that also has ``plan(args)`` takes ``--dry-run``,
which prints that plan and does nothing. One whose work goes on after it was stopped says how in ``when_stopped(args)``.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import detectron2
import torch
import torchvision

from selftrain_d2 import __version__
from selftrain_d2.errors import InputError, message_in
from selftrain_d2.storage import check_local

# Groups of commands: name on the command line -> module in this package. Imported only when called: a command starts
# fast.
GROUPS = {
    "The loop": {
        "self-train": "self_train",
        "train": "train_net",
        "label": "generate_pseudo_labels",
    },
    "Labels": {
        "labels": "labels",
        "splits": "make_splits",
        "export": "export_pseudo_labels",
        "import": "import_pseudo_labels",
    },
    "Looking": {
        "inspect": "inspect_pseudo_labels",
        "visualize-augmentations": "visualize_augmentations",
        "plot-metrics": "plot_metrics",
        "replay": "replay_batch",
    },
    "Use": {
        "predict": "predict",
        "export-model": "export_model",
    },
    "Weights": {
        "convert": "convert_weights",
        "pretrain-simclr": "pretrain_simclr",
    },
    "Experiments": {
        "grid": "run_grid",
        "report": "report",
        "benchmark": "benchmark",
        "prepare-neon-trees": "prepare_neon_trees",
        "prepare-aerial-digits": "prepare_aerial_digits",
        "prepare-digit-classes": "prepare_digit_classes",
    },
}
COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}

_DRY_RUN = (
    "check all that can be checked without images, weights and GPU, say what would be done and which files are "
    "missing, and do nothing"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command's name and its arguments; ``sys.argv[1:]`` if None.

    Returns:
        The exit status: 0; 2 for a mistake in the user's input, 1 for a loss that was not finite (one sentence
        on standard error); 130 when interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:
        print(_version())
        return 0
    if not argv or argv[0] not in COMMANDS:
        wanted = not argv or argv[0] in ("-h", "--help")
        print(_overview(), file=sys.stdout if wanted else sys.stderr)
        if not wanted:
            print(f"selftrain-d2: error: unknown command {argv[0]!r}", file=sys.stderr)
        return 0 if argv and wanted else 2
    name, *rest = argv
    module = importlib.import_module(f"selftrain_d2.cli.{COMMANDS[name]}")
    parser = argparse.ArgumentParser(
        prog=f"selftrain-d2 {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    has_plan = hasattr(module, "plan")
    if has_plan:
        parser.add_argument("--dry-run", action="store_true", help=_DRY_RUN)
    args = parser.parse_args(rest)
    args.words = argv
    try:
        check_local(getattr(args, "output", None) or "", "--output")
        if has_plan and args.dry_run:
            print(module.plan(args))
        else:
            module.run(args)
    except InputError as error:
        message = message_in(str(error), InputError) or error
        print(f"selftrain-d2 {name}: error: {message}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"selftrain-d2 {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how = f"; {module.when_stopped(args)}" if hasattr(module, "when_stopped") else ""
        print(f"selftrain-d2 {name}: stopped{how}", file=sys.stderr)
        return 130
    return 0


def _overview() -> str:
    lines = ["usage: selftrain-d2 COMMAND [--help] ...", "       selftrain-d2 --version"]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [
            f"  {name:<{max(map(len, COMMANDS))}}  {_first_line(module)}" for name, module in commands.items()
        ]
    return "\n".join(lines)


def _first_line(module: str) -> str:
    """Of a command's docstring, read without importing it."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


def _version() -> str:
    needed = ", ".join(
        f"{package.__name__} {package.__version__}" for package in (detectron2, torch, torchvision)
    )
    return f"selftrain_d2 {__version__} ({needed})"
