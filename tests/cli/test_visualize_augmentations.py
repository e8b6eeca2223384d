"""The contact sheets: written, of the right size, repeatable; and the mistakes of the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from selftrain_d2.cli import main

CONFIG = ["--config-file", "neon_trees/lite0_256.yaml"]


def run(coco_set, output, *arguments):
    data = ["--json", coco_set.json_file, "--images", coco_set.images]
    return main(["visualize-augmentations", *CONFIG, *data, "--output", str(output), *map(str, arguments)])


def test_a_row_a_policy_and_a_column_an_image(coco_set, tmp_path):
    sizes = {}
    for columns, policies in ((2, ["S1", "S4"]), (3, ["S1", "S2", "S3", "S4"])):
        path = tmp_path / f"{columns}.png"
        assert run(coco_set, path, "--columns", columns, "--policies", ",".join(policies)) == 0
        sizes[columns] = Image.open(path).size
    assert sizes[3][0] == pytest.approx(sizes[2][0] * 1.5, abs=2)
    assert sizes[3][1] == pytest.approx(sizes[2][1] * 2, abs=2)


def test_the_seed_decides_the_picture(coco_set, tmp_path):
    pictures = []
    for number, seed in enumerate((1, 1, 2)):
        assert (
            run(coco_set, tmp_path / f"{number}.png", "--columns", 2, "--policies", "S4", "--seed", seed) == 0
        )
        pictures.append(np.asarray(Image.open(tmp_path / f"{number}.png")))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_boxes_and_masks_are_drawn(coco_set, tmp_path):
    content = json.loads(json.dumps(coco_set.content))
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    json_file = tmp_path / "with_masks.json"
    json_file.write_text(json.dumps(content))
    coco_set = coco_set._replace(json_file=str(json_file))
    pictures = {}
    for masks in ("False", "True"):
        path = tmp_path / f"{masks}.png"
        assert run(coco_set, path, "--columns", 1, "--policies", "S1", "MODEL.MASK_ON", masks) == 0
        pictures[masks] = np.asarray(Image.open(path).convert("RGB")).astype(int)
    yellow = np.abs(pictures["False"] - (0xF0, 0xE4, 0x42)).sum(axis=2) < 60
    blue = np.abs(pictures["False"] - (0x56, 0xB4, 0xE9)).sum(axis=2) < 60
    assert yellow.sum() + blue.sum() > 100  # the outline of a box
    changed = np.abs(pictures["True"] - pictures["False"]).sum(axis=2) > 30
    assert changed.mean() > 0.02  # a mask covers its object


def test_operations(coco_set, tmp_path):
    assert run(coco_set, tmp_path / "operations.png", "--operations") == 0
    width, height = Image.open(tmp_path / "operations.png").size
    assert height > width > 500


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--columns", "0"], "--columns is 0"),
        (["--policies", "S9"], "'S9', which is not registered; known are S1, S2, S3, S4"),
    ],
)
def test_mistakes(coco_set, tmp_path, capsys, arguments, message):
    assert run(coco_set, tmp_path / "a.png", *arguments) == 2
    assert message in capsys.readouterr().err


def test_mistakes_about_data(coco_set, tmp_path, capsys):
    output = ["--output", str(tmp_path / "a.png")]
    assert main(["visualize-augmentations", *CONFIG, "--json", coco_set.json_file, *output]) == 2
    assert "--json needs --images" in capsys.readouterr().err
    assert main(["visualize-augmentations", *CONFIG, "--dataset", "nowhere", *output]) == 2
    assert "No data set 'nowhere' is registered" in capsys.readouterr().err
    assert run(coco_set, tmp_path / "a.docx") == 2
    assert "use the suffix .png" in capsys.readouterr().err
