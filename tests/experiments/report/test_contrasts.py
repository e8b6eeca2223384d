"""Differences of differences, against sums worked out by hand."""

import copy
import math

import pytest

from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.definition import parse_grid
from selftrain_d2.experiments.report.contrasts import answer, contrasts_of
from selftrain_d2.experiments.report.report import MARKDOWN, write_report
from selftrain_d2.experiments.report.results import CellResult, Experiment

GRID = {
    "axes": {"start": {"imagenet": [], "rand": []}, "policy": ["S1", "S4"], "seed": [0, 1, 2]},
    "steps": {
        "weights": {"command": "convert {output}"},
        "teacher": {"axes": ["start", "policy", "seed"], "command": "train {output}"},
        "student": {"axes": ["seed"], "command": "train {output}"},
    },
    "contrasts": [
        {
            "name": "F1",
            "title": "Worth less with S4",
            "terms": [
                [1, {"step": "teacher", "start": "imagenet", "policy": "S1"}],
                [-1, {"step": "teacher", "start": "rand", "policy": "S1"}],
                [-0.5, {"step": "teacher", "start": "imagenet", "policy": "S4"}],
                [0.5, {"step": "teacher", "start": "rand", "policy": "S4"}],
            ],
        }
    ],
}
# Seeds 0, 1, 2.
VALUES = {
    ("imagenet", "S1"): (20.0, 22.0, 24.0),
    ("rand", "S1"): (10.0, 14.0, 16.0),
    ("imagenet", "S4"): (30.0, 30.0, 31.0),
    ("rand", "S4"): (26.0, 28.0, 23.0),
}
# (20 - 10) - 0.5 * (30 - 26) = 8, (22 - 14) - 0.5 * 2 = 7, 8 - 0.5 * 8 = 4: mean 19 / 3, deviation sqrt(13 / 3).
MEAN, DEVIATION = 19 / 3, math.sqrt(13 / 3)
T_2_DEGREES = 4.302653  # 97.5 % quantile of Student's t, from any table


def experiment(grid=GRID, lost=()):
    cells = []
    for (start, policy), values in VALUES.items():
        for seed, value in enumerate(values):
            failed = (start, policy, seed) in lost
            cells.append(
                CellResult(
                    "teacher",
                    {"start": start, "policy": policy, "seed": seed},
                    "failed" if failed else "finished",
                    {} if failed else {"bbox/AP": value},
                )
            )
    return Experiment(parse_grid(grid, "grid.yaml"), tuple(cells))


def only(experiment):
    (contrast,) = contrasts_of(experiment.grid)
    return answer(contrast, experiment)


def test_sum_of_each_run():
    found = only(experiment())
    assert found.runs == found.planned == 3
    assert found.test.difference.mean == pytest.approx(MEAN)
    assert found.test.difference.half_width == pytest.approx(T_2_DEGREES * DEVIATION / math.sqrt(3), rel=1e-6)
    # With 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t * t).
    t = MEAN / (DEVIATION / math.sqrt(3))
    assert found.test.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_runs_without_all_cells_are_left_out_and_counted(tmp_path):
    whole = experiment(lost=[("rand", "S4", 1)])
    found = only(whole)
    assert (found.runs, found.planned) == (2, 3)
    assert found.test.difference.mean == pytest.approx(6)
    none = only(experiment(lost=[("rand", "S4", seed) for seed in range(3)]))
    assert (none.test, none.runs) == (None, 0)
    write_report([whole], tmp_path)
    row = next(line for line in (tmp_path / MARKDOWN).read_text().splitlines() if line.startswith("| F1 "))
    assert "Worth less with S4 | AP | +6.0" in row and "2 of 3" in row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": [[1, {"step": "techer"}]]}, "no value of step 'techer'"),
        ({"terms": [[1, {"step": "teacher", "policy": "S9"}]]}, "no value of policy 'S9'"),
        ({"terms": [["x", {"step": "teacher"}]]}, "must be a number and a cell"),
        ({"terms": [[1, {"start": "rand"}]]}, "names no step"),
        ({"terms": []}, "needs a name and terms"),
        ({"repeats": ["sed"]}, "no axis 'sed'"),
        ({"weights": 1}, "weights"),
        ({"terms": [[1, {"step": "teacher", "start": "rand"}]]}, "name more axes"),
        ({"terms": [[1, {"step": "student"}], [-1, {"step": "weights"}]]}, "step weights has no axis 'seed'"),
    ],
)
def test_faults_are_told(change, message):
    grid = copy.deepcopy(GRID)
    grid["contrasts"][0].update(change)
    with pytest.raises(InputError, match=message):
        contrasts_of(parse_grid(grid, "grid.yaml"))
