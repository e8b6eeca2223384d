"""Human labels to compare with: classes by name, crowd regions kept, and one sentence for a file that is none."""

import json

import pytest
from detectron2.structures import BoxMode

from selftrain_d2.errors import InputError
from selftrain_d2.inspection.human_labels import read_human_labels

CONTENT = {
    "images": [
        {"id": 7, "file_name": "b/7.png", "height": 10, "width": 20},
        {"id": 3, "file_name": "3.png", "height": 30, "width": 40},
    ],
    "categories": [{"id": 5, "name": "fir"}, {"id": 2, "name": "ash"}, {"id": 9, "name": "house"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4]},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        {"id": 3, "image_id": 3, "category_id": 9, "bbox": [0, 0, 5, 5]},
    ],
}


def write(tmp_path, content):
    path = tmp_path / "labels.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_classes_are_matched_by_name_whatever_their_ids_and_order(tmp_path):
    found = read_human_labels(write(tmp_path, CONTENT), ["fir", "yew", "ash"])
    assert found.classes == {"fir", "ash"} and found.unknown_classes == {"house": 1}
    first, second = found.dicts
    assert (first["file_name"], first["height"], first["width"]) == ("b/7.png", 10, 20)
    assert [(a["category_id"], a["iscrowd"]) for a in first["annotations"]] == [(0, 0), (2, 1)]
    assert first["annotations"][0]["bbox"] == [1, 2, 4, 6]
    assert first["annotations"][0]["bbox_mode"] == BoxMode.XYXY_ABS
    assert second["annotations"] == []


def changed(key, value):
    return {**CONTENT, key: value}


def annotation(**changes):
    return changed("annotations", [{**CONTENT["annotations"][0], **changes}])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no json", "not valid JSON"),
        ([], "not a COCO file"),
        ({"images": []}, "not a COCO file"),
        (changed("images", []), "no 'images'"),
        ({**CONTENT, "images": [], "annotations": []}, "no 'images'"),
        (changed("categories", [{"id": 5, "name": "boat"}] * 2), "two categories of the same id: 5"),
        (changed("annotations", [{"id": 1}]), "annotations[0] (id 1): its 'image_id' is null"),
        (annotation(image_id=99), "99"),
        (annotation(category_id=99), "99"),
        (annotation(bbox=[1, 2, 3]), "[1, 2, 3]"),
        (
            annotation(bbox=[1, 2, 3, float("nan")]),
            "annotations[0] (id 1, image_id 7): its 'bbox' [1, 2, 3, NaN]",
        ),
        (annotation(bbox=None), "its 'bbox' null"),
    ],
)
def test_what_is_no_coco_file_is_refused(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(InputError) as error:
        read_human_labels(path, ["fir", "ash"])
    assert words in str(error.value) and str(path) in str(error.value)


def test_missing_files_and_foreign_classes_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_human_labels(tmp_path / "no.json", ["fir"])
    with pytest.raises(InputError, match=r"none of the teacher's classes: ash, fir, house there, oak in"):
        read_human_labels(write(tmp_path, CONTENT), ["oak"])
