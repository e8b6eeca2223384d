import pytest

from selftrain_d2.cli.common import find_config
from selftrain_d2.experiments.cost import (
    cost_table,
    gpu_hours,
    grid_exaflop,
    paper_trainings,
    training_exaflop,
)
from selftrain_d2.experiments.grid.definition import load_grid


def test_cost_by_hand():
    """100 GFLOPs x 3 passes x 256 images x 45,000 steps = 3.456e18; at 30e12 a second 115,200 s = 32 h."""
    exaflop = training_exaflop(100.0, 256, 45_000)
    assert exaflop == pytest.approx(3.456)
    assert gpu_hours(exaflop, 30.0) == pytest.approx(32.0)
    assert gpu_hours(exaflop, 60.0) == pytest.approx(16.0)


def test_a_student_step_has_both_kinds_of_images():
    trainings = paper_trainings()
    teacher = trainings["coco/efficientnet_b7/rand_S4.yaml"]
    student = trainings["coco/efficientnet_b7/rand_S4_selftraining_imagenet.yaml"]
    assert teacher == ("EfficientNet-B7", 640, 256, 120_000)
    assert student == ("EfficientNet-B7", 640, 512, 90_000)
    assert trainings["coco/resnet101/rand_S1.yaml"].model == "ResNet-101"
    assert trainings["pascal_voc/efficientnet_l2/imagenet_plus_plus_S4.yaml"][:2] == (
        "segmentation, EfficientNet-L2",
        640,
    )


def test_each_kind_of_training_is_one_row_and_no_config_is_lost():
    trainings = list(paper_trainings().values())
    rows = [row.split("|")[1:-1] for row in cost_table(lambda model, size: 100.0, tflops=10.0).splitlines()]
    assert "assumed 10 TFLOP/s" in rows[0][5]
    assert len(rows) - 2 == len(set(trainings))
    assert sum(int(row[-1]) for row in rows[2:]) == len(trainings)


def test_cost_of_a_grid_counts_its_own_steps():
    """Table 10's students from random weights, 512 images a step: 180, 135, 180 and 135 thousand steps."""
    grid = load_grid(find_config("grids/coco_table_2.yaml"))
    costs = grid_exaflop(grid, lambda model, size: 1000.0)
    assert len(costs) == 20
    assert sum(costs[-4:]) == pytest.approx(3 * 1e12 * 512 * 630_000 / 1e18)
