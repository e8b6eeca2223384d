"""The notebook, run from its first cell to its last, on photographs with labels of YOLO."""

import shutil
from pathlib import Path

import nbformat
import onnx
import pytest
from conftest import make_coco_set
from nbclient import NotebookClient

from selftrain_d2.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
# A detector of seconds in place of minutes.
SETTINGS = """
LABELS, PHOTOS, VAL_LABELS = "yolo/data.yaml", "yolo/images", "voc"
CONFIG, STEPS, SCORE_FLOOR = "neon_trees/lite0_256.yaml", 2, 0.001
OPTIONS = "INPUT.AUGMENTATION.IMAGE_SIZE 64 MODEL.FPN.OUT_CHANNELS 16 MODEL.RETINANET.NUM_CONVS 1 "
OPTIONS += "SELFTRAIN.SCORE_THRESH 0.005"
"""


def read():
    return nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)


def test_it_is_kept_without_outputs():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert "LABELS = " in cells[0].source  # what the test below replaces
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_it_runs(tmp_path):
    shutil.copy(EXAMPLES / "run_onnx.py", tmp_path)
    labeled, rest = make_coco_set(tmp_path / "coco", 3, seed=1), make_coco_set(tmp_path / "rest", 3, seed=2)
    words = ["labels", "convert", labeled.json_file, str(tmp_path / "yolo"), "--to", "yolo"]
    assert main([*words, "--images", labeled.images, "--copy-images"]) == 0
    for photo in Path(rest.images).iterdir():
        shutil.copy(photo, tmp_path / "yolo/images" / f"more_{photo.name}")
    validation = make_coco_set(tmp_path / "validation", 2, seed=3)
    words = ["labels", "convert", validation.json_file, str(tmp_path / "voc"), "--to", "voc"]
    assert main([*words, "--images", validation.images]) == 0

    notebook = read()
    next(cell for cell in notebook.cells if cell.cell_type == "code").source = SETTINGS
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert onnx.load(str(tmp_path / "output/my_trees/student.onnx")).graph.output[0].name == "boxes"
    last = notebook.cells[-1].outputs
    assert "objects" in last[0].text and "image/png" in last[1].data
