"""What COCO files may look like: repaired, left out with a count, or refused with one sentence."""

import copy
import json
import logging
import re

import pytest
from conftest import SMALL_MODEL, assert_refused, make_coco_set
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from selftrain_d2 import InputError, SelfTrainingDatasetMapper
from selftrain_d2.cli import main
from selftrain_d2.data.coco_file import dataset_dicts, read_coco
from selftrain_d2.data.datasets import register_human_labels
from selftrain_d2.data.image_sources import images_of_coco_json
from selftrain_d2.data.pseudo_labels.exchange import import_coco
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.splits import make_splits
from selftrain_d2.data.training_sets import get_human_dicts
from selftrain_d2.inspection.human_labels import read_human_labels

CONFIG = "Base-RetinaNet-EfficientNet-FPN.yaml"
TRIANGLE = [1, 1, 9, 1, 5, 8]
SOUND = {
    "images": [
        {"id": 9, "file_name": "b.png", "height": 20, "width": 30},
        {"id": 4, "file_name": "a/c.png", "height": 10, "width": 10},
    ],
    "categories": [{"id": 7, "name": "fir"}, {"id": 3, "name": "ash"}],
    "annotations": [
        {"id": 5, "image_id": 9, "category_id": 7, "bbox": [1, 1, 8, 7], "area": 56, "iscrowd": 0,
         "segmentation": [TRIANGLE, [2, 2, 4, 2, 4, 4, 2, 4]]},
        {"id": 6, "image_id": 9, "category_id": 3, "bbox": [0, 0, 30, 20], "area": 60, "iscrowd": 1,
         "segmentation": {"size": [20, 30], "counts": [0, 60, 540]}},
        {"id": 8, "image_id": 4, "category_id": 3, "bbox": [2.5, 2, 4, 4], "area": 16, "iscrowd": 0,
         "segmentation": [TRIANGLE]},
    ],
}  # fmt: skip


def changed(change):
    content = copy.deepcopy(SOUND)
    change(content)
    return content


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def each(key, value=None):
    """A change of all annotations: the key's value, or without it."""

    def change(content):
        for annotation in content["annotations"]:
            annotation.pop(key, None) if value is None else annotation.update({key: value})

    return change


def first(**values):
    return lambda content: content["annotations"][0].update(values)


def test_a_sound_file_is_read_as_detectron2_reads_it(tmp_path, caplog):
    content = changed(lambda c: None)
    for annotation in content["annotations"]:
        annotation.update(keypoints=[3, 4, 2, 0, 0, 0], num_keypoints=1)
    for category in content["categories"]:
        category["keypoints"] = ["left_eye", "right_eye"]
    path = write(tmp_path / "sound.json", content)
    file = read_coco(path)
    assert file.content == content and file.objects == 2 and not caplog.records
    ours, theirs = dataset_dicts(file, "photos"), load_coco_json(path, "photos", "read by detectron2")
    assert [d["image_id"] for d in ours] == [4, 9]
    assert ours == theirs
    # ... and so it is with repaired keys, but for the keys that detectron2 does not take over
    del content["annotations"][0]["id"], content["annotations"][2]["area"]
    assert dataset_dicts(read_coco(write(tmp_path / "repaired.json", content)), "photos") == theirs


@pytest.mark.parametrize(
    ("change", "words", "repaired"),
    [
        (each("id"), "numbered all annotations anew (3 without", {"id": [1, 2, 3]}),
        (first(id=8), "numbered all annotations anew (1 without", {"id": [1, 2, 3]}),
        (first(id="a"), "numbered all annotations anew (1 without", {"id": [1, 2, 3]}),
        (each("area"), "set 3 missing 'area'", {"area": [56, 600, 16]}),
        (first(area=-1), "set 1 missing 'area'", {"area": [56, 60, 16]}),
        (first(area=float("nan")), "set 1 missing 'area'", {"area": [56, 60, 16]}),
        (each("iscrowd"), "set 3 missing 'iscrowd' to 0", {"iscrowd": [0, 0, 0]}),
        (first(segmentation=TRIANGLE), "put 1 'segmentation' of bare numbers", {0: [TRIANGLE]}),
        (first(segmentation=[[1, 2], TRIANGLE, [[]]]), "fewer than three points of 1 annotations", {0: [TRIANGLE]}),
    ],
)  # fmt: skip
def test_what_takes_no_guess_is_repaired_and_counted(tmp_path, caplog, change, words, repaired):
    path = write(tmp_path / "labels.json", changed(change))
    annotations = read_coco(path).annotations
    for key, values in repaired.items():
        if key == 0:
            assert annotations[0]["segmentation"] == values
        else:
            assert [annotation[key] for annotation in annotations] == values
    (line,) = caplog.messages
    assert line.startswith(f"{path}: ") and words in line
    read_coco(path)  # as another stage does
    assert len(caplog.messages) == 1


def test_ids_of_the_user_stay_in_a_sound_file(tmp_path):
    path = write(tmp_path / "labels.json", changed(first(id=0)))
    assert [a["id"] for a in read_coco(path).annotations] == [0, 6, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first(image_id=None), "annotations[0] (id 5, image_id null): its 'image_id' is null"),
        (first(category_id=True), "its 'category_id' is true, but no category has that id"),
        (first(bbox=[]), "annotations[0] (id 5, image_id 9): its 'bbox' [] (x, y, width, height)"),
        (first(bbox=["1", 2, 3, 4]), "its 'bbox' [\"1\", 2, 3, 4]"),
        (first(bbox=[1, 2, float("inf"), 4]), "[1, 2, Infinity, 4] (x, y, width, height) is not four finite numbers"),
        (first(iscrowd="0"), "its 'iscrowd' is \"0\": it must be 0 or 1"),
        (first(ignore=1), "its 'ignore' is 1: say 'iscrowd': 1"),
        (lambda c: c["annotations"].insert(1, [1]), "annotations[1]: it is [1], no object"),
        (lambda c: c.update(annotations={"a": 1}), "its 'annotations' are {\"a\": 1}, no list"),
        (lambda c: c["images"][1].update(file_name="./b.png"), "two images of the same file_name: 'b.png'"),
        (lambda c: c["images"][1].update(id="4"), "images whose 'id' is a number and others where it is a text"),
        (lambda c: c["images"][1].pop("width"), "images[1]: its 'width' is null: it must be a number of pixels"),
        (lambda c: c["images"][1].update(height=9.5), "images[1]: its 'height' is 9.5"),
        (lambda c: c["categories"][1].update(id="3"), "categories[1]: its 'id' is \"3\": it must be a whole number"),
        (lambda c: c["categories"][1].pop("name"), "categories[1]: its 'name' is null: it must be a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(tmp_path, change, message):
    path = write(tmp_path / "labels.json", changed(change))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_coco(path)
    assert path in str(error.value) and "\n" not in str(error.value)


BROKEN_MASKS = {
    "two points": [[1, 1, 9, 1]],
    "nothing": [[]],
    "flat, too short": [1, 1, 9, 1],
    "not a number": [[1, 1, 9, 1, 5, "8"]],
    "odd": [[1, 1, 9, 1, 5, 8, 4]],
    "another size": {"size": [10, 10], "counts": [100]},
    "another sum": {"size": [20, 30], "counts": [0, 5]},
    "no counts": {"size": [20, 30]},
    "a word": "polygon",
}


@pytest.mark.parametrize("broken", BROKEN_MASKS)
def test_a_broken_mask_costs_the_box_only_where_masks_are_learned(tmp_path, caplog, broken):
    path = write(tmp_path / "labels.json", changed(first(segmentation=BROKEN_MASKS[broken])))
    _, dicts = dataset_dicts(read_coco(path), "photos")
    assert [a["bbox"] for a in dicts["annotations"]] == [[1, 1, 8, 7], [0, 0, 30, 20]]
    assert "segmentation" not in dicts["annotations"][0]
    assert "left out 1 'segmentation' that cannot be read; the boxes stay, e.g. annotations[0]" in caplog.text
    file = read_coco(path, masks=True)
    assert [a["id"] for a in file.annotations] == [6, 8] and file.objects == 1
    assert "left out 1 annotations, since masks are learned" in caplog.text


def test_objects_without_any_mask_are_refused_where_masks_are_learned(tmp_path):
    for value in (None, []):
        path = write(tmp_path / "labels.json", changed(first(segmentation=value)))
        assert read_coco(path).objects == 2
        with pytest.raises(
            InputError, match=r"1 of 3 annotations have no 'segmentation', e\.g\. annotations\[0\]"
        ):
            read_coco(path, masks=True)


# ---- In training ----------------------------------------------------------------------------------


def rewrite(coco_set, change):
    content = copy.deepcopy(coco_set.content)
    change(content)
    with open(coco_set.json_file, "w") as file:
        json.dump(content, file)
    return content


REGISTER = {
    "ours": register_human_labels,
    "detectron2's": lambda name, json_file, images: register_coco_instances(name, {}, json_file, images),
}


@pytest.mark.parametrize("whose", REGISTER)
def test_every_box_is_trained_on_whatever_its_polygon(coco_set, small_config, whose):
    def change(content):
        for i, annotation in enumerate(content["annotations"]):
            annotation["segmentation"] = ([1, 1, 9, 1, 5, 8], [[1, 1, 9, 1]], [[]])[i % 3]
            for key in ("id", "area", "iscrowd"):
                del annotation[key]

    boxes = len(rewrite(coco_set, change)["annotations"])
    REGISTER[whose]("human", coco_set.json_file, coco_set.images)
    small_config.DATASETS.TRAIN = ("human",)
    dicts = get_human_dicts(small_config)
    assert sum(len(d["annotations"]) for d in dicts) == boxes
    assert MetadataCatalog.get("human").thing_classes == ["red", "green"]
    mapped = SelfTrainingDatasetMapper(small_config, is_train=False)
    mapped.is_train = True  # test augmentation keeps every box
    assert sum(len(mapped(d)["instances"]) for d in dicts) == boxes


def test_masks_are_asked_for_before_training(coco_set, small_config):
    rewrite(coco_set, each("segmentation", [[1, 1, 9, 1, 5, 8]]))
    register_human_labels("human", coco_set.json_file, coco_set.images)
    small_config.DATASETS.TRAIN, small_config.MODEL.MASK_ON = ("human",), True
    assert all("segmentation" in a for d in get_human_dicts(small_config) for a in d["annotations"])
    rewrite(coco_set, each("segmentation", {"size": [96, 96], "counts": [0, 96 * 96]}))
    with pytest.raises(InputError, match=r"run lengths, which INPUT\.MASK_FORMAT 'polygon' does not take"):
        get_human_dicts(small_config)
    rewrite(coco_set, each("segmentation", [[1, 1, 9, 1]]))
    with pytest.raises(InputError, match="no object to learn from: of the 0 annotations"):
        get_human_dicts(small_config)


def test_keypoints_are_named_by_the_json(coco_set, small_config):
    def change(content):
        for category in content["categories"]:
            category["keypoints"] = ["nose", "left_eye", "right_eye"]
        for annotation in content["annotations"]:
            annotation["keypoints"] = [5, 5, 2, 6, 6, 1, 0, 0, 0]
        del content["annotations"][0]["keypoints"]
        content["annotations"][1]["keypoints"] = [1, 2]

    rewrite(coco_set, change)
    cfg = small_config
    cfg.MODEL.KEYPOINT_ON, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = True, ("human",), ("human",)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    register_coco_instances("human", {}, coco_set.json_file, coco_set.images)
    points = [a["keypoints"] for d in get_human_dicts(cfg) for a in d["annotations"]]
    assert sorted(map(sum, points))[:3] == [3, 3, 25 + 3]  # half a pixel six times
    assert SelfTrainingDatasetMapper(cfg, is_train=True).keypoint_hflip_indices == [0, 2, 1]
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 17
    with pytest.raises(InputError, match=r"NUM_KEYPOINTS is 17, but 'human' has 3"):
        get_human_dicts(cfg)
    rewrite(coco_set, lambda content: None)
    register_coco_instances("nameless", {}, coco_set.json_file, coco_set.images)
    cfg.DATASETS.TRAIN = ("nameless",)
    with pytest.raises(InputError, match="needs the names of the keypoints"):
        get_human_dicts(cfg)


@pytest.mark.parametrize("keypoints", [[1, "2", 3], [1, 2], {"nose": 1}, [1, float("nan"), 2]])
def test_broken_keypoints_do_not_cost_the_box(tmp_path, caplog, keypoints):
    """... of a detector of boxes, whose file may well name no keypoint."""
    path = write(tmp_path / "labels.json", changed(first(keypoints=keypoints)))
    _, dicts = dataset_dicts(read_coco(path), "photos")
    assert len(dicts["annotations"]) == 2 and "keypoints" not in dicts["annotations"][0]
    assert "took the 'keypoints' of 1 annotations" in caplog.text


@pytest.mark.parametrize(
    "change", [each("iscrowd", 1), lambda c: c.update(annotations=[]), each("bbox", [1, 1, 0, 5])]
)
@pytest.mark.parametrize("filter_empty", ["True", "False"])
def test_nothing_to_learn_is_told_before_training(coco_set, tmp_path, capsys, change, filter_empty):
    rewrite(coco_set, change)
    output = tmp_path / "output"
    train = ["train", "--config-file", CONFIG, "--human-labels", "human", coco_set.json_file, coco_set.images]
    keys = [*SMALL_MODEL, "DATASETS.TRAIN", "('human',)", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", filter_empty]
    keys += ["OUTPUT_DIR", str(output)]
    for words in ([*train, "--dry-run", *keys], [*train, *keys]):
        assert main(words) == 2
        assert "no object to learn from" in capsys.readouterr().err
    assert not list(output.glob("*.pth"))


def test_nothing_to_learn_is_told_before_the_loop(coco_set, tmp_path, capsys):
    rewrite(coco_set, each("iscrowd", 1))
    words = ["self-train", "--config-file", CONFIG, "--labeled-json", coco_set.json_file, "--output"]
    words += [
        str(tmp_path / "out"),
        "--labeled-images",
        coco_set.images,
        "--unlabeled-images",
        coco_set.images,
    ]
    number = len(coco_set.content["annotations"])
    assert_refused(
        [*words, *SMALL_MODEL],
        capsys,
        f"of the {number} annotations that can be used {number} are crowd",
        output=tmp_path / "out",
    )


def test_metadata_that_says_otherwise(coco_set, small_config):
    register_coco_instances("human", {"thing_classes": ["green", "red"]}, coco_set.json_file, coco_set.images)
    small_config.DATASETS.TRAIN = ("human",)
    with pytest.raises(InputError, match="other thing_classes than the metadata of 'human'"):
        get_human_dicts(small_config)


# ---- Everywhere else ------------------------------------------------------------------------------


def test_splits_inspection_and_import_repair_alike(tmp_path, caplog):
    labels = make_coco_set(tmp_path / "set", 4, seed=3)
    boxes = len(labels.content["annotations"])

    def change(content):
        for annotation in content["annotations"]:
            for key in ("id", "area", "iscrowd"):
                del annotation[key]

    rewrite(labels, change)
    make_splits(labels.json_file, tmp_path / "splits", [50, 100])
    parts = [json.loads((tmp_path / "splits" / f"labeled_{f}.json").read_text()) for f in (50, 100)]
    assert len(parts[1]["annotations"]) == boxes
    assert {a["id"] for a in parts[0]["annotations"]} < {a["id"] for a in parts[1]["annotations"]}
    caplog.clear()
    assert all(read_coco(tmp_path / "splits" / f"labeled_{f}.json").objects for f in (50, 100))
    assert not caplog.records  # what was written needs no repair
    found = read_human_labels(labels.json_file, ["red", "green"])
    assert sum(len(d["annotations"]) for d in found.dicts) == boxes
    assert import_coco(labels.json_file, labels.images, tmp_path / "imported")["boxes"] == boxes
    assert len(load_pseudo_labels(tmp_path / "imported", 0.5)) == 4


def test_splits_are_planned_with_the_checks_of_the_real_run(tmp_path, capsys):
    path = write(tmp_path / "labels.json", changed(first(bbox=[0, 0, 99, 5])))
    for option in ([], ["--dry-run"]):
        assert main(["splits", path, "--output", str(tmp_path / "out"), "--fractions", "50", *option]) == 2
        assert "annotations[0] (id 5, image_id 9): its 'bbox' [0, 0, 99, 5]" in capsys.readouterr().err
    path = write(tmp_path / "sound.json", SOUND)
    assert main(["splits", path, "--output", str(tmp_path / "out"), "--dry-run", "--fractions", "1"]) == 2
    assert "1 % of the 2 images" in capsys.readouterr().err


def test_images_to_label_need_no_sound_annotations(tmp_path):
    labels = make_coco_set(tmp_path / "set", 2, seed=3)
    rewrite(labels, lambda c: (c.pop("categories"), c["annotations"].append({}), c["images"][0].pop("width")))
    assert images_of_coco_json(labels.json_file, labels.images).file_names == ["001.png", "002.png"]


def test_the_catalog_is_left_as_it_was(coco_set, small_config):
    register_coco_instances("theirs", {}, coco_set.json_file, coco_set.images)
    before = DatasetCatalog["theirs"]
    small_config.DATASETS.TRAIN = ("theirs",)
    get_human_dicts(small_config)
    assert DatasetCatalog["theirs"] is before


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.WARNING, "selftrain_d2.data.coco_file")
