"""docs/your_data.md: its commands, taken from the page itself, are such as the command line takes.

What they do is tested in tests/cli/test_labels_to_export.py."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from selftrain_d2.cli import COMMANDS
from selftrain_d2.cli.common import setup_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/your_data.md").read_text(encoding="utf-8")


def commands(start="selftrain-d2 "):
    """Words of the page's commands that begin so, but the first."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith(start)]


def forms():
    """What the page's first table gives as ``--labels`` and ``--unlabeled-images``, by the format."""
    rows = re.findall(r"^\| ([^|]+?) (?:\([^|]*\) )?\| `([^`]+)`[^|]*\| `([^`]+)` \|$", PAGE, re.MULTILINE)
    return {name: (labels, unlabeled) for name, labels, unlabeled in rows if name != "labels"}


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[0])
def test_commands_are_taken(words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"selftrain_d2.cli.{COMMANDS[words[0]]}").add_arguments(parser)
    args = parser.parse_args(words[1:])
    if words[0] == "self-train":
        assert setup_config(args).SOLVER.MAX_ITER == 5000


def test_the_page_has_each_format():
    assert list(forms()) == ["YOLO", "PASCAL VOC", "COCO JSON"]


def test_the_page_goes_from_labels_to_a_file():
    assert [words[0] for words in commands()] == ["self-train", "inspect", "export-model"]
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
