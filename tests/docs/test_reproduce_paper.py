"""docs/reproduce_paper.md: each of its commands, taken from the page itself, as a dry run."""

import json
import re
import shlex
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from selftrain_d2.cli import main
from selftrain_d2.cli.common import find_config, shipped_configs
from selftrain_d2.engine import checks
from selftrain_d2.experiments import cost
from selftrain_d2.experiments.grid.definition import load_grid

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reproduce_paper.md").read_text(encoding="utf-8")
# What one brings: data sets, as detectron2 was told where they are when it was imported, and weights.
BROUGHT = (MetadataCatalog.get("coco_2017_train").image_root.partition("coco/")[0], "datasets/", "downloads/")


def commands_of_page():
    """Words of each selftrain-d2 command in the page's shell blocks, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("selftrain-d2 ")]


def runs():
    """The page's commands, each grid with all its runs in place of itself: ids and words."""
    for number, words in enumerate(commands_of_page()):
        if words[0] != "grid":
            yield f"{number}-{words[0]}", words
            continue
        grid = load_grid(find_config(words[1]))
        for cell in grid.cells:
            yield f"{number}-{Path(words[1]).stem}/{cell.id}", cell.words(words[words.index("--output") + 1])


RUNS = list(runs())


@pytest.fixture
def model_built_once(monkeypatch):
    """Runs differ in data and schedule; a model is built once, without memory as always."""
    built = {}

    def build(cfg):
        key = json.dumps({**cfg.MODEL, "WEIGHTS": ""})
        if key not in built:
            built[key] = build_model(cfg)
        return built[key]

    monkeypatch.setattr(checks, "build_model", build)


def dry_run(words, capsys):
    """Lines that a dry run prints, as (title, text)."""
    options = [] if "--dry-run" in words else ["--dry-run"]
    status = main([words[0], *options, *words[1:]])
    printed = capsys.readouterr()
    assert status == 0, (words, printed.err)
    return [tuple(line.partition(": ")[::2]) for line in printed.out.splitlines()]


def test_every_command_starts_and_finds_what_those_before_it_made(
    tmp_path, monkeypatch, capsys, model_built_once
):
    monkeypatch.chdir(tmp_path)
    made = []
    for name, words in RUNS:
        lines = dry_run(words, capsys)
        for title, text in lines:
            if title == "missing":
                known = text.startswith(BROUGHT) or any(Path(text).is_relative_to(path) for path in made)
                assert known, f"{name} needs {text}, which no command before it makes"
        outputs = [path for title, text in lines if title == "output" for path in text.split(", ")]
        assert outputs, name
        made += outputs
    assert not list(tmp_path.iterdir())  # dry runs write nothing


def test_two_runs_never_share_an_output():
    outputs = []
    for _, words in RUNS:
        if "--dry-run" not in words and words[0] == "train" and "OUTPUT_DIR" in words:
            outputs.append(words[words.index("OUTPUT_DIR") + 1])
        elif words[0] in ("label", "convert", "splits"):
            outputs.append(words[words.index("--output") + 1])
    assert len(set(outputs)) == len(outputs) > 100


def test_grids_of_the_page_dry_run_themselves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    grids = [words for words in commands_of_page() if words[0] == "grid"]
    assert len(grids) == 6
    for words in grids:
        assert main([*words, "--dry-run"]) == 0
        assert len(re.findall(r"^# \w+/", capsys.readouterr().out, re.MULTILINE)) == len(
            load_grid(find_config(words[1])).cells
        )


def test_every_config_of_the_paper_is_used():
    used = {words[words.index("--config-file") + 1] for _, words in RUNS if words[0] == "train"}
    paper = {
        name
        for name in shipped_configs()
        if name.startswith(("coco/", "pascal_voc/")) and "/Base-" not in name and "one_gpu" not in name
    }
    assert used == paper


def test_every_table_has_its_row():
    rows = re.findall(r"^\| (\[?[^|]*) \|[^|]*\|[^|]*\|$", PAGE, re.MULTILINE)
    numbers = {int(n) for row in rows for n in re.findall(r"\b\d+\b", row.partition("](")[0])}
    assert numbers >= {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14}


@pytest.mark.parametrize(
    ("table", "begin"), [(cost.cost_table, "| model | GFLOPs"), (cost.grid_table, "| grid | trainings")]
)
def test_costs_are_the_functions(table, begin):
    """With the forward passes that docs/model_zoo.md has; L2, which is listed there at 512 pixels, by area."""
    zoo = (DOCS / "model_zoo.md").read_text(encoding="utf-8")

    def gflops(model, size):
        kind, _, name = model.rpartition(", ")
        row = re.search(
            rf"^\| {name} \|(.*)\|$", zoo[zoo.index("## Segmentation") :] if kind else zoo, re.MULTILINE
        )
        cells = [cell.strip() for cell in row[1].split("|")]
        return float(cells[3]) * (size / 512) ** 2 if kind else float(cells[1])

    listed = PAGE[PAGE.index(begin) :].partition("\n\n")[0].splitlines()
    expected = table(gflops).splitlines()
    assert len(listed) == len(expected)
    for ours, theirs in zip(listed, expected):
        for left, right in zip(ours.split("|"), theirs.split("|")):
            if re.fullmatch(r"[\d,.\s]+", left):
                left, right = (float(text.replace(",", "")) for text in (left, right))
                assert left == pytest.approx(right, rel=1e-3, abs=0.6 if left > 100 else 0.011)
            else:
                assert left == right
