"""Labeled fractions: nested, without replacement, decided by seed and file names alone."""

import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from selftrain_d2.cli import main
from selftrain_d2.data.image_sources import images_of_coco_json, images_of_list
from selftrain_d2.data.splits import image_order, make_splits, parse_fractions, stratified_order
from selftrain_d2.errors import InputError

FRACTIONS = ["0.5", 1, 5, 10.0, 20, "50", 100]


def make_coco(number, seed=0, classes=4):
    """Images of zero to five objects of unequally frequent classes, some of them crowd regions."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for index in rng.permutation(number):
        images.append(
            {"id": 7 * int(index) + 3, "file_name": f"{index:05d}.jpg", "height": 9, "width": 9, "own": 1}
        )
        for category in np.minimum(rng.geometric(0.5, rng.integers(0, 6)), classes):
            annotations.append(
                {
                    "id": len(annotations) + 100,
                    "image_id": images[-1]["id"],
                    "category_id": 10 * int(category),
                    "bbox": [1, 2, 3, 4],
                    "area": 12,
                    "iscrowd": int(rng.random() < 0.1),
                    "segmentation": [[1, 2, 4, 2, 4, 6]],
                }
            )
    return {
        "info": {"year": 2020, "description": "Größe"},
        "licenses": [{"id": 1}],
        "categories": [
            {"id": 10 * c, "name": f"class {c}", "supercategory": "x"} for c in range(1, classes + 1)
        ],
        "images": images,
        "annotations": annotations,
        "own_key": {"kept": True},
    }


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.json"
    path.write_text(json.dumps(make_coco(230)))
    return path


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def names(coco):
    return [image["file_name"] for image in coco["images"]]


def contents(folder, but=()):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in but}


# ---- The order ------------------------------------------------------------------------------------

numbers, seeds = st.integers(1, 60), st.integers(-5, 2**40)


@settings(deadline=None)
@given(numbers, seeds, st.booleans(), st.randoms(use_true_random=False))
def test_the_order_has_every_image_once_and_ignores_ids_and_the_order_of_the_file(
    number, seed, stratified, shuffler: random.Random
):
    coco = make_coco(number)
    order = [image["file_name"] for image in image_order(coco, seed, stratified)]
    assert sorted(order) == sorted(names(coco))
    new_ids = dict(zip((i["id"] for i in coco["images"]), shuffler.sample(range(10_000), number)))
    other = {
        "categories": shuffler.sample(coco["categories"], len(coco["categories"])),
        "images": [{**i, "id": new_ids[i["id"]]} for i in shuffler.sample(coco["images"], number)],
        "annotations": [{**a, "image_id": new_ids[a["image_id"]]} for a in reversed(coco["annotations"])],
    }
    assert [image["file_name"] for image in image_order(other, seed, stratified)] == order


@given(seeds, st.integers(1, 20))
def test_added_images_do_not_change_the_order_of_the_others(seed, added):
    larger = make_coco(40 + added)
    smaller = {**larger, "images": [i for i in larger["images"] if i["file_name"] < "00040"]}
    kept = [i["file_name"] for i in image_order(larger, seed) if i["file_name"] < "00040"]
    assert kept == [i["file_name"] for i in image_order(smaller, seed)]


def test_every_image_is_as_likely_as_any_other():
    coco = make_coco(20)
    counts = dict.fromkeys(names(coco), 0)
    for seed in range(1000):
        for image in image_order(coco, seed)[:5]:
            counts[image["file_name"]] += 1
    # 250 expected, standard deviation 13.7.
    assert all(abs(count - 250) < 5 * 13.7 for count in counts.values())


# ---- Strata ---------------------------------------------------------------------------------------

object_counts = st_numpy.arrays(
    np.int32, st.tuples(st.integers(1, 40), st.integers(1, 6)), elements=st.integers(0, 3)
)


@settings(deadline=None)
@given(object_counts)
def test_with_as_many_images_as_classes_every_class_is_present(objects):
    order = stratified_order(objects)
    assert sorted(order) == list(range(len(objects)))
    present = objects.any(axis=0)
    beginning = objects[order[: present.sum()]]
    assert (beginning.any(axis=0) == present).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=200))
def test_with_one_object_an_image_no_class_is_ever_ahead_by_more_than_one(labels):
    labels = np.array(labels)
    objects = np.eye(6, dtype=np.int32)[labels]
    order = labels[stratified_order(objects)]
    totals = objects.sum(axis=0)
    for size in range(len(order) + 1):
        taken = np.bincount(order[:size], minlength=6)
        assert (taken <= size * totals / len(order) + 1 + 1e-9).all()


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_classes_are_those_of_the_fraction(seed):
    coco = make_coco(2000, seed, classes=6)
    classes = [c["id"] for c in coco["categories"]]
    labels = [(a["image_id"], a["category_id"]) for a in coco["annotations"] if not a["iscrowd"]]
    total = np.array([sum(c == category for _, c in labels) for category in classes])

    def excess(stratified, size):
        """By how many objects the worst class is off, beyond half a percent of the class."""
        chosen = {image["id"] for image in image_order(coco, seed, stratified)[:size]}
        taken = np.array([sum(c == category and i in chosen for i, c in labels) for category in classes])
        return (np.abs(taken - total * size / 2000) - 0.005 * total).max()

    sizes = (20, 100, 200, 1000)
    assert max(excess(True, size) for size in sizes) <= 3
    assert max(excess(False, size) for size in sizes) > 3  # left to chance


# ---- Fractions ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(numbers, st.lists(st.integers(1, 10_000), min_size=1, max_size=5, unique=True), st.booleans())
def test_fractions_are_nested_and_rounded_and_complemented(tmp_path_factory, number, hundredths, stratified):
    folder = tmp_path_factory.mktemp("splits")
    coco = make_coco(number)
    (folder / "source.json").write_text(json.dumps(coco))
    percents = [f"{h / 100:g}" for h in hundredths]
    sizes = [math.floor(Fraction(h, 10_000) * number + Fraction(1, 2)) for h in sorted(hundredths)]
    if min(sizes) < 1:
        with pytest.raises(InputError, match="is no image"):
            make_splits(folder / "source.json", folder / "out", percents, stratified=stratified)
        assert not (folder / "out").exists()
        return
    manifest = make_splits(folder / "source.json", folder / "out", percents, stratified=stratified)
    assert [counts["images"] for counts in manifest["splits"].values()] == sizes
    earlier = []
    for name, size in zip(manifest["splits"], sizes):
        chosen = names(read(folder / "out", f"labeled_{name}"))
        assert len(set(chosen)) == size and chosen[: len(earlier)] == earlier
        rest = folder / "out" / f"unlabeled_{name}.txt"
        left_out = rest.read_text().splitlines() if rest.exists() else []
        assert sorted(chosen + left_out) == sorted(names(coco)) and left_out == sorted(left_out)
        earlier = chosen


@pytest.mark.parametrize("stratified", [False, True])
def test_a_split_is_the_source_with_fewer_images(tmp_path, source, stratified):
    manifest = make_splits(source, tmp_path / "out", FRACTIONS, seed=3, stratified=stratified)
    assert list(manifest["splits"]) == ["0.5", "1", "5", "10", "20", "50", "100"]
    coco = json.loads(source.read_text())
    for name, counts in manifest["splits"].items():
        split = read(tmp_path / "out", f"labeled_{name}")
        assert {k: v for k, v in split.items() if k not in ("images", "annotations")} == {
            k: v for k, v in coco.items() if k not in ("images", "annotations")
        }
        ids = {image["id"] for image in split["images"]}
        expected = [a for a in coco["annotations"] if a["image_id"] in ids]
        assert sorted(split["annotations"], key=lambda a: a["id"]) == sorted(expected, key=lambda a: a["id"])
        assert all(image in coco["images"] for image in split["images"])
        assert counts["crowd_regions"] == sum(a["iscrowd"] for a in expected)
        assert (
            sum(counts["objects"].values()) + counts["crowd_regions"]
            == counts["annotations"]
            == len(expected)
        )
        for category in coco["categories"]:
            found = [a for a in expected if a["category_id"] == category["id"] and not a["iscrowd"]]
            assert counts["objects"][category["name"]] == len(found)
    assert manifest["splits"]["100"] == {k: v for k, v in manifest["source"].items() if k != "file"}
    assert not (tmp_path / "out" / "unlabeled_100.txt").exists()


@pytest.mark.parametrize("stratified", [False, True])
def test_files_do_not_depend_on_the_order_of_the_source_nor_on_other_fractions(tmp_path, source, stratified):
    coco = json.loads(source.read_text())
    for key in ("images", "annotations"):
        coco[key].reverse()
    (tmp_path / "reversed.json").write_text(json.dumps(coco))
    make_splits(source, tmp_path / "a", FRACTIONS, stratified=stratified)
    make_splits(tmp_path / "reversed.json", tmp_path / "b", FRACTIONS, stratified=stratified)
    make_splits(source, tmp_path / "c", [10], stratified=stratified)
    but = ("manifest.json",)
    assert contents(tmp_path / "a", but) == contents(tmp_path / "b", but)
    assert contents(tmp_path / "c", but).items() <= contents(tmp_path / "a", but).items()
    make_splits(source, tmp_path / "d", FRACTIONS, seed=1, stratified=stratified)
    assert names(read(tmp_path / "d", "labeled_10")) != names(read(tmp_path / "a", "labeled_10"))


def test_fractions_are_named_as_short_as_can_be():
    assert list(parse_fractions(["100.0", 0.50, "5e0", 12.5])) == ["0.5", "5", "12.5", "100"]


# ---- The command ----------------------------------------------------------------------------------


def command(source, output, *more):
    return main(["splits", str(source), "--output", str(output), *map(str, more)])


def test_it_is_done_once_and_other_settings_are_refused(tmp_path, source, capsys):
    output = tmp_path / "out"
    assert command(source, output, "--fractions", 10, 100) == 0
    assert "23 images" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in output.iterdir()}
    assert command(source, output, "--fractions", 100, "10.0") == 0
    capsys.readouterr()
    for more, key in (
        ((10, 50), "fractions"),
        ((10, 100, "--seed", 1), "seed"),
        ((10, 100, "--stratified"), "stratified"),
    ):
        assert command(source, output, "--fractions", *more) == 2
        assert f"another {key}" in capsys.readouterr().err
    source.write_text(json.dumps(make_coco(230, seed=1)))
    assert command(source, output, "--fractions", 10, 100) == 2
    assert "another source" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in output.iterdir()} == before


def test_other_files_are_never_touched(tmp_path, source):
    with pytest.raises(InputError, match="holds files"):
        make_splits(source, tmp_path, [10])
    assert [p.name for p in tmp_path.iterdir()] == ["source.json"]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ([], "No fraction"),
        ([0], "Fraction 0 "),
        ([-1], "Fraction -1 "),
        ([100.5], "Fraction 100.5 "),
        (["ten"], "Fraction ten "),
        (["nan"], "Fraction nan "),
        (["inf"], "Fraction inf "),
        ([5, "5.0"], "5 was given twice"),
        ([0.1], r"0\.1 % of the 230 images of .*source\.json"),
    ],
)
def test_impossible_fractions_are_refused(tmp_path, source, fractions, message):
    with pytest.raises(InputError, match=message):
        make_splits(source, tmp_path / "out", fractions)
    assert not (tmp_path / "out").exists()


def _broken(**changes):
    return {**make_coco(5), **changes}


_IMAGES = make_coco(5)["images"]
_LABELS = make_coco(5)["annotations"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{'images'", "not valid JSON"),
        ([], r"top level is \[\]"),
        (_broken(annotations=None), "has no 'annotations'"),
        (_broken(images=[]), "has no 'images'"),
        (_broken(images=[1]), r"images\[0\]: its 'id' is null"),
        (_broken(images=[{"id": 1}]), r"images\[0\]: its 'file_name' is null: it must be a text"),
        (_broken(images=[*_IMAGES, _IMAGES[0]]), "two images of the same id"),
        (_broken(images=[*_IMAGES, {**_IMAGES[0], "id": 1}]), "two images of the same file_name"),
        (_broken(annotations=[{**_LABELS[0], "image_id": 999}]), "'image_id' is 999, but no image"),
        (
            _broken(annotations=[{**_LABELS[0], "category_id": [1]}]),
            r"'category_id' is \[1\], but no category",
        ),
        (_broken(annotations=[{"image_id": 1}]), r"annotations\[0\] \(image_id 1\): its 'image_id'"),
    ],
)
def test_a_faulty_source_is_named(tmp_path, content, message):
    path = tmp_path / "faulty.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        make_splits(path, tmp_path / "out", [100])
    assert "faulty.json" in str(error.value)
    assert not (tmp_path / "out").exists()


# File names that a line of a list could lose or change.
ODD_NAMES = [
    "#1.jpg", " # 2.jpg", "\ufeffmark.jpg", " before.jpg", "after.jpg ", " ", "two\nlines.jpg", "carriage\rreturn.jpg",
    "both\r\n.jpg", '"quoted"', '"', "back\\slash.jpg", "\\n.jpg", "tab\t.jpg", "line\u2028end.jpg", "\x85.jpg",
    "photos/#3.jpg", "\u00fc \u6587.jpg", "caf\udce9.jpg", "100%.jpg", "~/x.jpg", "plain.jpg",
]  # fmt: skip


def _write_source(folder, names):
    images = [{"id": i, "file_name": name, "width": 9, "height": 9} for i, name in enumerate(names)]
    coco = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "tree"}]}
    (folder / "source.json").write_text(json.dumps(coco))


def test_what_is_left_out_is_read_back_whatever_its_name(tmp_path):
    _write_source(tmp_path, ODD_NAMES)
    (tmp_path / "photos").mkdir()
    for name in ("plain.jpg", "#1.jpg"):
        (tmp_path / "photos" / name).write_bytes(b"")
    command = [
        "splits",
        str(tmp_path / "source.json"),
        "--output",
        str(tmp_path / "out"),
        "--fractions",
        "5",
        "10",
    ]
    assert main(command) == 0
    everything = images_of_coco_json(tmp_path / "source.json", tmp_path / "photos")
    for fraction in ("5", "10"):
        labeled = {image["file_name"] for image in read(tmp_path / "out", f"labeled_{fraction}")["images"]}
        left_out = images_of_list(tmp_path / "out" / f"unlabeled_{fraction}.txt", tmp_path / "photos")
        assert left_out.image_root == everything.image_root
        expected = [n for n, name in zip(everything.file_names, ODD_NAMES) if name not in labeled]
        assert sorted(left_out.file_names) == sorted(expected) and len(expected) > 10


def test_one_file_under_two_spellings(tmp_path):
    _write_source(tmp_path, ["a.jpg", "b.jpg", "./a.jpg"])
    with pytest.raises(InputError, match=r"source\.json has two images of the same file_name: 'a\.jpg'"):
        make_splits(tmp_path / "source.json", tmp_path / "out", [50])
