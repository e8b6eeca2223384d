"""Which images keep their labels, against the splits of the same seed."""

import json
from pathlib import Path

import pytest
from conftest import make_coco_set

from selftrain_d2 import InputError
from selftrain_d2.data.labeled_draw import draw_labeled
from selftrain_d2.data.splits import make_splits


def _names(content):
    return [image["file_name"] for image in content["images"]]


def test_a_draw_is_the_stratified_split_and_the_rest(tmp_path):
    source = make_coco_set(tmp_path / "all", 10, seed=3).json_file
    everything = json.loads(Path(source).read_text())
    drawn = []
    for seed in (0, 1, 2):
        files = draw_labeled(source, tmp_path / f"seed_{seed}", 3, seed)
        labeled, rest = (json.loads(file.read_text()) for file in files)
        make_splits(source, tmp_path / f"splits_{seed}", [30], seed=seed, stratified=True)
        split = json.loads((tmp_path / f"splits_{seed}" / "labeled_30.json").read_text())
        assert set(_names(labeled)) == set(_names(split)) and len(_names(labeled)) == 3
        assert sorted(_names(labeled) + _names(rest)) == sorted(_names(everything))
        for part in (labeled, rest):
            ids = {image["id"] for image in part["images"]}
            expected = [a["id"] for a in everything["annotations"] if a["image_id"] in ids]
            assert [a["id"] for a in part["annotations"]] == expected
            assert part["categories"] == everything["categories"]
        drawn.append(_names(labeled))
    assert len(set(map(tuple, drawn))) > 1


def test_a_draw_is_never_replaced_by_another(tmp_path):
    source = make_coco_set(tmp_path / "all", 6, seed=3).json_file
    files = draw_labeled(source, tmp_path / "draw", 2, 0)
    before = [file.read_bytes() for file in files]
    assert draw_labeled(source, tmp_path / "draw", 2, 0) == files
    with pytest.raises(InputError, match="another number of images: choose another output folder"):
        draw_labeled(source, tmp_path / "draw", 3, 0)
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("number", [-1, 0, 6, 7])
def test_something_is_drawn_and_something_left(tmp_path, number):
    source = make_coco_set(tmp_path / "all", 6, seed=3).json_file
    with pytest.raises(InputError, match=f"Of the 6 images of .* {number} are to be drawn"):
        draw_labeled(source, tmp_path / "draw", number, 0)
    assert not (tmp_path / "draw").exists()
