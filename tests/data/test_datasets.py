import json
import logging

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from PIL import Image

from selftrain_d2 import InputError, register_image_folder
from selftrain_d2.data.datasets import (
    check_coco_json,
    check_same_classes,
    difference_of_classes,
    list_images,
    load_image_folder,
    read_image_size,
    register_human_labels,
    unregister,
)
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper


def _image(path, height=20, width=30, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **save)


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_folder_with_broken_files_and_many_formats(tmp_path):
    _image(tmp_path / "a.jpg")
    _image(tmp_path / "deep" / "er" / "b.PNG")
    _image(tmp_path / "deep" / "c.webp")
    _image(tmp_path / "d.tif")
    _image(tmp_path / "e.bmp")
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "notes.txt").write_text("ignored")

    register_image_folder("photos", tmp_path)
    dicts = DatasetCatalog.get("photos")

    assert [d["image_id"] for d in dicts] == ["a.jpg", "d.tif", "deep/c.webp", "deep/er/b.PNG", "e.bmp"]
    assert all((d["height"], d["width"]) == (20, 30) for d in dicts)
    assert set(MetadataCatalog.get("photos").unreadable_files) == {"zero.jpg", "text.png"}
    assert "annotations" not in dicts[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_image_that_detectron2_reads(tmp_path, orientation):
    _image(tmp_path / "a.jpg", exif=_exif(orientation))
    assert read_image_size(tmp_path / "a.jpg") == utils.read_image(str(tmp_path / "a.jpg"), "BGR").shape[:2]


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        register_image_folder("nothing", tmp_path / "nothing")
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(InputError, match="holds no image"):
        list_images(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="no readable image"):
        load_image_folder(tmp_path)
    assert "nothing" not in DatasetCatalog


def test_a_name_is_taken_once(tmp_path):
    _image(tmp_path / "a.jpg")
    register_image_folder("twice", tmp_path)
    with pytest.raises(InputError, match="'twice' is registered already"):
        register_image_folder("twice", tmp_path)


def test_human_labels_have_contiguous_classes(coco_set):
    register_human_labels("human", coco_set.json_file, coco_set.images)
    dicts = DatasetCatalog.get("human")
    assert MetadataCatalog.get("human").thing_classes == ["red", "green"]
    assert sum(len(d["annotations"]) for d in dicts) == len(coco_set.content["annotations"])
    assert {a["category_id"] for d in dicts for a in d["annotations"]} == {0, 1}


def _broken(coco_set, change):
    content = json.loads(json.dumps(coco_set.content))
    change(content)
    with open(coco_set.json_file, "w") as file:
        json.dump(content, file)


def _set_box(box):
    return lambda c: c["annotations"][0].update(bbox=box)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "no 'categories'"),
        (lambda c: c.update(images=[]), "no 'images'"),
        (lambda c: c["images"][2].update(file_name="gone.png"), r"1 images that are not in .*gone\.png"),
        (lambda c: c["images"][1].update(id=1), "two images of the same id: 1"),
        (lambda c: c["categories"][1].update(name="red"), "same name: 'red'"),
        (lambda c: c["annotations"][0].update(image_id=999), "no image has that id"),
        (
            lambda c: c["annotations"][0].update(category_id=7),
            "its 'category_id' is 7, but no category has that id",
        ),
        (lambda c: c["annotations"][0].pop("bbox"), "'bbox'"),
        (_set_box([0, 0, -1, 5]), "has a negative size"),
        (_set_box([0, 0, 5, float("nan")]), "not four finite numbers"),
        (_set_box([90, 0, 16, 5]), "10 pixels outside its image of 96 x 96"),
        (_set_box([-3, 0, 16, 5]), "3 pixels outside"),
        (_set_box([1, 2, 3]), "not four finite numbers"),
    ],
)
def test_faults_of_coco_files(coco_set, change, message):
    _broken(coco_set, change)
    with pytest.raises(InputError, match=message) as error:
        check_coco_json(coco_set.json_file, coco_set.images)
    assert coco_set.json_file in str(error.value) and "\n" not in str(error.value)


def test_boxes_on_the_border_are_fine(coco_set):
    _broken(coco_set, _set_box([0, 0, 96.4, 96]))
    check_coco_json(coco_set.json_file, coco_set.images)


def test_boxes_without_area_are_told_and_never_trained_on(coco_set, small_config, caplog):
    """COCO's own train2017 has two, in images 200365 and 550395."""
    assert coco_set.content["annotations"][0]["image_id"] == 1
    _broken(coco_set, _set_box([10, 20, 30, 0]))
    with pytest.raises(InputError, match="has no area"):
        check_coco_json(coco_set.json_file, coco_set.images, allow_flat=False)
    caplog.set_level(logging.WARNING)
    register_human_labels("with_flat_box", coco_set.json_file, coco_set.images)
    try:
        assert "1 boxes without area" in caplog.text and "annotations[0] (id 1, image_id 1)" in caplog.text
        first = next(d for d in DatasetCatalog.get("with_flat_box") if d["image_id"] == 1)
        mapped = SelfTrainingDatasetMapper(small_config, is_train=True)({**first, "label_source": "human"})
        assert len(mapped["instances"]) <= len(first["annotations"]) - 1
        assert (mapped["instances"].gt_boxes.area() > 0).all()
    finally:
        unregister("with_flat_box")


def test_not_json_and_not_there(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        check_coco_json(tmp_path / "no.json", tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        check_coco_json(tmp_path / "bad.json", tmp_path)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match=r"top level is \[\], not an object"):
        check_coco_json(tmp_path / "list.json", tmp_path)


def test_classes_must_agree():
    check_same_classes(["a", "b"], ["a", "b"], "x", "y")
    with pytest.raises(
        InputError, match=r"x has other classes than y: \[b, a\] \(2\) against \[a, b\] \(2\)"
    ):
        check_same_classes(["a", "b"], ["b", "a"], "x", "y")


@pytest.mark.parametrize(
    ("expected", "found", "ending"),
    [
        ("abc", "acb", "the same in another order, the first that differs is number 1, 'c' for 'b'"),
        ("abc", "abd", "lacking c and with d"),
        ("abcdefgh", "abcdefg", "lacking h"),  # the lists themselves show but the first five
        ("a", "abc", "with b, c"),
        ("ab", "aba", "the same in another order, the first that differs is number 2, 'a' for None"),
    ],
)
def test_what_differs_between_classes_is_said(expected, found, ending):
    difference = difference_of_classes(list(expected), list(found))
    assert difference.startswith(f"[{', '.join(found[:5])}") and difference.endswith(f", {ending}")


def test_images_are_readable_by_detectron2_whatever_their_mode(tmp_path):
    """Grey, palette, alpha, CMYK and 16-bit files register and are read as three channels."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (8, 9), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.dstack([grey] * 4)).save(tmp_path / "alpha.png")
    Image.fromarray(np.dstack([grey] * 4), mode="CMYK").save(tmp_path / "cmyk.jpg")
    cv2.imwrite(str(tmp_path / "sixteen.png"), grey.astype(np.uint16) * 256)
    dicts, unreadable = load_image_folder(tmp_path)
    assert len(dicts) == 5 and not unreadable
    for d in dicts:
        assert utils.read_image(d["file_name"], "BGR").shape == (8, 9, 3)
