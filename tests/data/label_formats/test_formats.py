"""Formats there and back, against hand-worked numbers and supervision; and files with faults."""

import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selftrain_d2 import InputError
from selftrain_d2.cli import main
from selftrain_d2.data.label_formats.convert import write_labels
from selftrain_d2.data.label_formats.detect import read_labels

HEIGHT, WIDTH = 48, 64
BOMB = (
    '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]>\n<annotation><filename>&c;</filename></annotation>'
)
XML = """<annotation>
<filename>a.png</filename>
<size><width>64</width><height>48</height></size>
<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object>
<object><name>dog</name><difficult>1</difficult>
<bndbox><xmin>3</xmin><ymin>5</ymin><xmax>3</xmax><ymax>6</ymax></bndbox>
<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part></object>
</annotation>"""


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((HEIGHT, WIDTH, 3), np.uint8))


def boxes(labels):
    return [(a["category_id"], a["bbox"], a.get("score"), a["iscrowd"]) for a in labels.file.annotations]


@pytest.fixture
def yolo(tmp_path):
    """A data set as Ultralytics lays it out: a box, a polygon with a score; nothing in b; c is not labeled."""
    for name in ("train/a.png", "train/b.png", "train/c.png", "val/d.png"):
        picture(tmp_path / "images" / name)
    for name, text in {
        "train/a": "\ufeff0 0.5 0.5 0.25 0.5\r\n1 0 0 0.5 0 0.5 0.5 0.75\r\n",
        "train/b": "",
        "val/d": "1 0.5 0.5 1 1 0.125",
    }.items():
        file = tmp_path / "labels" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    (tmp_path / "data.yaml").write_text(
        "path: .\ntrain: ../images/train\nval: images/val\nnames: {0: cat, 1: dog}\n"
    )
    return tmp_path


@pytest.fixture
def voc(tmp_path):
    picture(tmp_path / "JPEGImages/a.png")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations/a.xml").write_text(XML)
    return tmp_path


def test_yolo_by_hand(yolo):
    labels = read_labels(yolo)
    assert [i["file_name"] for i in labels.file.content["images"]] == ["a.png", "b.png"]
    assert boxes(labels) == [(1, [24, 12, 16, 24], None, 0), (2, [0, 0, 32, 24], 0.75, 0)]
    assert labels.file.annotations[1]["segmentation"] == [[0, 0, 32, 0, 32, 24]]
    assert labels.has_validation and labels.image_root == str(yolo / "images/train")
    assert boxes(read_labels(yolo / "data.yaml", split="val")) == [(2, [0, 0, 64, 48], 0.125, 0)]
    predicted = read_labels(yolo / "data.yaml", empty=True)
    assert len(predicted.file.content["images"]) == 3


def test_a_folder_of_texts_takes_its_names_from_classes_txt_or_the_command(yolo):
    folder = yolo / "labels/train"
    with pytest.raises(InputError, match="without names of classes"):
        read_labels(folder)
    assert boxes(read_labels(folder, classes=["cat", "dog"])) == boxes(read_labels(yolo))
    (folder / "classes.txt").write_text("cat\ndog\n")
    assert read_labels(folder, images=str(yolo / "images/train")).file.class_names == ["cat", "dog"]


def test_voc_counts_pixels_from_one_and_ignores_difficult_objects(voc):
    labels = read_labels(voc)
    assert boxes(labels) == [(1, [0, 0, 64, 48], None, 0), (2, [2, 4, 1, 2], None, 1)]
    assert labels.file.class_names == ["cat", "dog"] and labels.file.objects == 1


def test_voc_lists(voc):
    picture(voc / "JPEGImages/b.png")
    (voc / "Annotations/b.xml").write_text(XML.replace("a.png", "b.png"))
    (voc / "ImageSets/Main").mkdir(parents=True)
    for name, text in (("train", "b 1\n"), ("val", "a -1\n")):
        (voc / f"ImageSets/Main/{name}.txt").write_text(text)
    labels = read_labels(voc)
    assert [i["file_name"] for i in labels.file.content["images"]] == ["b.png"] and labels.has_validation
    for other in (read_labels(voc, split="val"), read_labels(voc / "ImageSets/Main/val.txt")):
        assert [i["file_name"] for i in other.file.content["images"]] == ["a.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.5", "line 2: it has 4 columns"),
        ("2 0.5 0.5 0.5 0.5", "line 2: the class 2 is none of the 2"),
        ("0 nan 0.5 0.5 0.5", "line 2: it has a number that is not finite"),
        ("0 0.5 0.5 0.5 x", "line 2: could not convert"),
        ("0 30 20 10 10", "line 2: positions must be fractions"),
        ("0 0.9 0.5 0.5 0.5", "line 2: the box lies 9.6 pixels outside"),
        ("0 0.5 0.5 -0.5 0.5", "line 2: the box has a negative size"),
        ("0 0.5 0.5 0.5 0.5 1.5", "line 2: the score 1.5"),
    ],
)
def test_faults_of_yolo_lines(yolo, line, message):
    (yolo / "labels/train/a.txt").write_text(f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(InputError, match=message):
        read_labels(yolo)


def test_faults_of_yolo_folders(yolo):
    picture(yolo / "images/train/a.jpg")
    with pytest.raises(InputError, match="differ in their ending alone"):
        read_labels(yolo)
    (yolo / "images/train/a.jpg").unlink()
    (yolo / "labels/train/z.txt").write_text("")
    with pytest.raises(InputError, match=r"1 files of labels have no image.*z\.txt"):
        read_labels(yolo)
    (yolo / "data.yaml").write_text("train: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(InputError, match="not valid YAML"):
        read_labels(yolo)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:150], r"a\.xml, line \d: not valid XML"),
        (lambda x: BOMB, r"a\.xml, line 1: it declares XML entities"),
        (lambda x: x.replace("a.png", "gone.png"), None),  # the name of the XML tells
        (lambda x: x.replace("<xmax>64", "<xmax>NaN"), r"a\.xml, line 4: 'NaN' is no finite number"),
        (lambda x: x.replace("<xmax>64", "<xmax>70"), "line 4: the box lies 6 pixels outside"),
        (lambda x: x.replace("<width>64", "<width>48"), r"a\.xml, line 3: it says that the width"),
        (lambda x: x.replace("<xmin>3</xmin>", ""), "line 5: the object has no <xmin>"),
        (lambda x: x.replace("annotation>", "html>"), "its root is <html>"),
    ],
)
def test_faults_of_voc(voc, change, message):
    (voc / "Annotations/a.xml").write_text(change(XML))
    if message is None:
        assert len(read_labels(voc).file.annotations) == 2
        return
    with pytest.raises(InputError, match=message):
        read_labels(voc)


def test_a_missing_image_of_voc(voc):
    (voc / "JPEGImages/a.png").rename(voc / "JPEGImages/other.png")
    with pytest.raises(InputError, match=r"a\.xml, line 2: its image a\.png is not in"):
        read_labels(voc)


@st.composite
def drawn(draw):
    """Boxes with two decimals inside the image, with scores."""
    found = []
    for _ in range(draw(st.integers(1, 5))):
        x, y = draw(st.integers(0, 6000)) / 100, draw(st.integers(0, 4400)) / 100
        w = draw(st.integers(100, int((WIDTH - x) * 100))) / 100
        h = draw(st.integers(100, int((HEIGHT - y) * 100))) / 100
        found.append(([x, y, w, h], draw(st.integers(1, 2)), draw(st.floats(0, 1, width=32))))
    return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("a.png", "deep/b.png"):
        picture(folder / name)
    return folder


def write_coco(file, found):
    images = [
        {"id": i, "file_name": n, "height": HEIGHT, "width": WIDTH}
        for i, n in ((1, "a.png"), (2, "deep/b.png"))
    ]
    annotations = [
        {"id": i, "image_id": 1, "category_id": c, "bbox": b, "score": s, "iscrowd": 0, "area": b[2] * b[3]}
        for i, (b, c, s) in enumerate(found, start=1)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


@settings(max_examples=25, deadline=None)
@given(found=drawn())
def test_coco_there_and_back(found, photos, tmp_path_factory):
    """Through YOLO boxes stay within 1e-3 pixels; through VOC within half a pixel, whole ones exactly."""
    folder = tmp_path_factory.mktemp("set")
    write_coco(folder / "labels.json", found)
    labels = read_labels(folder / "labels.json", images=str(photos))
    for to, tolerance in (("yolo", 1e-3), ("voc", 0.5 + 1e-9)):
        write_labels(labels, folder / to, to)
        back = read_labels(folder / to)
        assert len(back.file.content["images"]) == 2
        ids = {i["file_name"]: i["id"] for i in back.file.content["images"]}
        names = back.file.class_names
        assert len(back.file.annotations) == len(found) and set(
            a["image_id"] for a in back.file.annotations
        ) == {ids["a.png"]}
        for (box, category, score), read in zip(found, back.file.annotations):
            x, y, w, h = read["bbox"]
            corners = np.array([x, y, x + w, y + h])
            true = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]])
            assert np.abs(corners - true).max() <= tolerance
            assert names[read["category_id"] - 1] == ("cat", "dog")[category - 1]
            assert read["score"] == pytest.approx(score, abs=1e-8)


def test_supervision_reads_what_was_written(photos, tmp_path):
    supervision = pytest.importorskip("supervision")
    write_coco(tmp_path / "labels.json", [([3, 4, 20, 10], 2, 0.5), ([0, 0, 64, 48], 1, 1.0)])
    labels = read_labels(tmp_path / "labels.json", images=str(photos))
    write_labels(labels, tmp_path / "voc", "voc")
    seen = supervision.DetectionDataset.from_pascal_voc(
        str(tmp_path / "voc/JPEGImages"), str(tmp_path / "voc/Annotations")
    )
    (found,) = [d.xyxy for p, d in seen.annotations.items() if p.endswith("/a.png")]
    assert found.tolist() == [[3, 4, 23, 14], [0, 0, 64, 48]]
    write_labels(labels, tmp_path / "yolo", "yolo")
    folders = [str(tmp_path / "yolo" / name) for name in ("images", "labels", "data.yaml")]
    seen = supervision.DetectionDataset.from_yolo(*folders)
    (found,) = [d for p, d in seen.annotations.items() if p.endswith("/a.png")]
    assert found.xyxy == pytest.approx(np.array([[3, 4, 23, 14], [0, 0, 64, 48]]), abs=1e-4)
    assert [seen.classes[i] for i in found.class_id] == ["dog", "cat"]


def test_the_command_converts_and_says_what_it_left(yolo, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["labels", "convert", str(yolo), str(out / "labels.json")]) == 0
    said = capsys.readouterr().out
    assert "2 images, 2 boxes" in said and "--split val" in said and str(yolo / "images/train") in said
    first = (out / "labels.json").read_bytes()
    assert main(["labels", "convert", str(yolo), str(out / "labels.json")]) == 0
    assert (out / "labels.json").read_bytes() == first
    capsys.readouterr()
    words = [
        str(out / "labels.json"),
        str(out / "voc"),
        "--to",
        "voc",
        "--images",
        str(yolo / "images/train"),
    ]
    assert main(["labels", "convert", *words]) == 0
    assert "2 images, 2 boxes, 1 masks left out" in capsys.readouterr().out
    assert main(["labels", "convert", *words]) == 2 and "is not empty" in capsys.readouterr().err
    assert main(["labels", "convert", str(yolo / "images"), str(out / "x.json")]) == 2
    assert (
        f"has no labels, but images alone; the labels are beside it: name {yolo}" in capsys.readouterr().err
    )
    (out / "nothing").mkdir()
    assert main(["labels", "convert", str(out / "nothing"), str(out / "x.json")]) == 2
    assert "no labels of a known format" in capsys.readouterr().err
