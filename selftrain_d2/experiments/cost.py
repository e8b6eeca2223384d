"""What the paper's trainings cost: ``python -m selftrain_d2.experiments.cost [TFLOP/s]``.

Operations as fvcore counts them: a multiplication with its addition is one. The forward pass of an image is counted by
running each model once: a minute on a CPU, and some gigabytes of memory.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from selftrain_d2.config import CONFIGS
from selftrain_d2.engine.config_values import is_segmentor
from selftrain_d2.experiments import model_table
from selftrain_d2.experiments.benchmarks.timing import markdown_table
from selftrain_d2.experiments.grid.definition import Grid, load_grid

#: A training step's passes in units of the forward pass: forward, gradients of activations, gradients of weights.
#: What MODEL.EFFICIENTNET.CHECKPOINT_ACTIVATIONS computes a second time is not counted.
PASSES = 3
#: An assumption, not a measurement: what one GPU sustains, in TFLOP/s.
ASSUMED_TFLOPS = 30.0

PAPER_FAMILIES = [
    family for family in model_table.FAMILIES if not family.endswith(("one_gpu", "efficientdet"))
]


class Training(NamedTuple):
    """What the operations of a training depend on."""

    model: str
    image_size: int
    images_per_step: int
    steps: int


def training_exaflop(gflops: float, images_per_step: int, steps: int) -> float:
    """Operations of a training in 10^18.

    Args:
        gflops: of the forward pass of one image, in 10^9.
        images_per_step: human- and pseudo-labeled ones together.
    """
    return PASSES * gflops * images_per_step * steps / 1e9


def gpu_hours(exaflop: float, tflops: float) -> float:
    """Hours of one GPU that sustains ``tflops`` (10^12 operations a second)."""
    return exaflop * 1e6 / tflops / 3600


def model_name(cfg: CfgNode) -> str:
    """How docs/model_zoo.md calls a config's backbone: EfficientNet-B7, ResNet-50, SpineNet-143."""
    if "spinenet" in cfg.MODEL.BACKBONE.NAME:
        return "SpineNet-" + cfg.MODEL.SPINENET.NAME.rpartition("-")[2].upper()
    if "resnet" in cfg.MODEL.BACKBONE.NAME:
        return f"ResNet-{cfg.MODEL.RESNETS.DEPTH}"
    return "EfficientNet-" + cfg.MODEL.EFFICIENTNET.NAME.rpartition("-")[2].upper()


@functools.cache
def paper_trainings() -> dict[str, Training]:
    """What the cost depends on of every training of the paper that has a config, by the config's name."""
    trainings = {}
    for family in PAPER_FAMILIES:
        for path in sorted((CONFIGS / family).glob("*.yaml")):
            name = f"{family}/{path.name}"
            cfg = model_table.load_config(name)
            images = cfg.SOLVER.IMS_PER_BATCH + cfg.SOLVER.PSEUDO_IMS_PER_BATCH
            task = "segmentation, " if is_segmentor(cfg) else ""
            size = cfg.INPUT.AUGMENTATION.IMAGE_SIZE
            trainings[name] = Training(task + model_name(cfg), size, images, cfg.SOLVER.MAX_ITER)
    return trainings


def cost_table(gflops: Callable[[str, int], float], tflops: float = ASSUMED_TFLOPS) -> str:
    """Each kind of training once, with the number of configs that are of it.

    Args:
        gflops: forward pass of one image by (model, image size), see :class:`Training`.
        tflops: what one GPU sustains.
    """
    rows = []
    models = list(dict.fromkeys(training[:2] for training in paper_trainings().values()))
    kinds = Counter(paper_trainings().values())
    for training, configs in sorted(kinds.items(), key=lambda kind: (models.index(kind[0][:2]), kind[0])):
        forward = gflops(training.model, training.image_size)
        exaflop = training_exaflop(forward, training.images_per_step, training.steps)
        rows.append(
            [
                f"{training.model}, {training.image_size} px",
                f"{forward:.1f}",
                f"{training.images_per_step}",
                f"{training.steps:,}",
                f"{exaflop:.2f}",
                f"{gpu_hours(exaflop, tflops):,.0f}",
                f"{configs}",
            ]
        )
    titles = [
        "model",
        "GFLOPs",
        "images a step",
        "steps",
        "exaFLOP",
        f"GPU-hours, assumed {tflops:g} TFLOP/s",
    ]
    return markdown_table([*titles, "configs"], rows)


def grid_exaflop(grid: Grid, gflops: Callable[[str, int], float]) -> list[float]:
    """Operations of each training of a grid, in 10^18. Images for joint training are not counted."""
    costs = []
    for words in (cell.command for cell in grid.cells if cell.command[0] == "train"):
        training = paper_trainings()[words[words.index("--config-file") + 1]]
        changed = "SOLVER.MAX_ITER" in words
        steps = int(words[words.index("SOLVER.MAX_ITER") + 1]) if changed else training.steps
        forward = gflops(training.model, training.image_size)
        costs.append(training_exaflop(forward, training.images_per_step, steps))
    return costs


def grid_table(gflops: Callable[[str, int], float], tflops: float = ASSUMED_TFLOPS) -> str:
    """All trainings of each of the paper's grids; arguments as in :func:`cost_table`."""
    rows = []
    for file in sorted((CONFIGS / "grids").glob("*.yaml")):
        if file.stem.startswith(("coco", "pascal_voc")):
            costs = grid_exaflop(load_grid(file), gflops)
            rows.append(
                [file.stem, f"{len(costs)}", f"{sum(costs):,.0f}", f"{gpu_hours(sum(costs), tflops):,.0f}"]
            )
    return markdown_table(["grid", "trainings", "exaFLOP", f"GPU-hours, assumed {tflops:g} TFLOP/s"], rows)


@functools.cache
def forward_gflops(model: str, image_size: int) -> float:
    """Counted on the first config with such a model."""
    name = next(
        name for name, t in paper_trainings().items() if (t.model, t.image_size) == (model, image_size)
    )
    dense = model_table.DenseOutputs(build_model(model_table.load_config(name)))
    return float(model_table.gflops(dense, image_size))


if __name__ == "__main__":
    for table in (cost_table, grid_table):
        print(table(forward_gflops, *map(float, sys.argv[1:2])), end="\n\n")
