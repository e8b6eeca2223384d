"""Reports of made-up cells whose figures were worked out by hand."""

import base64
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import cv2
import numpy as np
import pytest
import yaml

from selftrain_d2.cli import main
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.definition import parse_grid
from selftrain_d2.experiments.report.figure_spec import figures_of
from selftrain_d2.experiments.report.figures import line_styles
from selftrain_d2.experiments.report.paper_tables import PAPER_TABLES
from selftrain_d2.experiments.report.report import CROSS, MINUS
from selftrain_d2.experiments.report.results import CellResult, Experiment, from_json, to_json
from selftrain_d2.experiments.report.series import Line, comparisons_of, lines_of

GRID = {
    "title": "Normalized & plain",
    "axes": {"alpha": [0.25, 4], "loss": {"normalized": [], "plain": []}, "seed": [0, 1, 2]},
    "steps": {
        "teacher": {"axes": ["seed"], "command": "train {output}"},
        "student": {"axes": ["alpha", "loss", "seed"], "command": "train {teacher}"},
    },
    "report": [
        {
            "name": "alpha",
            "title": "AP against alpha",
            "steps": ["teacher", "student"],
            "x": "alpha",
            "log": True,
            "lines": ["step", "loss"],
            "baseline": [{"loss": "plain"}, {"step": "teacher"}],
            "paper": ["figure_2"],
            "labels": {"bbox/AP": "AP", "plain": "plain sum", "student": "Student", "teacher": "Teacher"},
        }
    ],
}
# Seeds 0, 1, 2. None: failed.
VALUES = {
    ("teacher",): (8.0, 10.0, 12.0),
    ("normalized", 0.25): (11.0, 12.0, 16.0),
    ("normalized", 4): (12.0, 14.0, 16.0),
    ("plain", 0.25): (10.0, 10.0, 13.0),
    ("plain", 4): (7.0, None, None),
}
ERROR = "FloatingPointError: Step 7: The <pseudo> loss is nan."


def make_cells():
    cells = []
    for key, values in VALUES.items():
        for seed, value in enumerate(values):
            axes = {"seed": seed} if key == ("teacher",) else {"alpha": key[1], "loss": key[0], "seed": seed}
            step = "teacher" if key == ("teacher",) else "student"
            if value is None:
                cells.append(
                    {"step": step, "axes": axes, "status": "failed", "seconds": 36.0, "error": ERROR}
                )
            else:
                metrics = {"bbox/AP": value, "bbox/APl": None}
                cells.append(
                    {"step": step, "axes": axes, "status": "finished", "seconds": 360.0, "metrics": metrics}
                    | {"git_revision": "0123456789abcdef", "git_dirty": True}
                )
    return cells


def make_experiment(cells=None, **grid):
    return from_json({"grid": {**GRID, **grid}, "cells": make_cells() if cells is None else cells}, "here")


def write_metrics(folder, *experiments):
    file = folder / "metrics_in.json"
    file.write_text(json.dumps([{"grid": GRID, "cells": make_cells()}, *experiments]))
    return file


def rows_of(markdown, first):
    """The cells of the table whose header begins so."""
    lines = markdown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = lines[start : lines.index("", start)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


T2 = 4.302652730  # Student's t, 95 %, 2 degrees of freedom


def test_page_says_what_was_worked_out_by_hand(tmp_path, capsys):
    output = tmp_path / "report"
    assert main(["report", "--metrics", str(write_metrics(tmp_path)), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output / "report.html")
    markdown = (output / "report.md").read_text()

    table = rows_of(markdown, "alpha")
    assert table[0] == ["alpha", "0.25", "4"]
    assert {row[0]: row[1:] for row in table[2:]} == {
        # mean and 4.3027 * deviation / sqrt(3): deviations 2, sqrt(7), 2, sqrt(3)
        "Teacher": [f"10.0 ± {T2 * 2 / math.sqrt(3):.1f}"] * 2,
        "Student, normalized": [f"13.0 ± {T2 * math.sqrt(7 / 3):.1f}", f"14.0 ± {T2 * 2 / math.sqrt(3):.1f}"],
        "Student, plain sum": [f"11.0 ± {T2:.1f}", f"7.0 ({CROSS} 2)"],
    }

    differences = [row for row in rows_of(markdown[markdown.index("plain sum | 11.0") :], "alpha")]
    assert differences[0] == ["alpha", "0.25", "4", "mean over the row"]
    by_row = {row[0]: row[1:] for row in differences[2:]}
    # Differences 1, 2, 3 of deviation 1: t = 2 sqrt(3), p = 1 - t / sqrt(2 + t^2) = 0.0742.
    assert by_row[f"Student, normalized {MINUS} Student, plain sum"] == [
        f"+2.0 ± {T2 / math.sqrt(3):.1f}, p = 0.074",
        "+5.0",  # seed 0 alone
        "",  # only one x value that all runs have
    ]
    # 3, 2, 4 and 4, 4, 4; means 3.5, 3, 4 of deviation 1/2: t = 3.5 / (0.5 / sqrt(3)).
    t = 3.5 / (0.5 / math.sqrt(3))
    assert by_row[f"Student, normalized {MINUS} Teacher"] == [
        f"+3.0 ± {T2 / math.sqrt(3):.1f}, p = {1 - 3 * math.sqrt(3) / math.sqrt(2 + 27):.3f}",
        "+4.0 ± 0.0",  # all the same: no test
        f"+3.5 ± {T2 * 0.5 / math.sqrt(3):.1f}, p = {1 - t / math.sqrt(2 + t**2):.3f}",
    ]
    assert by_row[f"Student, plain sum {MINUS} Teacher"][1] == f"{MINUS}1.0"

    assert "15 cells: 13 finished, 2 failed; 1.3 hours" in markdown
    assert "0123456789 with changes" in markdown
    assert rows_of(markdown, "cell")[2:] == [
        [f"student/alpha=4,loss=plain,seed={seed}", ERROR] for seed in (1, 2)
    ]  # fmt: skip
    assert "Appendix B" in markdown and "| AP of normalized - AP of plain | 0.4 | 1.3 |" in markdown


def test_page_needs_nothing_else(tmp_path):
    output = tmp_path / "report"
    main(["report", "--metrics", str(write_metrics(tmp_path)), "--output", str(output)])
    page = (output / "report.html").read_text()
    assert "http" not in page and "//" not in re.sub(r"base64,[\w+/=]+", "", page)
    assert not re.search(r"<(script|link|iframe)", page) and "url(" not in page and "@import" not in page
    assert "Normalized &amp; plain" in page and "&lt;pseudo&gt;" in page and "<pseudo>" not in page
    ElementTree.fromstring(
        re.sub(r"<(meta|img)([^>]*)>", r"<\1\2/>", page.split("\n", 1)[1])
    )  # tags are closed
    sources = re.findall(r'<img [^>]*src="([^"]*)"', page)
    assert len(sources) == 1
    svg = base64.b64decode(sources[0].removeprefix("data:image/svg+xml;base64,"))
    assert svg == (output / "figures" / "alpha.svg").read_bytes()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    for number in ("7.0", "14.0", "+5.0", "p = 0.074"):
        assert number in page


def test_figure_has_lines_and_crosses(tmp_path):
    cells = make_cells()
    for cell in cells:
        if cell["axes"].get("alpha") == 4 and "metrics" in cell:
            cell["metrics"] = {"bbox/AP": 15.0}  # out of the corner below

    def draw(name, status):
        """The picture (H, W, 3), RGB, with the failed cells in another state."""
        changed = [cell if cell["status"] == "finished" else {**cell, "status": status} for cell in cells]
        (tmp_path / f"{name}.json").write_text(json.dumps([{"grid": GRID, "cells": changed}]))
        main(["report", "--metrics", str(tmp_path / f"{name}.json"), "--output", str(tmp_path / name)])
        return cv2.imread(str(tmp_path / name / "figures" / "alpha.png"))[..., ::-1].astype(int)

    def share(pixels, color):
        return (np.abs(pixels - color).max(axis=-1) < 40).mean()

    failed, waiting = draw("failed", "failed"), draw("waiting", "missing")
    assert failed.shape[0] > 400 and failed.shape[1] > 600
    blue, orange = (0, 114, 178), (213, 94, 0)
    for picture in (failed, waiting):
        assert share(picture, blue) > 0.001 and share(picture, orange) > 0.001
    # Two failed runs of the plain loss at 4: crosses of its colour at the bottom right.
    height, width = failed.shape[:2]
    corner = np.s_[height * 82 // 100 : height * 9 // 10, width * 6 // 10 :]
    assert share(failed[corner], orange) > 0.002
    assert share(waiting[corner], orange) == 0
    assert share(failed[corner], blue) == 0
    assert "15.0 (2 to come)" in (tmp_path / "waiting" / "report.md").read_text()


def test_a_report_can_be_made_again_from_its_metrics(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    main(["report", "--metrics", str(write_metrics(tmp_path)), "--output", str(first)])
    main(["report", "--metrics", str(first / "metrics.json"), "--output", str(second)])
    files = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    assert [str(file) for file in files] == [
        "figures/alpha.png", "figures/alpha.svg", "metrics.json", "report.html", "report.md",
    ]  # fmt: skip
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_report_of_folders(tmp_path):
    """From cell.json files, with a cell that is running and one that never began."""
    runs = tmp_path / "runs"
    for cell in make_cells():
        name = ",".join(f"{axis}={value}" for axis, value in cell["axes"].items())
        folder = runs / cell["step"] / name
        folder.mkdir(parents=True)
        error = cell.pop("error", None)
        record = {**cell, "log_tail": ["before", error]} if error else cell
        if name == "alpha=0.25,loss=plain,seed=2":
            continue
        if name == "alpha=0.25,loss=plain,seed=1":
            record = {**cell, "status": "running", "metrics": {}}
        (folder / "cell.json").write_text(json.dumps(record))
    assert main(["report", str(runs), "--output", str(tmp_path / "report")]) == 2  # no grid.yaml yet
    (runs / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    assert (
        main(["report", str(runs), "--metrics", str(write_metrics(tmp_path)), "--output", str(tmp_path)]) == 0
    )
    one, two = (tmp_path / "report.md").read_text().split("# Normalized & plain", 2)[1:]
    assert "1 running" in one and "1 missing" in one and ERROR in one
    assert dict((row[0], row[1]) for row in rows_of(one, "alpha"))["Student, plain sum"] == "10.0 (2 to come)"
    assert dict((row[0], row[1]) for row in rows_of(two, "alpha"))["Student, plain sum"].startswith("11.0 ± ")
    assert {f.name for f in (tmp_path / "figures").iterdir()} == {"1", "2"}


def test_metrics_are_small_and_strict_json(tmp_path):
    experiment = make_experiment()
    content = to_json(experiment)
    text = json.dumps(content, allow_nan=False)
    assert from_json(json.loads(text), "again") == experiment
    cells = content["cells"]
    assert "error" not in cells[0] and "metrics" not in cells[-1]
    value = Experiment(experiment.grid, (CellResult("teacher", {"seed": 0}, "finished", {"bbox/AP": 1 / 3}),))
    assert to_json(value)["cells"][0]["metrics"] == {"bbox/AP": 0.3333}


def test_a_finished_cell_without_a_finite_metric_counts_as_failed():
    cells = make_cells()
    cells[3]["metrics"] = {"bbox/AP": None}
    experiment = make_experiment(cells)
    (figure,) = figures_of(experiment.grid)
    line = next(line for line in lines_of(figure, experiment) if line.key.get("loss") == "normalized")
    assert line.points[0.25].failed == 1 and line.points[0.25].values == {(1,): 12.0, (2,): 16.0}


def test_nothing_finished_yet(tmp_path):
    (tmp_path / "none.json").write_text(json.dumps([{"grid": GRID, "cells": []}]))
    assert main(["report", "--metrics", str(tmp_path / "none.json"), "--output", str(tmp_path)]) == 0
    assert "15 cells: 15 missing" in (tmp_path / "report.md").read_text()


def figure_with(**changes):
    return [{**GRID["report"][0], **changes}]


def test_an_axis_must_not_be_averaged_over_unnoticed():
    experiment = make_experiment(report=figure_with(lines=["step"], baseline=[]))
    with pytest.raises(InputError, match=r"'alpha'.*differ in 'loss' too \(normalized, plain\)"):
        lines_of(figures_of(experiment.grid)[0], experiment)
    chosen = make_experiment(report=figure_with(lines=["step"], baseline=[], where={"loss": "plain"}))
    assert [line.label for line in lines_of(figures_of(chosen.grid)[0], chosen)] == ["Teacher", "Student"]


def test_two_baselines_of_a_line_are_refused():
    experiment = make_experiment(report=figure_with(baseline=[{"step": "student"}]))
    (figure,) = figures_of(experiment.grid)
    with pytest.raises(InputError, match="'Teacher' has 2 baselines"):
        comparisons_of(figure, lines_of(figure, experiment))


def test_two_baselines_are_compared_once():
    grid = {"axes": {"alpha": [1, 2]}, "steps": {name: {"axes": ["alpha"], "command": "x"} for name in "abc"}}
    grid["report"] = [{"name": "f", "steps": ["a", "b", "c"], "x": "alpha", "lines": ["step"]}]
    grid["report"][0]["baseline"] = [{"step": "a"}, {"step": "b"}]
    experiment = from_json({"grid": grid, "cells": []}, "here")
    (figure,) = figures_of(experiment.grid)
    compared = comparisons_of(figure, lines_of(figure, experiment))
    assert [(c.line.label, c.baseline.label) for c in compared] == [("b", "a"), ("c", "a"), ("c", "b")]


def test_runs_that_share_no_seed_are_not_paired():
    cells = [
        cell for cell in make_cells() if (cell["axes"].get("loss") == "plain") == (cell["axes"]["seed"] == 0)
    ]
    experiment = make_experiment(cells)
    (figure,) = figures_of(experiment.grid)
    first = comparisons_of(figure, lines_of(figure, experiment))[0]
    assert first.line.label == "Student, normalized" and first.baseline.label == "Student, plain sum"
    assert set(first.tests.values()) == {None} and first.overall is None


def test_comparisons_keep_other_axes():
    """As in Table 3: self-training against supervised, for each starting point."""
    axes = {"start": ["rand", "imagenet"], "fraction": [10, 100], "seed": [0]}
    steps = {
        step: {"axes": ["start", "fraction", "seed"], "command": "x"} for step in ("supervised", "student")
    }
    report = [
        {"name": "f", "steps": ["supervised", "student"], "x": "fraction", "lines": ["start", "step"]}
        | {"baseline": {"step": "supervised"}}
    ]
    cells = [
        {
            "step": step,
            "axes": {"start": start, "fraction": fraction, "seed": 0},
            "status": "finished",
            "metrics": {"bbox/AP": fraction / 10 + bonus + gain},
        }
        for start, bonus in (("rand", 0), ("imagenet", 3))
        for fraction in (10, 100)
        for step, gain in (("supervised", 0), ("student", 2 - fraction / 100))
    ]
    experiment = from_json({"grid": {"axes": axes, "steps": steps, "report": report}, "cells": cells}, "here")
    (figure,) = figures_of(experiment.grid)
    found = {
        (c.line.label, c.baseline.label): {x: test.difference.mean for x, test in c.tests.items()}
        for c in comparisons_of(figure, lines_of(figure, experiment))
    }
    assert found == {
        ("rand, student", "rand, supervised"): {10: pytest.approx(1.9), 100: pytest.approx(1.0)},
        ("imagenet, student", "imagenet, supervised"): {10: pytest.approx(1.9), 100: pytest.approx(1.0)},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "no key 'colour'"),
        ({"name": "a/b"}, "its name must consist"),
        ({"steps": ["tutor"]}, "'tutor'"),
        ({"steps": []}, "needs steps"),
        ({"x": "beta"}, "'beta'"),
        ({"lines": ["los"]}, "'los'"),
        ({"x": "loss"}, "log needs an x axis of numbers"),
        ({"where": {"alpha": 3}}, "no value of alpha '3'"),
        ({"where": "alpha"}, "must be a mapping"),
        ({"baseline": [{"seed": 0}]}, "no axis 'seed'"),
        ({"paper": ["table_99"]}, "table_99"),
        ({"labels": ["a"]}, "must be a mapping"),
    ],
)
def test_faults_of_the_report_section(changes, message):
    with pytest.raises(InputError, match=message) as error:
        figures_of(parse_grid({**GRID, "report": figure_with(**changes)}, "g.yaml"))
    assert "Normalized & plain" in str(error.value)


def test_two_figures_of_one_name_are_refused():
    with pytest.raises(InputError, match="two figures"):
        figures_of(parse_grid({**GRID, "report": figure_with() * 2}, "g.yaml"))


def test_files_that_are_no_metrics(tmp_path, capsys):
    file = tmp_path / "m.json"
    for text, message in (
        ("{", "not valid JSON"),
        ("{}", "must hold a list"),
        ('[{"grid": 1}]', "must be a mapping"),
        ("[[]]", "not a metrics file"),
    ):
        file.write_text(text)
        assert main(["report", "--metrics", str(file), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert main(["report", "--metrics", "no.json", "--output", str(tmp_path / "out")]) == 2
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "holds no grid.yaml" in capsys.readouterr().err
    assert main(["report", "--output", str(tmp_path / "out")]) == 2
    assert "nothing to report on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_styles_tell_axes_apart():
    keys = [
        {"start": start, "step": step} for start in ("rand", "imagenet") for step in ("supervised", "student")
    ]
    styles = line_styles([Line(key, "") for key in keys])
    assert [s.color for s in styles[:2]] == [styles[0].color] * 2 and styles[2].color != styles[0].color
    assert styles[0].dashes == styles[2].dashes != styles[1].dashes == styles[3].dashes
    # An axis in which nothing differs is not drawn.
    one = line_styles([Line({"step": "student", "loss": loss}, "") for loss in ("plain", "normalized")])
    assert one[0].color != one[1].color and one[0].dashes == one[1].dashes


def test_tables_of_the_paper():
    # Section 4 of the paper: +1.7 AP by self-training at S1, +1.3 at S4 with ImageNet images, +1.7 with OpenImages.
    table = {row[0]: row[1:] for row in PAPER_TABLES["table_2"].text_rows()}
    assert table["Rand + self-training (ImageNet images)"] == [
        "40.9 (+1.7)",
        "43.0 (+1.5)",
        "45.4 (+1.5)",
        "45.6 (+1.3)",
    ]
    assert table["Rand + self-training (OpenImages)"][3] == "46.0 (+1.7)"
    assert table["ImageNet"] == ["39.5 (+0.3)", "40.7 (-0.8)", "43.2 (-0.7)", "43.3 (-1.0)"]
    for table in PAPER_TABLES.values():
        assert all(len(values) == len(table.columns) for values in table.rows.values())
        assert set(table.baselines) | set(table.baselines.values()) <= set(table.rows)
