"""A grid file, laid out as cells."""

import argparse
import importlib
import itertools
import shlex

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from selftrain_d2.cli import COMMANDS, main
from selftrain_d2.cli.common import find_config, setup_config, shipped_configs
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.grid.definition import load_grid, parse_grid
from selftrain_d2.experiments.report.contrasts import contrasts_of
from selftrain_d2.experiments.report.figure_spec import figures_of

STUDENTS = """
title: A small grid
values:
  data: pictures
  common: [--labels, "{data}/labels.json"]
axes:
  seed: [0, 1]
  alpha: [0.25, 1]
  loss:
    normalized: [NORMALIZE, "True"]
    plain: [NORMALIZE, "False"]
steps:
  teacher: {axes: [seed], command: "train {common} OUT {output} SEED {seed}", seconds: 60}
  labels: {axes: [seed], command: "label WEIGHTS {teacher}/final.pth --output {output}"}
  student:
    axes: [loss, alpha, seed]
    command: [train, "{loss}", "A={alpha} of {loss}", "{teacher}/final.pth", "{labels}", "{}", "{data}"]
"""


def parse(text=STUDENTS, **changed):
    return parse_grid(yaml.safe_load(text), "small.yaml", changed)


def test_cells_commands_and_needs():
    grid = parse()
    assert [cell.id for cell in grid.cells[:4]] == [
        "teacher/seed=0", "teacher/seed=1", "labels/seed=0", "labels/seed=1",
    ]  # fmt: skip
    assert len(grid.cells) == 2 + 2 + 8  # one teacher and one labeling for four students
    cells = {cell.id: cell for cell in grid.cells}
    teacher = cells["teacher/seed=1"]
    assert shlex.join(teacher.words("/runs")) == (
        "train --labels pictures/labels.json OUT /runs/teacher/seed=1/output SEED 1"
    )
    assert teacher.needs == () and teacher.seconds == 60
    assert cells["labels/seed=1"].needs == ("teacher/seed=1",)
    student = cells["student/loss=plain,alpha=0.25,seed=1"]
    assert student.needs == ("teacher/seed=1", "labels/seed=1")
    assert student.axes == {"loss": "plain", "alpha": 0.25, "seed": 1}
    assert student.words("r") == [
        "train", "NORMALIZE", "False", "A=0.25 of plain", "r/teacher/seed=1/output/final.pth",
        "r/labels/seed=1/output", "{}", "pictures",
    ]  # fmt: skip


def test_constants_can_be_changed():
    grid = parse(data="others")
    assert "others/labels.json" in grid.cells[0].words("r")
    assert grid.source["values"]["data"] == "others"  # what is written down is what is run
    assert parse_grid(grid.source, "copy").cells == grid.cells


def test_a_list_is_changed_by_a_line_as_a_shell_reads_it():
    grid = parse(common="--labels 'my labels.json' {data}")
    assert grid.cells[0].words("r")[:5] == ["train", "--labels", "my labels.json", "pictures", "OUT"]
    assert parse_grid(grid.source, "copy").cells == grid.cells
    with pytest.raises(InputError, match="--set common: No closing quotation"):
        parse(common="--labels 'my labels.json")


def test_a_step_without_axes_has_one_cell():
    grid = parse_grid({"steps": {"splits": {"command": "make-splits {output}"}}}, "g.yaml")
    assert [cell.id for cell in grid.cells] == ["splits/all"]


def test_include_and_exclude():
    content = yaml.safe_load(STUDENTS)
    content["include"] = [{"alpha": 1}, {"loss": "plain"}]
    content["exclude"] = [{"loss": "plain", "seed": [1]}]
    ids = {cell.id for cell in parse_grid(content, "g").cells if cell.step == "student"}
    assert ids == {
        "student/loss=normalized,alpha=1,seed=0",
        "student/loss=normalized,alpha=1,seed=1",
        "student/loss=plain,alpha=1,seed=0",
        "student/loss=plain,alpha=0.25,seed=0",
    }
    content["exclude"] = [{"seed": 1}]
    # What no student needs is not there either.
    assert [cell.id for cell in parse_grid(content, "g").cells if cell.step == "teacher"] == [
        "teacher/seed=0"
    ]


def test_exclude_of_one_step():
    content = yaml.safe_load(STUDENTS)
    content["exclude"] = [{"step": "student", "alpha": 0.25}, {"step": ["student", "labels"], "seed": 1}]
    assert [cell.id for cell in parse_grid(content, "g").cells] == [
        "teacher/seed=0", "teacher/seed=1", "labels/seed=0",
        "student/loss=normalized,alpha=1,seed=0", "student/loss=plain,alpha=1,seed=0",
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cells_are_the_grid_seen_along_a_steps_axes(data):
    axes = {name: list(range(data.draw(st.integers(1, 3)))) for name in ("a", "b", "c")}
    rule = st.dictionaries(st.sampled_from("abc"), st.just([0]), min_size=1)
    include, exclude = data.draw(st.lists(rule, max_size=2)), data.draw(st.lists(rule, max_size=1))
    first = data.draw(st.lists(st.sampled_from("abc"), unique=True))
    second = data.draw(st.permutations([*first, *(set("abc") - set(first))]))
    content = {
        "axes": axes,
        "include": include,
        "exclude": exclude,
        "steps": {
            "first": {"axes": first, "command": "x {output}"},
            "second": {"axes": second, "command": "y {first}"},
        },
    }
    kept = []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values))
        included = not include or any(all(point[axis] == 0 for axis in r) for r in include)
        if included and not any(all(point[axis] == 0 for axis in r) for r in exclude):
            kept.append(point)
    if not kept:
        with pytest.raises(InputError, match="leave no cell"):
            parse_grid(content, "g")
        return
    cells = parse_grid(content, "g").cells
    for step, names in (("first", first), ("second", second)):
        found = [tuple(cell.axes[name] for name in names) for cell in cells if cell.step == step]
        assert len(found) == len(set(found))
        assert set(found) == {tuple(point[name] for name in names) for point in kept}
    before = set()
    for cell in cells:
        assert set(cell.needs) <= before  # what a cell needs comes before it
        before.add(cell.id)


def test_only_some_cells_and_what_they_need():
    grid = parse()
    ids = [
        cell.id
        for cell in grid.select({"loss": ["plain"], "alpha": ["0.25"], "seed": ["0"], "step": ["student"]})
    ]
    assert ids == ["teacher/seed=0", "labels/seed=0", "student/loss=plain,alpha=0.25,seed=0"]
    assert [cell.id for cell in grid.select({"step": ["teacher"]})] == ["teacher/seed=0", "teacher/seed=1"]
    assert grid.select({}) == grid.cells
    for wrong in ({"beta": ["1"]}, {"alpha": ["3"]}, {"step": ["tea"]}):
        with pytest.raises(InputError, match="--only: there is no"):
            grid.select(wrong)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("stepz",), {}, "no key 'stepz'"),
        (("steps",), {}, "steps is empty"),
        (("steps",), ["a"], "steps must be a mapping"),
        (("steps", "teacher", "axis"), [], "no key 'axis'"),
        (("steps", "teacher", "axes"), ["sede"], "no axis 'sede'"),
        (("steps", "teacher", "axes"), ["seed", "seed"], "same axis twice"),
        (("steps", "teacher", "command"), "train {sed}", "no name 'sed'"),
        (("steps", "teacher", "command"), "train 'x", "No closing quotation"),
        (("steps", "teacher", "command"), None, "command must be a line"),
        (("steps", "teacher", "command"), "train {student}", "no name 'student'"),  # comes later
        (("steps", "teacher", "command"), "train x{common}", "stands for several words"),
        (("steps", "teacher", "seconds"), "long", "seconds must be a number"),
        (("steps", "student", "axes"), ["loss", "alpha"], "has the axis seed too"),
        (("axes", "alpha"), [], "must be a list of values"),
        (("axes", "alpha"), [1, 1], "value 1 twice"),
        (("axes", "alpha"), ["a/b"], "cannot be part of a folder's name"),
        (("axes", "alpha"), {"a": {}}, "must be a line of words"),
        (("axes", "data"), [1], "'data' is used twice"),
        (("axes", "output"), [1], "'output' is used twice, or reserved"),
        (("axes", "a b"), [1], "letters, digits and _"),
        (("exclude",), [{"seed": 7}], "no value of seed '7'"),
        (("exclude",), [{"sed": 0}], "no axis 'sed'"),
        (("exclude",), [{"step": "studnet"}], "no value of step 'studnet'"),
        (("exclude",), [{"step": "labels", "seed": 1}], "leaves out labels/seed=1, which student/.* needs"),
        (("exclude",), [{"step": "teacher", "alpha": 1}], "no axis of the step teacher 'alpha'"),
        (("include",), [{"step": "student"}], "no axis 'step'"),
        (("exclude",), {"seed": 0}, "must be a list of mappings"),
        (("include",), [{"seed": 0, "alpha": 1}, 3], "must be a mapping"),
        (("values", "data"), None, "not a word or a number"),
    ],
)
def test_faults_are_told(path, value, message):
    content = yaml.safe_load(STUDENTS)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError, match=message) as error:
        parse_grid(content, "small.yaml")
    assert "small.yaml" in str(error.value)


def test_files_that_are_no_grids(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_grid(tmp_path / "no.yaml")
    file = tmp_path / "bad.yaml"
    for text, message in (
        ("a: [1", "not valid YAML"),
        ("", "must be a mapping"),
        ("!!python/name:os.a", "YAML"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            load_grid(file)
    with pytest.raises(InputError, match="no constant 'nothing'"):
        parse(nothing="1")


def test_faults_reach_the_user(tmp_path, capsys):
    file = tmp_path / "grid.yaml"
    file.write_text("steps: {a: {command: trian --resume}}")
    for arguments, message in (
        ([str(file)], "'trian' is no command"),
        (["no.yaml"], "no.yaml does not exist"),
    ):
        assert main(["grid", *arguments, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    file.write_text("steps: {a: {command: train --resume}}\nreport: [{name: a, steps: b}]")
    for options, message in (
        ([], "no such name 'b'"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--devices", "0;1"], "--devices must be"),
        (["--only", "seed"], "--only takes NAME=VALUE"),
    ):
        if options:
            file.write_text("steps: {a: {command: train --resume}}")
        assert main(["grid", str(file), "--output", str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


GRIDS = sorted((find_config("Base-RetinaNet-EfficientNet-FPN.yaml").parent / "grids").glob("*.yaml"))


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_shipped_grids_have_valid_commands(file):
    """Every cell's words are parsed and its config is built, as its command would."""
    grid = load_grid(file)
    figures_of(grid)
    contrasts_of(grid)
    for cell in grid.cells:
        name, *words = cell.words("runs")
        module = importlib.import_module(f"selftrain_d2.cli.{COMMANDS[name]}")
        parser = argparse.ArgumentParser(exit_on_error=False)
        module.add_arguments(parser)
        args = parser.parse_args(words)
        cfg = setup_config(args) if hasattr(args, "config_file") else None
        if name == "train":
            # It goes on after a stop, and keeps to its own folder and seed.
            assert args.resume and f"runs/{cell.id}/output" == cfg.OUTPUT_DIR
            assert cell.axes.get("seed", cfg.SEED) == cfg.SEED
            assert cell.axes.get("alpha", cfg.SELFTRAIN.ALPHA) == cfg.SELFTRAIN.ALPHA
            assert (
                bool(cfg.DATASETS.PSEUDO_TRAIN)
                == (cfg.SOLVER.PSEUDO_IMS_PER_BATCH > 0)
                == bool(args.pseudo_labels or args.unlabeled_images)
            )


def test_grids_are_shipped(tmp_path, capsys):
    assert GRIDS and not any(name.startswith("grids/") for name in shipped_configs())
    assert main(["grid", f"grids/{GRIDS[0].name}", "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "cells to run" in capsys.readouterr().out
