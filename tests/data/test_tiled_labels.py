"""Tiles of a labeled data set, against objects painted into pixels and cut with them."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import SMALL_MODEL, assert_refused, make_coco_set
from hypothesis import given, settings
from hypothesis import strategies as st

from selftrain_d2.cli import main
from selftrain_d2.data import tiled_labels
from selftrain_d2.data.coco_file import read_coco
from selftrain_d2.data.tiled_labels import tiled_content
from selftrain_d2.data.tiles import Tiles


@st.composite
def data_sets(draw):
    """A COCO dictionary of up to two images with whole-numbered boxes, some of them crowd regions."""
    images, annotations = [], []
    for image_id in range(5, 5 + draw(st.integers(1, 2))):
        height, width = draw(st.integers(10, 90)), draw(st.integers(10, 90))
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width})
        for _ in range(draw(st.integers(0, 4))):
            x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
            w, h = draw(st.integers(1, width - x)), draw(st.integers(1, height - y))
            annotation = {
                "image_id": image_id,
                "category_id": draw(st.sampled_from((3, 8))),
                "bbox": [x, y, w, h],
            }
            annotation |= {"id": 100 + len(annotations), "area": w * h, "iscrowd": draw(st.integers(0, 1))}
            annotations.append(annotation)
    categories = [{"id": 3, "name": "red"}, {"id": 8, "name": "green"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def painted(annotation, image):
    mask = np.zeros((image["height"], image["width"]), bool)
    x, y, w, h = annotation["bbox"]
    mask[y : y + h, x : x + w] = True
    return mask


@given(
    coco=data_sets(),
    size=st.integers(8, 60),
    overlap=st.floats(0, 0.6),
    min_visible=st.sampled_from((0.1, 0.5, 1.0)),
    drop_empty=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_each_tile_has_what_its_pixels_show(coco, size, overlap, min_visible, drop_empty):
    content, counts = tiled_content(
        coco, Tiles(size, overlap), min_visible=min_visible, drop_empty=drop_empty
    )
    assert [image["id"] for image in content["images"]] == list(range(1, len(content["images"]) + 1))
    assert (
        len({image["file_name"] for image in content["images"]}) == len(content["images"]) == counts["tiles"]
    )
    assert [a["id"] for a in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    by_tile = {
        (image["source"], *image["tile"]): [a for a in content["annotations"] if a["image_id"] == image["id"]]
        for image in content["images"]
    }
    objects = seen = 0
    for image in coco["images"]:
        masks = [(a, painted(a, image)) for a in coco["annotations"] if a["image_id"] == image["id"]]
        enough = set()
        for x0, y0, x1, y1 in Tiles(size, overlap).grid(image["height"], image["width"]).tolist():
            expected = []
            for annotation, mask in masks:
                part = mask[y0:y1, x0:x1]
                if part.any():
                    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
                    box = [columns[0], rows[0], len(columns), len(rows)]
                    ignored = annotation["iscrowd"] or part.sum() / mask.sum() < min_visible
                    expected.append(
                        (annotation["id"], annotation["category_id"], int(ignored), *box, part.sum())
                    )
                    if not ignored:
                        enough.add(annotation["id"])
            if drop_empty and all(entry[2] for entry in expected):
                assert (image["file_name"], x0, y0, x1, y1) not in by_tile
                continue
            found = by_tile.pop((image["file_name"], x0, y0, x1, y1))
            got = [(a["source_id"], a["category_id"], a["iscrowd"], *a["bbox"], a["area"]) for a in found]
            np.testing.assert_allclose(np.array(got).reshape(-1, 8), np.array(expected).reshape(-1, 8))
            objects += sum(not entry[2] for entry in expected)
        seen += len(enough)
    assert not by_tile and counts["objects"] == objects
    real = sum(not a["iscrowd"] for a in coco["annotations"])
    assert counts["objects of which no tile shows enough"] == real - seen


@pytest.fixture
def large(tmp_path):
    coco = make_coco_set(tmp_path / "large", 3, seed=2, size=150)
    Path(coco.images, "deep").mkdir()
    Path(coco.images, "003.png").rename(Path(coco.images, "deep", "c.jpg"))  # a PNG still
    coco.content["images"][2]["file_name"] = "deep/c.jpg"
    coco.content["annotations"][0]["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    Path(coco.json_file).write_text(json.dumps(coco.content))
    return coco


LABELS_OF_TILES = ["--labels", "{}/labels.json", "--labeled-images", "{}/images"]


def command(large, output, *more):
    return ["labels", "tile", large.json_file, str(output), "--images", large.images, "--tile", "64", *more]


def test_files(large, tmp_path, capsys):
    output = tmp_path / "tiles"
    assert main(command(large, output)) == 0
    printed = capsys.readouterr().out
    assert "3 images" in printed and "27 tiles" in printed and "1 masks left out" in printed
    labels = read_coco(output / "labels.json")  # what trainings read
    assert labels.class_names == ["red", "green"] and labels.objects > 3
    for image in labels.content["images"]:
        x0, y0, x1, y1 = image["tile"]
        expected = cv2.imread(f"{large.images}/{image['source']}")[y0:y1, x0:x1]
        np.testing.assert_array_equal(cv2.imread(f"{output}/images/{image['file_name']}"), expected)
    assert (output / "images" / "deep" / "c.jpg_52_0.png").is_file()  # 64 - 12 of overlap
    train = ["train", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml", "--dry-run", *LABELS_OF_TILES]
    words = [word.format(output) for word in train] + [*SMALL_MODEL, "SELFTRAIN.IGNORE_CROWD", "True"]
    assert main([*words, "OUTPUT_DIR", str(tmp_path / "run")]) == 0


def test_stopped_and_gone_on(large, tmp_path, capsys, monkeypatch):
    whole, output = tmp_path / "whole", tmp_path / "tiles"
    assert main(command(large, whole)) == 0
    write, written = tiled_labels._write_png, []

    def stopping(file, pixels):
        if len(written) == 12:
            raise KeyboardInterrupt
        write(file, pixels)
        written.append(file)

    monkeypatch.setattr(tiled_labels, "_write_png", stopping)
    assert main(command(large, output)) == 130
    assert "goes on" in capsys.readouterr().err and not (output / "labels.json").exists()
    (output / "images" / ".001.png_0_0.png.123").write_bytes(b"of a run that was killed")
    monkeypatch.setattr(tiled_labels, "_write_png", lambda *a: (write(*a), written.append(a[0])))
    assert main(command(large, output)) == 0
    assert len(written) == len(set(written)) == 27
    files = [p.relative_to(whole) for p in whole.rglob("*") if p.is_file()]
    assert sorted(files) == sorted(p.relative_to(output) for p in output.rglob("*") if p.is_file())
    assert all((whole / name).read_bytes() == (output / name).read_bytes() for name in files)
    assert main(command(large, output)) == 0 and len(written) == 27  # complete: nothing is redone


def test_mistakes(large, tmp_path, capsys):
    output = tmp_path / "tiles"
    for more, said in (
        (["--min-visible", "0"], "above 0"),
        (["--overlap", "0.95"], "from 0 to 0.9"),
    ):
        assert_refused(command(large, output, *more), capsys, said, output=output)
    inside = command(large, f"{large.images}/tiles")
    assert_refused(inside, capsys, "lies in the image folder")
    assert_refused([*command(large, output)[:4], "--tile", "64"], capsys, "give --images", output=output)
    assert main(command(large, output)) == 0
    capsys.readouterr()
    assert_refused(command(large, output, "--drop-empty"), capsys, "begun with another drop_empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    assert_refused(command(large, tmp_path / "full"), capsys, "is not empty and has no tiles.json")
    cv2.imwrite(f"{large.images}/002.png", np.zeros((150, 149, 3), np.uint8))
    assert main(command(large, tmp_path / "other")) == 2
    assert "149 x 150 pixels, but" in capsys.readouterr().err
    Path(large.images, "002.png").unlink()
    assert main(command(large, tmp_path / "other")) == 2
    assert "002.png cannot be read" in capsys.readouterr().err
