import json

import cv2
import numpy as np
import pytest
from matplotlib import pyplot as plt

from selftrain_d2.cli import main
from selftrain_d2.engine.metrics_plot import PANELS, read_metrics


def _write(folder, steps, **scalars):
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.json", "a") as file:
        for step in steps:
            file.write(json.dumps({"iteration": step, **{k: v(step) for k, v in scalars.items()}}) + "\n")


def test_a_resumed_run_is_read_once_and_a_cut_last_line_is_left_out(tmp_path):
    _write(tmp_path, range(0, 60, 20), human_loss=lambda s: 1.0)
    _write(tmp_path, range(40, 80, 20), human_loss=lambda s: 2.0)  # killed after step 40, resumed before it
    with open(tmp_path / "metrics.json", "a") as file:
        file.write('{"iteration": 80, "human_lo')
    assert read_metrics(tmp_path) == {"human_loss": {0: 1.0, 20: 1.0, 40: 2.0, 60: 2.0}}


def test_the_picture_has_a_panel_for_what_was_logged(tmp_path):
    run = tmp_path / "student"
    everything = {name: (lambda s: 1.0 + s) for panel in PANELS for name in panel[3]}
    _write(run, range(19, 219, 20), **everything)
    assert main(["plot-metrics", str(run)]) == 0
    full = cv2.imread(str(run / "metrics.png"))
    _write(tmp_path / "teacher", range(19, 219, 20), total_loss=lambda s: 1.0, lr=lambda s: 0.1)
    output = str(tmp_path / "small.png")
    assert main(["plot-metrics", str(tmp_path / "teacher"), "--output", output]) == 0
    small = cv2.imread(output)
    assert full.shape[0] > 2 * small.shape[0] and full.shape[1] > small.shape[1]  # 3 x 3 panels against 2
    assert np.ptp(small) > 200  # lines, not a blank page


def test_each_test_set_has_a_line_of_its_own(tmp_path, monkeypatch):
    """Several names in DATASETS.TEST: the scalars begin with the names."""
    run = tmp_path / "run"
    names = ("bbox/AP", "oslo/bbox/AP", "bonn/bbox/AP", "bonn/segm/AP")
    _write(run, range(9, 39, 10), **{name: (lambda s: s) for name in names})
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    assert main(["plot-metrics", str(run)]) == 0
    (axis,) = figures[0].axes
    drawn = [line.get_label() for line in axis.lines]
    assert drawn == ["box AP", "box AP, bonn", "box AP, oslo", "mask AP, bonn"]
    assert len({line.get_color() for line in axis.lines}) == 4


def test_bad_input(tmp_path, capsys):
    assert main(["plot-metrics", str(tmp_path)]) == 2
    assert "has no metrics.json" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text('nonsense\n{"iteration": 3, "lr": 1.0}\n')
    assert main(["plot-metrics", str(tmp_path)]) == 2
    assert "line 1" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text('[1]\n{"iteration": 3, "lr": 1.0}\n')
    assert main(["plot-metrics", str(tmp_path)]) == 2
    assert "line 1" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text('{"iteration": 3, "unknown": 1.0}\n')
    assert main(["plot-metrics", str(tmp_path)]) == 2
    assert "nothing that is drawn" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text('{"iteration": 3, "lr": 1.0}\n')
    assert main(["plot-metrics", str(tmp_path), "--output", str(tmp_path / "metrics.json" / "a.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text("")
    assert main(["plot-metrics", str(tmp_path)]) == 2
    assert main(["plot-metrics", str(tmp_path), "--output", "picture.txt"]) == 2
    assert "must end in" in capsys.readouterr().err


@pytest.mark.parametrize("runs", [1, 2])
def test_values_may_be_null(tmp_path, runs):
    for number in range(runs):
        _write(tmp_path / str(number), [0, 20], lr=lambda s: 0.1, **{"bbox/AP": lambda s: None})
    assert main(["plot-metrics", *[str(tmp_path / str(n)) for n in range(runs)]]) == 0
