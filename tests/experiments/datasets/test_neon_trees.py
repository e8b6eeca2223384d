"""The demo's data set: parts share no pixel, boxes follow the stated rule, the output is whole or absent."""

import dataclasses
import hashlib
import json
import subprocess
import zipfile
from itertools import combinations
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selftrain_d2.cli import main
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.datasets import neon_trees
from selftrain_d2.experiments.datasets.neon_trees import (
    REGIONS,
    AnnotatedImage,
    Region,
    clip_to_tile,
    parse_voc,
    prepare_neon_trees,
    write_dataset,
)

SIZES = {
    "2019_YELL_2_528000_4978000_image_crop2": (2299, 2472),
    "2019_YELL_2_541000_4977000_image_crop": (1249, 1035),
}


def voc(width, height, boxes):
    objects = "".join(
        "<object><name>Tree</name><bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
        + "</bndbox></object>"
        for box in boxes
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{objects}</annotation>".encode()


# ---- The split ------------------------------------------------------------------------------------


def test_tiles_lie_inside_their_image_and_share_no_pixel():
    covered = {name: np.zeros((height, width), np.uint8) for name, (width, height) in SIZES.items()}
    for region in REGIONS:
        width, height = SIZES[region.image]
        for left, top, right, bottom in region.tiles():
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            covered[region.image][top:bottom, left:right] += 1
    assert all(cover.max() == 1 for cover in covered.values())


def test_parts_are_apart_and_each_draws_on_both_images():
    for part in ("labeled", "unlabeled", "validation"):
        assert {r.image for r in REGIONS if r.part == part} == set(SIZES)
    for a, b in combinations(REGIONS, 2):
        if a.image == b.image:
            (ax, ay, *_), (*_, ar, ab) = a.tiles()[0], a.tiles()[-1]
            (bx, by, *_), (*_, br, bb) = b.tiles()[0], b.tiles()[-1]
            assert max(bx - ar, ax - br, by - ab, ay - bb) >= 48


# ---- Boxes ----------------------------------------------------------------------------------------

coordinate = st.integers(0, 60)


@given(st.tuples(coordinate, coordinate, st.integers(1, 40), st.integers(1, 40)), coordinate, coordinate)
def test_clipping_agrees_with_counting_pixels(box, tile_x, tile_y):
    x, y, width, height = box
    canvas = np.zeros((128, 128), bool)
    canvas[y : y + height, x : x + width] = True
    view = canvas[tile_y : tile_y + 32, tile_x : tile_x + 32]
    boxes, fraction = clip_to_tile(
        np.array([[x, y, x + width, y + height]], float), (tile_x, tile_y, tile_x + 32, tile_y + 32)
    )
    assert fraction[0] == pytest.approx(view.sum() / canvas.sum())
    if view.any():
        rows, columns = np.nonzero(view)
        assert boxes[0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_faulty_voc_boxes_are_left_out_and_counted():
    good, reaching_out = (2, 3, 10, 12), (40, 20, 60, 35)
    bad = [(5, 5, 5, 9), (9, 9, 4, 12), (70, 5, 80, 9), ("nan", 1, 4, 4), (1, 1, "inf", 4)]
    boxes, faulty = parse_voc(voc(50, 30, [good, *bad, reaching_out]), 50, 30, "picture")
    assert boxes.tolist() == [list(good), [40, 20, 50, 30]]
    assert faulty == len(bad)


def test_voc_without_objects_gives_an_empty_array():
    boxes, faulty = parse_voc(voc(50, 30, []), 50, 30, "picture")
    assert boxes.shape == (0, 4) and faulty == 0


def test_voc_of_another_size_is_refused():
    with pytest.raises(InputError, match=r"picture\.xml"):
        parse_voc(voc(50, 31, []), 50, 30, "picture")


# ---- The files ------------------------------------------------------------------------------------


def test_written_boxes_follow_the_border_rule_and_pixels_are_untouched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 96, 3), np.uint8)
    # Crossing x = 32 with 10 of 20 pixels (kept on both sides), 6 of 20, and 1 of 20 on the right side.
    image = AnnotatedImage(pixels, np.array([[22, 0, 42, 8], [18, 10, 38, 18], [13, 20, 33, 28]], float))
    regions = [
        Region(part, "photo", x, 0, 1, 1)
        for x, part in ((0, "labeled"), (32, "unlabeled"), (64, "validation"))
    ]
    write_dataset(tmp_path, {"photo": image}, regions, "licence", tile_size=32)
    coco = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}

    def described(name):
        return [(a["bbox"], a["iscrowd"]) for a in coco[name]["annotations"]]

    assert described("labeled") == [([22, 0, 10, 8], 0), ([18, 10, 14, 8], 0), ([13, 20, 19, 8], 0)]
    assert described("unlabeled_truth") == [([0, 0, 10, 8], 0), ([0, 10, 6, 8], 1)]
    assert described("validation") == described("unlabeled") == []
    assert coco["unlabeled"]["images"] == coco["unlabeled_truth"]["images"]
    for x, part in ((0, "labeled"), (32, "unlabeled"), (64, "validation")):
        (entry,) = coco[part]["images"]
        written = cv2.imread(str(tmp_path / "images" / part / entry["file_name"]))
        np.testing.assert_array_equal(written, pixels[:, x : x + 32])


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A stand-in for the wheel: noise of the right sizes and random boxes, with its own pinned hash."""
    rng = np.random.default_rng(1)
    path = tmp_path / "stand_in.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, (width, height) in SIZES.items():
            flat = np.full((height, width, 3), rng.integers(0, 255, 3), np.uint8)
            corner = rng.integers(0, [width - 60, height - 60], (300, 2))
            boxes = np.concatenate([corner, corner + rng.integers(8, 60, (300, 2))], axis=1)
            archive.writestr(f"deepforest/data/{name}.png", cv2.imencode(".png", flat)[1].tobytes())
            archive.writestr(f"deepforest/data/{name}.xml", voc(width, height, boxes))
        archive.writestr(neon_trees.LICENSE_IN_WHEEL, "MIT License")
    pinned = dataclasses.replace(neon_trees.WHEEL, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(neon_trees, "WHEEL", pinned)
    return path


def snapshot(folder):
    return {
        p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_output_loads_in_detectron2_and_is_made_only_once(tmp_path, wheel):
    from detectron2.data.datasets import load_coco_json

    output = tmp_path / "trees"
    manifest = prepare_neon_trees(output, wheel)
    for name, counts in manifest["parts"].items():
        dicts = load_coco_json(str(output / f"{name}.json"), str(output / "images" / name.split("_")[0]))
        boxes = [a for d in dicts for a in d["annotations"]]
        assert (len(dicts), len(boxes)) == (counts["tiles"], counts["trees"] + counts["ignore_regions"])
        assert all(cv2.imread(d["file_name"]).shape == (d["height"], d["width"], 3) for d in dicts[::20])
        assert all(b["bbox"][2] > 0 and b["bbox"][3] > 0 for b in boxes)
    assert manifest["parts"]["unlabeled"]["trees"] == 0 < manifest["parts"]["unlabeled_truth"]["trees"]
    assert manifest["parts"]["labeled"]["ignore_regions"] == 0

    before = snapshot(output)
    wheel.unlink()  # a finished folder needs no source
    assert prepare_neon_trees(output, wheel) == manifest
    assert snapshot(output) == before


def test_a_damaged_output_is_made_anew(tmp_path, wheel):
    output = tmp_path / "trees"
    prepare_neon_trees(output, wheel)
    content = {name: data for name, (_, data) in snapshot(output).items()}
    next((output / "images" / "labeled").iterdir()).unlink()
    (output / "validation.json").write_text("{}")
    prepare_neon_trees(output, wheel)
    assert {name: data for name, (_, data) in snapshot(output).items()} == content


def test_an_interruption_leaves_nothing_and_a_killed_run_is_no_obstacle(tmp_path, wheel, monkeypatch):
    output = tmp_path / "trees"
    killed = tmp_path / ".trees.partial"
    killed.mkdir()
    (killed / "half.png").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(neon_trees.cv2, "imwrite", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare_neon_trees(output, wheel)
    assert not output.exists() and not killed.exists()
    prepare_neon_trees(output, wheel)
    assert not (output / "half.png").exists() and (output / "manifest.json").is_file()


# ---- Mistakes -------------------------------------------------------------------------------------


def test_a_foreign_folder_is_never_touched(tmp_path, wheel, capsys):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    assert main(["prepare-neon-trees", "--output", str(precious), "--wheel", str(wheel)]) == 2
    assert "precious" in capsys.readouterr().err
    assert [p.name for p in precious.iterdir()] == ["thesis.txt"]


def test_files_added_to_a_damaged_output_are_never_lost(tmp_path, wheel):
    output = tmp_path / "trees"
    prepare_neon_trees(output, wheel)
    (output / "labeled.json").write_text("{}")
    (output / "images" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="trees holds files"):
        prepare_neon_trees(output, wheel)
    assert (output / "images" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [None, b"not the wheel"])
def test_a_wrong_wheel_is_refused_and_nothing_is_written(tmp_path, capsys, content):
    wheel = tmp_path / "some.whl"
    if content:
        wheel.write_bytes(content)
    assert main(["prepare-neon-trees", "--output", str(tmp_path / "trees"), "--wheel", str(wheel)]) == 2
    assert "some.whl" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == (["some.whl"] if content else [])


def test_a_failed_download_names_pip_s_reason_and_the_way_out(tmp_path, monkeypatch, capsys):
    def no_network(command, **_):
        assert {"download", "--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command)
        return SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    assert main(["prepare-neon-trees", "--output", str(tmp_path / "trees")]) == 2
    message = capsys.readouterr().err
    assert "no route to host" in message and "--wheel" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_real_imagery(tmp_path):
    """Needs the package index. The source holds 574 and 279 trees."""
    manifest = prepare_neon_trees(tmp_path / "trees")
    assert [image["boxes"] for image in manifest["source"]["images"].values()] == [574, 279]
    assert {name: (p["tiles"], p["trees"]) for name, p in manifest["parts"].items()} == {
        "labeled": (21, 131),
        "unlabeled": (98, 0),
        "unlabeled_truth": (98, 420),
        "validation": (43, 210),
    }
