"""Arguments that several commands share, and the checks of a user's config."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from selftrain_d2.config import CONFIGS, add_selftrain_config
from selftrain_d2.data.augmentation import build_augmentations
from selftrain_d2.deployment.run import run_config
from selftrain_d2.engine.config_values import check_values, merge_options, one_line, value_of
from selftrain_d2.engine.process_group import Processes
from selftrain_d2.errors import InputError
from selftrain_d2.storage import check_local

logger = logging.getLogger(__name__)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config-file``, ``--allow-unsafe`` and ``KEY VALUE ...``."""
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="a YAML config: a path, or the name of one that is shipped (e.g. neon_trees/lite0_256.yaml)",
    )
    add_allow_unsafe_argument(parser)
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config keys to change, in pairs; after all other arguments",
    )


def add_allow_unsafe_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-unsafe``."""
    parser.add_argument(
        "--allow-unsafe",
        action="store_true",
        help="load config files with Python tags and checkpoints that are pickles. Both can run any code: "
        "only for files that you trust",
    )


def add_fit_anchors_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--fit-anchors``."""
    parser.add_argument(
        "--fit-anchors",
        action="store_true",
        help="scale MODEL.ANCHOR_GENERATOR.SIZES by the one factor that brings most human boxes of each class within "
        "reach; config.yaml has them",
    )


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add detectron2's arguments for several processes."""
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="GPUs of this machine (default 1)"
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="R", help="this machine's number, from 0"
    )
    parser.add_argument(
        "--dist-url", default="auto", metavar="URL", help="address of machine 0, e.g. tcp://10.0.0.1:29500"
    )


def processes_of(args: argparse.Namespace) -> Processes:
    """What the arguments of :func:`add_launch_arguments` say."""
    return Processes(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)


def setup_config(args: argparse.Namespace) -> CfgNode:
    """The config of ``--config-file`` with the ``KEY VALUE`` pairs merged in, checked; not frozen.

    Where CUDA is not available, MODEL.DEVICE "cuda" becomes "cpu"; on a CPU, SOLVER.AMP.ENABLED becomes
    False; both with a warning.

    Raises:
        InputError: the file is missing, not YAML, has unknown keys, or needs ``--allow-unsafe``; a pair
            is incomplete, unknown or of the wrong type; the augmentation policy is unknown, or a value is none that
            its key can have.
    """
    cfg = get_cfg()
    add_selftrain_config(cfg)
    path = find_config(args.config_file)
    try:
        cfg.merge_from_file(str(path), allow_unsafe=args.allow_unsafe)
    except yaml.constructor.ConstructorError as error:
        raise InputError(
            f"Config {path} has a Python tag ({error.problem}), which would run code: remove it, or pass "
            "--allow-unsafe if you trust the file."
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"Config {path} is not valid YAML: {one_line(error)}.") from error
    except (KeyError, ValueError, AssertionError, FileNotFoundError, AttributeError) as error:
        raise InputError(f"Config {path}: {one_line(error)}.") from error
    for word in getattr(args, "classes", None) or ():
        if "." in word and value_of(cfg, word) is not None:
            raise InputError(
                f"--classes took the config key {word} for a class: put another --argument, or --, after the names."
            )
    merge_options(cfg, args.opts)
    check_local(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    build_augmentations(cfg, is_train=True)  # checks the policy and its keys
    check_values(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No CUDA device: MODEL.DEVICE is cpu.")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        logger.warning("Mixed precision needs a GPU: SOLVER.AMP.ENABLED is False.")
        cfg.SOLVER.AMP.ENABLED = False
    return cfg


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder of a run, or ``--config-file``, with ``KEY VALUE ...``; and ``--allow-unsafe``."""
    parser.add_argument("--config-file", metavar="FILE", help="in place of RUN: a config, with MODEL.WEIGHTS")
    add_allow_unsafe_argument(parser)
    # Not two arguments: argparse would give the words after RUN, --format among them, to the second.
    parser.add_argument(
        "run_and_opts",
        nargs="*",
        metavar="RUN | KEY VALUE",
        help="the folder of a finished run, then config keys to change, in pairs; all in one place",
    )


def config_of_run(args: argparse.Namespace) -> CfgNode:
    """The config that the arguments of :func:`add_run_arguments` name, with MODEL.WEIGHTS.

    Raises:
        InputError: both a run and a config are given, or neither; see :func:`setup_config` and ``run_config``.
    """
    has_run = len(args.run_and_opts) % 2 == 1
    args.opts = args.run_and_opts[has_run:]
    if has_run == (args.config_file is not None):
        raise InputError("Give either the folder of a run or --config-file with MODEL.WEIGHTS.")
    if not has_run:
        return setup_config(args)
    cfg = run_config(args.run_and_opts[0], args.allow_unsafe)
    merge_options(cfg, args.opts)
    return cfg


def find_config(name: str) -> Path:
    """A config's path, or that of a shipped config of that name.

    Raises:
        InputError: neither exists. The message lists the shipped ones.
    """
    for path in (Path(name), CONFIGS / name):
        if path.is_file():
            return path
    raise InputError(f"Config file {name} does not exist; shipped are: {', '.join(shipped_configs())}.")


def shipped_configs() -> list[str]:
    """Names of all shipped configs of detectors; those of grids of experiments are not among them."""
    names = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
    return [name for name in names if not name.startswith("grids/")]
