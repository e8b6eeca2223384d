import json
import tarfile
from urllib.parse import quote

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from selftrain_d2 import InputError, load_pseudo_labels
from selftrain_d2.cli import main
from selftrain_d2.data.datasets import register_human_labels, register_pseudo_labels, unregister
from selftrain_d2.data.pseudo_labels.exchange import export_coco, import_coco
from selftrain_d2.data.pseudo_labels.reader import verify_pseudo_labels
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.data.training_sets import check_classes

CLASSES = ["tree", "car", "dog"]
HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep").mkdir()
    for name in ("a.png", "deep/b.png", "c.png"):
        cv2.imwrite(str(folder / name), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    return folder


def _mask(box):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    left, top, right, bottom = (int(v) for v in box)
    mask[top : bottom + 1, left : right + 1] = 1
    return mask_util.encode(mask)["counts"].decode()


def _write(folder, photos, boxes, masks=False):
    """``boxes``: for each image a list of (box, score, class)."""
    identity = {"thing_classes": CLASSES, "score_floor": 0.05, "image_root": str(photos)}
    names = ["a.png", "deep/b.png", "broken.png", "c.png"]
    with PseudoLabelWriter(folder, identity, names) as writer:
        rows = [
            make_row(
                name,
                HEIGHT,
                WIDTH,
                np.array([b for b, _, _ in image]).reshape(-1, 4),
                [s for _, s, _ in image],
                [c for _, _, c in image],
                [_mask(b) for b, _, _ in image] if masks else None,
            )
            for name, image in zip([names[0], names[1], names[3]], boxes)
        ]
        rows.insert(2, make_row("broken.png", skipped="OSError: broken"))
        writer.write_shard(0, rows)
        writer.finish(teacher_weights_sha256="f" * 64)


BOXES = [
    [([1.5, 2.25, 20.3, 30.1], 0.7, 0), ([0.1, 0.2, 0.3, 40.7], 0.05, 2)],
    [],
    [([10.0, 11.0, 63.9, 47.9], 1.0, 1)],
]
SIDE = st.floats(0, 1, width=32)
BOX = st.tuples(SIDE, SIDE, SIDE, SIDE).map(
    lambda s: np.array(
        [
            min(s[0], s[2]) * WIDTH,
            min(s[1], s[3]) * HEIGHT,
            max(s[0], s[2]) * WIDTH,
            max(s[1], s[3]) * HEIGHT,
        ],
        np.float32,
    )
)
BOX = BOX.filter(lambda b: b[2] > b[0] and b[3] > b[1])
LABELS = st.lists(
    st.lists(st.tuples(BOX, st.floats(0.0625, 1, width=32), st.integers(0, 2)), max_size=3),
    min_size=3,
    max_size=3,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(boxes=LABELS, masks=st.booleans())
def test_exported_and_imported_it_is_the_same(tmp_path_factory, photos, boxes, masks):
    folder = tmp_path_factory.mktemp("exchange")
    _write(folder / "labels", photos, boxes, masks)
    export_coco(folder / "labels", folder / "coco.json", 0.05)
    import_coco(folder / "coco.json", photos, folder / "back")
    assert load_pseudo_labels(folder / "back", 0.0) == load_pseudo_labels(folder / "labels", 0.05)


def test_what_other_tools_read(tmp_path, photos):
    """Plain COCO, as pycocotools has it."""
    _write(tmp_path / "labels", photos, BOXES, masks=True)
    assert export_coco(tmp_path / "labels", tmp_path / "coco.json", 0.05) == {"images": 3, "annotations": 3}
    coco = COCO(str(tmp_path / "coco.json"))
    assert {c["id"]: c["name"] for c in coco.dataset["categories"]} == {1: "tree", 2: "car", 3: "dog"}
    assert [i["file_name"] for i in coco.dataset["images"]] == ["a.png", "deep/b.png", "c.png"]
    assert {(i["height"], i["width"]) for i in coco.dataset["images"]} == {(HEIGHT, WIDTH)}
    found = {}
    for annotation in coco.dataset["annotations"]:
        image = coco.loadImgs(annotation["image_id"])[0]["file_name"]
        found.setdefault(image, []).append(annotation)
    for name, image in zip(["a.png", "deep/b.png", "c.png"], BOXES):
        for annotation, (box, score, category) in zip(found.get(name, []), image):
            x, y, w, h = annotation["bbox"]
            np.testing.assert_allclose([x, y, x + w, y + h], box, rtol=1e-6)
            assert annotation["area"] == pytest.approx((box[2] - box[0]) * (box[3] - box[1]))
            assert annotation["score"] == score  # 0.7, not 0.699999988079071
            assert coco.loadCats(annotation["category_id"])[0]["name"] == CLASSES[category]
            np.testing.assert_array_equal(
                coco.annToMask(annotation), mask_util.decode({"size": [HEIGHT, WIDTH], "counts": _mask(box)})
            )
    assert len(coco.dataset["annotations"]) == sum(map(len, BOXES))
    assert coco.dataset["info"]["image_root"] == str(photos)


@pytest.mark.parametrize("masks", [False, True])
def test_what_cvat_and_datumaro_refuse_to_miss(tmp_path, photos, masks):
    """``licenses`` in the file, ``segmentation`` in each annotation."""
    _write(tmp_path / "labels", photos, BOXES, masks)
    export_coco(tmp_path / "labels", tmp_path / "coco.json", 0.05)
    content = json.loads((tmp_path / "coco.json").read_text())
    assert content["licenses"] == [] and len(content["annotations"]) == 3
    for annotation in content["annotations"]:
        assert annotation["segmentation"] == [] or masks


def test_labels_of_an_archive_come_back(tmp_path, photos):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, "")
    root = f"tar://{tmp_path}"
    identity = {"thing_classes": CLASSES, "score_floor": 0.05, "image_root": root}
    with PseudoLabelWriter(tmp_path / "labels", identity, ["photos.tar/deep/b.png"]) as writer:
        writer.write_shard(
            0, [make_row("photos.tar/deep/b.png", HEIGHT, WIDTH, [[1, 2, 30, 40]], [0.75], [1])]
        )
        writer.finish()
    json_file = tmp_path / "labels.json"
    export_coco(tmp_path / "labels", json_file)
    import_coco(json_file, root, tmp_path / "again")
    assert load_pseudo_labels(tmp_path / "again") == load_pseudo_labels(tmp_path / "labels")
    content = json.loads(json_file.read_text())
    content["images"][0]["file_name"] = "photos.tar/lost.png"
    json_file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"photos\.tar/lost\.png"):
        import_coco(json_file, root, tmp_path / "third")


def test_as_human_labels(tmp_path, photos):
    """detectron2 reads the same boxes from the file."""
    _write(tmp_path / "labels", photos, BOXES)
    export_coco(tmp_path / "labels", tmp_path / "coco.json", 0.5)
    register_human_labels("exported", tmp_path / "coco.json", photos)
    human, pseudo = DatasetCatalog.get("exported"), load_pseudo_labels(tmp_path / "labels", 0.5)
    assert MetadataCatalog.get("exported").thing_classes == CLASSES
    unregister("exported")
    assert [d["file_name"] for d in human] == [d["file_name"] for d in pseudo]
    for one, other in zip(human, pseudo):
        assert [a["category_id"] for a in one["annotations"]] == [
            a["category_id"] for a in other["annotations"]
        ]
        for a, b in zip(one["annotations"], other["annotations"]):
            box = BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            np.testing.assert_allclose(box, b["bbox"], rtol=1e-6)


def test_selections_and_no_boxes(tmp_path, photos):
    _write(tmp_path / "labels", photos, BOXES)
    file = tmp_path / "coco.json"
    assert export_coco(tmp_path / "labels", file, {"tree": 0.5, "car": 1.0, "dog": 0.05})["annotations"] == 3
    assert export_coco(tmp_path / "labels", file, 0.05, top_k=1)["annotations"] == 2
    assert export_coco(tmp_path / "labels", file, boxes_per_image=1 / 3)["annotations"] == 1
    _write(tmp_path / "empty", photos, [[], [], []])
    assert export_coco(tmp_path / "empty", file)["annotations"] == 0
    assert json.loads(file.read_text())["annotations"] == []
    import_coco(file, photos, tmp_path / "back")
    assert len(load_pseudo_labels(tmp_path / "back")) == 3


@pytest.fixture
def corrected(tmp_path, photos):
    """``make(change)``: an exported file after ``change(content)``."""

    def make(change):
        _write(tmp_path / "labels", photos, BOXES)
        export_coco(tmp_path / "labels", tmp_path / "exported.json", 0.05)
        content = json.loads((tmp_path / "exported.json").read_text())
        change(content)
        (tmp_path / "corrected.json").write_text(json.dumps(content))
        return tmp_path / "corrected.json"

    return make


def test_what_people_correct_comes_back(tmp_path, photos, corrected):
    def change(content):
        content["annotations"][0]["bbox"] = [2, 3, 10, 20]  # moved
        del content["annotations"][1]  # a false one
        content["annotations"].append(  # drawn, with no score
            {"id": 9, "image_id": 2, "category_id": 3, "bbox": [5, 5, 6, 6], "iscrowd": 0}
        )

    manifest = import_coco(corrected(change), photos, tmp_path / "back")
    assert (manifest["labeled"], manifest["empty"], manifest["boxes"]) == (3, 0, 3)
    verify_pseudo_labels(tmp_path / "back")
    rows = [
        [(a["bbox"], round(a["score"], 4), a["category_id"]) for a in d["annotations"]]
        for d in load_pseudo_labels(tmp_path / "back")
    ]
    assert rows[0] == [([2, 3, 12, 23], 0.7, 0)]
    assert rows[1] == [([5, 5, 11, 11], 1.0, 2)]
    assert len(rows[2]) == 1

    # Called again, nothing is done; another file is refused, with both hashes.
    before = (tmp_path / "back" / "manifest.json").stat().st_mtime_ns
    import_coco(tmp_path / "corrected.json", photos, tmp_path / "back")
    assert (tmp_path / "back" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"imported_json_sha256: [0-9a-f]{64} there, [0-9a-f]{64} now"):
        import_coco(tmp_path / "exported.json", photos, tmp_path / "back")


def test_objects_marked_as_crowd_stay(tmp_path, photos, capsys):
    """CVAT and datumaro mark every RLE mask so."""
    _write(tmp_path / "labels", photos, BOXES, masks=True)
    export_coco(tmp_path / "labels", tmp_path / "coco.json", 0.05)
    content = json.loads((tmp_path / "coco.json").read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    (tmp_path / "coco.json").write_text(json.dumps(content))
    command = [
        "import",
        str(tmp_path / "coco.json"),
        "--images",
        str(photos),
        "--output",
        str(tmp_path / "back"),
    ]
    assert main(command) == 0
    assert load_pseudo_labels(tmp_path / "back", 0.0) == load_pseudo_labels(tmp_path / "labels", 0.05)
    assert (
        "3 boxes, 0 of them without a score, which get 1, 3 of them with iscrowd 1" in capsys.readouterr().out
    )


def test_boxes_without_a_score_are_counted(tmp_path, photos, corrected, capsys):
    def change(content):
        del content["annotations"][0]["score"]
        content["annotations"][2]["score"] = None

    command = ["import", str(corrected(change)), "--images", str(photos), "--output", str(tmp_path / "back")]
    assert main(command) == 0
    assert "3 images, 3 boxes, 2 of them without a score, which get 1." in capsys.readouterr().out


@pytest.mark.parametrize("host", ["", "http://localhost:8080"])
@pytest.mark.parametrize("above", [0, 1, 2])
def test_names_that_label_studio_gave(tmp_path, corrected, host, above):
    """Quoted, and relative to its document root: the image folder or one that it lies in."""
    root = tmp_path / "photos of 2024"
    (root / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png", "c.png"):
        (root / name).touch()

    def change(content):
        document_root = [root, *root.parents][above]
        for image in content["images"]:
            path = (root / image["file_name"]).relative_to(document_root)
            image["file_name"] = f"{host}/data/local-files/?d={quote(path.as_posix())}"

    import_coco(corrected(change), root, tmp_path / "back")
    names = [d["image_id"] for d in load_pseudo_labels(tmp_path / "back", 0.0)]
    assert names == ["a.png", "deep/b.png", "c.png"]


def test_a_name_of_label_studio_without_an_image(tmp_path, photos, corrected):
    def change(content):
        content["images"][1]["file_name"] = "/data/local-files/?d=elsewhere/b.png"

    with pytest.raises(InputError, match=r"names 1 images that are not in .*, e\.g\. elsewhere/b\.png"):
        import_coco(corrected(change), photos, tmp_path / "back")


def test_sizes_that_label_studio_left_out(tmp_path, photos, corrected):
    """It takes them from boxes, so an image without boxes has none."""

    def change(content):
        content["images"][1].update(height=None, width=None)
        del content["images"][2]["height"]

    import_coco(corrected(change), photos, tmp_path / "back")
    sizes = [(d["height"], d["width"]) for d in load_pseudo_labels(tmp_path / "back", 0.0)]
    assert sizes == [(HEIGHT, WIDTH)] * 3
    (tmp_path / "broken").mkdir()
    for name in ("a.png", "deep/b.png", "c.png"):
        (tmp_path / "broken" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "broken" / name).touch()
    with pytest.raises(InputError, match=r"b\.png has no size in the COCO JSON and cannot be read"):
        import_coco(tmp_path / "corrected.json", tmp_path / "broken", tmp_path / "other")


def test_classes_in_the_order_of_another_tool(tmp_path, photos, corrected):
    """FiftyOne and Label Studio sort them: the message names the argument that sets their order."""

    def change(content):
        content["categories"] = [
            {"id": number, "name": name} for number, name in enumerate(sorted(CLASSES), start=1)
        ]

    file = corrected(change)
    import_coco(file, photos, tmp_path / "back")
    register_human_labels("people", tmp_path / "exported.json", photos)
    register_pseudo_labels("sorted", tmp_path / "back")
    with pytest.raises(InputError, match=r"in the same order, which `selftrain-d2 import --classes NAME"):
        check_classes("people", ["sorted"], "pseudo-labeled")
    import_coco(file, photos, tmp_path / "again", thing_classes=CLASSES)
    register_pseudo_labels("in order", tmp_path / "again")
    check_classes("people", ["in order"], "pseudo-labeled")


def test_categories_are_told_by_name(tmp_path, photos, corrected):
    """A tool numbered them anew, by the alphabet, and left out what has no box."""

    def change(content):
        content["categories"] = [
            {"id": 1, "name": "car"},
            {"id": 2, "name": "dog"},
            {"id": 3, "name": "tree"},
        ]
        for annotation in content["annotations"]:
            annotation["category_id"] = {1: 3, 2: 1, 3: 2}[annotation["category_id"]]

    file = corrected(change)
    import_coco(file, photos, tmp_path / "back", thing_classes=CLASSES)
    assert load_pseudo_labels(tmp_path / "back", 0.05) == load_pseudo_labels(tmp_path / "labels", 0.05)
    assert import_coco(file, photos, tmp_path / "own")["thing_classes"] == ["car", "dog", "tree"]
    with pytest.raises(InputError, match="category 'dog', which is not among"):
        import_coco(file, photos, tmp_path / "other", thing_classes=["car", "tree"])
    with pytest.raises(InputError, match="--classes names tree twice"):
        import_coco(file, photos, tmp_path / "other", thing_classes=["tree", *CLASSES, "tree"])


def test_polygons_and_plain_run_lengths(tmp_path, photos, corrected):
    counts = [0, 10, HEIGHT * WIDTH - 10]

    def change(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = [[10, 10, 20, 10, 20, 30, 10, 30]]
        content["annotations"][1]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}

    import_coco(corrected(change), photos, tmp_path / "back")
    first, second = load_pseudo_labels(tmp_path / "back", 0.0)[0]["annotations"]
    mask = mask_util.decode(first["segmentation"])
    assert mask.shape == (HEIGHT, WIDTH) and mask[15:25, 12:18].all() and mask.sum() == 200
    assert mask_util.decode(second["segmentation"]).sum() == 10


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": 1.5}, "annotation 1, image 1: the score 1.5"),
        ({"score": "high"}, "the score 'high'"),
        ({"segmentation": [[1, 1, 5, 5, 1, 5]]}, "masks for 1 of its 3 boxes"),
        ({"bbox": [1, 1, 0, 5]}, "has no area"),
        ({"category_id": 7}, "'category_id' is 7, but no category has that id"),
    ],
)
def test_corrections_that_cannot_be(tmp_path, photos, corrected, change, message):
    file = corrected(lambda content: content["annotations"][0].update(change))
    with pytest.raises(InputError, match=message):
        import_coco(file, photos, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ({"size": [10, 10], "counts": [0, 10, 90]}, "segmentation cannot be read"),
        ("polygon", "segmentation cannot be read"),
    ],
)
def test_masks_that_cannot_be(tmp_path, photos, corrected, segmentation, message):
    def change(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = segmentation

    with pytest.raises(InputError, match=message):
        import_coco(corrected(change), photos, tmp_path / "back")


def test_an_image_twice(tmp_path, photos, corrected):
    file = corrected(lambda content: content["images"].append({**content["images"][0], "id": 99}))
    with pytest.raises(InputError, match="two images of the same file_name"):
        import_coco(file, photos, tmp_path / "back")


def test_commands(tmp_path, photos, capsys):
    _write(tmp_path / "labels", photos, BOXES)
    labels, file, back = (str(tmp_path / name) for name in ("labels", "coco.json", "back"))
    assert main(["export", labels, file, "--score-thresh", "0.05", "--class-thresh", "dog", "0.3"]) == 0
    assert "3 images, 2 boxes" in capsys.readouterr().out
    assert main(["import", file, "--images", str(photos), "--output", back, "--classes", *CLASSES]) == 0
    assert "2 images with 2 boxes, 1 without" in capsys.readouterr().out
    assert load_pseudo_labels(back, 0.5) == load_pseudo_labels(labels, 0.5)
    assert main(["export", labels, file, "--class-thresh", "bus", "0.3"]) == 2
    assert "no class 'bus'" in capsys.readouterr().err
    assert main(["export", labels, file, "--class-thresh", "dog", "much"]) == 2
    assert "'much' is no number" in capsys.readouterr().err
