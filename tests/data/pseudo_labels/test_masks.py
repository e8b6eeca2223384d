import itertools
import json
import os
import pickle

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torch.utils.data import DataLoader

from selftrain_d2 import (
    InputError,
    SelfTrainingDatasetMapper,
    build_selftrain_train_loader,
    load_pseudo_labels,
    register_pseudo_labels,
    register_segmentation_folder,
)
from selftrain_d2.data.pseudo_labels import writer as pseudo_label_writer
from selftrain_d2.data.pseudo_labels.manifest import read_manifest, read_manifest_of_boxes
from selftrain_d2.data.pseudo_labels.masks import (
    PixelLabels,
    least_percents,
    make_mask_row,
    mask_path,
    read_mask,
    write_mask,
)
from selftrain_d2.data.pseudo_labels.reader import verify_pseudo_labels
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter

CLASSES = ["sky", "tree", "road"]
NAMES = ["a.jpg", "a.png", "deep/b.jpg", "broken.jpg", "c.jpg"]  # two images of one stem
IDENTITY = {"stuff_classes": CLASSES, "score_floor": 0.05, "image_root": "/photos"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pseudo_label_writer, "SHARD_SIZE", 2)


def _labels(name):
    """Random ones, of a size by the name; c.jpg is under the floor throughout."""
    rng = np.random.default_rng(NAMES.index(name))
    size = 20 + len(name), 30
    percents = rng.integers(0, 101, size).astype(np.uint8)
    return PixelLabels(
        rng.integers(0, 3, size).astype(np.uint8), 0 * percents if name == "c.jpg" else percents
    )


def _rows(writer, shard):
    for i in writer.shard_range(shard):
        name = NAMES[i]
        if name == "broken.jpg":
            yield make_mask_row(name, skipped="no image")
        else:
            yield writer.write_mask(name, _labels(name))


def _write(folder, shards=None):
    writer = PseudoLabelWriter(folder, IDENTITY, NAMES)
    missing = writer.missing_shards()
    for shard in missing if shards is None else shards:
        writer.write_shard(shard, _rows(writer, shard))
    if shards is None:
        writer.finish()
    writer.close()
    return missing


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path / "labels")
    return tmp_path / "labels"


def _expected(name, threshold):
    """The paper's rule, in scores: a pixel of a lower one is ignored."""
    labels = _labels(name)
    return np.where(labels.percents / 100 >= threshold - 1e-9, labels.classes, 255)


def _read(sample):
    return read_mask(sample["sem_seg_file_name"], sample["sem_seg_sha256"]).at(
        sample["sem_seg_least_percent"]
    )


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.57, 0.9, 1.0])
def test_threshold_when_loaded(folder, threshold):
    dicts = load_pseudo_labels(folder, threshold)
    assert [d["image_id"] for d in dicts] == [n for n in NAMES if n != "broken.jpg"]
    pixels = np.zeros(3, int)
    for d, classes in zip(dicts, dicts.class_counts):
        expected = _expected(d["image_id"], threshold)
        np.testing.assert_array_equal(_read(d), expected)
        assert (d["height"], d["width"]) == expected.shape
        assert d["label_source"] == "pseudo" and d["file_name"] == f"/photos/{d['image_id']}"
        pixels += np.bincount(expected.ravel(), minlength=256)[:3]
        assert classes == len(set(expected.ravel()) - {255})
    np.testing.assert_array_equal(dicts.pixels_by_class, pixels)
    assert dicts.pixels == sum(d["height"] * d["width"] for d in dicts)


def test_thresholds_by_class(folder):
    dicts = load_pseudo_labels(folder, {"sky": 0.2, "tree": 0.5, "road": 0.9})
    labels, found = _labels("deep/b.jpg"), _read(dicts[2])
    least = np.array([20, 50, 90])[labels.classes]
    np.testing.assert_array_equal(found, np.where(labels.percents >= least, labels.classes, 255))


@settings(max_examples=300, deadline=None)
@given(threshold=st.floats(0, 1), percent=st.integers(0, 100))
def test_thresholds_between_percents_act_as_the_next_one(threshold, percent):
    (least,) = least_percents([threshold])
    assert least - 1 < 100 * threshold < least + 1e-3
    assert least_percents([percent / 100]) == least_percents([np.float32(percent / 100)]) == (percent,)


@settings(max_examples=100, deadline=None)
@given(
    pixels=arrays(
        np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(2)), elements=st.integers(0, 100)
    ),
)
def test_pngs_are_lossless(tmp_path_factory, pixels):
    folder = tmp_path_factory.mktemp("masks")
    labels = PixelLabels(pixels[..., 0], pixels[..., 1])
    row = write_mask(folder, "x/y.jpg", labels)
    file = folder / "masks" / "x" / "y.jpg.png"
    for mine, back in zip(labels, read_mask(file, row["png_sha256"])):
        np.testing.assert_array_equal(mine, back)
    histogram = np.zeros((101, 101), int)
    np.add.at(histogram, (labels.classes, labels.percents), 1)
    assert dict(zip(row["bins"], row["pixels"])) == {
        101 * c + p: histogram[c, p] for c, p in np.argwhere(histogram)
    }
    assert os.listdir(folder) == ["masks"] and row["png_bytes"] == file.stat().st_size


def test_the_manifest_counts(folder):
    manifest = verify_pseudo_labels(folder)
    assert manifest["stuff_classes"] == CLASSES and "thing_classes" not in manifest
    assert (manifest["listed"], manifest["labeled"], manifest["empty"]) == (5, 3, 1)
    assert manifest["skipped"] == {"broken.jpg": "no image"}
    kept = sum((_labels(n).percents >= 5).sum() for n in NAMES if n != "broken.jpg")
    assert manifest["pixels"] == kept
    with pytest.raises(InputError, match="are masks of pixels"):
        read_manifest_of_boxes(folder)


@pytest.mark.parametrize("selection", [{"top_k": 3}, {"boxes_per_image": 2.0}])
def test_what_goes_with_boxes_alone(folder, selection):
    with pytest.raises(InputError, match="The pseudo labels are masks"):
        load_pseudo_labels(folder, **selection)
    with pytest.raises(InputError, match="The pseudo labels are masks"):
        register_pseudo_labels("masks", folder, **selection)


def test_under_the_floor(folder):
    with pytest.raises(InputError, match=r"outside \[0.05, 1\]"):
        load_pseudo_labels(folder, 0.01)
    # It was applied when written: such pixels have no class in the file either.
    labels = _labels("a.jpg")
    written = read_mask(folder / "masks" / "a.jpg.png").classes
    np.testing.assert_array_equal(written, np.where(labels.percents >= 5, labels.classes, 255))


@pytest.mark.parametrize("name", ["../../etc/x.jpg", "/abs/x.jpg", "tar:///a.tar/x.jpg", "a/../../../x.jpg"])
def test_masks_stay_in_their_folder(name, tmp_path):
    path = os.path.normpath(tmp_path / mask_path(name))
    assert path.startswith(f"{tmp_path / 'masks'}{os.sep}") and path.endswith("x.jpg.png")
    assert mask_path(name) != mask_path(name.lstrip("/") + "a")
    write_mask(tmp_path, name, _labels("a.jpg"))
    assert os.path.exists(path)


def _files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.p[an]*") if p.is_file()}


def test_stopped_and_started_again(tmp_path, folder):
    assert _write(tmp_path / "stopped", shards=[1]) == [0, 1, 2]
    (tmp_path / "stopped" / ".mask.123").write_bytes(b"half")
    with pytest.raises(InputError, match="not finished"):
        load_pseudo_labels(tmp_path / "stopped")
    assert _write(tmp_path / "stopped") == [0, 2]
    assert _files(tmp_path / "stopped") == _files(folder)
    assert not (tmp_path / "stopped" / ".mask.123").exists()


def _flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES = {
    "gone": os.unlink,
    "short": lambda file: os.truncate(file, 30),
    "other": _flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_mask_is_told_and_made_again(folder, damage):
    before = _files(folder)
    file = folder / "masks" / "deep" / "b.jpg.png"
    DAMAGES[damage](file)
    with pytest.raises(InputError, match=r"deep/b\.jpg in .* is missing or damaged"):
        verify_pseudo_labels(folder)
    with pytest.raises(InputError, match=r"b\.jpg\.png (is missing|is damaged)"):
        for d in load_pseudo_labels(folder):
            _read(d)
    if damage != "other":  # what can be seen without reading it is told at once
        with pytest.raises(InputError):
            load_pseudo_labels(folder)
    assert _write(folder) == [1]
    assert _files(folder) == before


def test_what_is_no_pseudo_mask(tmp_path):
    Image.new("L", (3, 3)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="has the mode L"):
        read_mask(tmp_path / "x.png")
    with pytest.raises(InputError, match="cannot be read"):
        read_mask(tmp_path / "y.png")


def test_a_class_without_a_name(tmp_path):
    writer = PseudoLabelWriter(tmp_path, {**IDENTITY, "stuff_classes": ["sky", "tree"]}, ["a.jpg"])
    labels = _labels("a.jpg")
    row = write_mask(tmp_path, "a.jpg", labels)
    with pytest.raises(InputError, match="class id 2, but there are 2 class names"):
        writer.write_shard(0, [row])


def test_a_sequence_like_that_of_boxes(folder):
    dicts = load_pseudo_labels(folder)
    assert repr(dicts) == "PseudoMaskDataset(4 images of /photos, masks)"
    assert list(dicts[1:3]) == list(dicts)[1:3] and dicts[-1]["image_id"] == "c.jpg"
    part = dicts[::2]
    expected = sum(np.bincount(_expected(d["image_id"], 0.5).ravel(), minlength=256)[:3] for d in part)
    np.testing.assert_array_equal(part.pixels_by_class, expected)
    again = pickle.loads(pickle.dumps(part))
    assert again == part and (again.pixels_by_class == part.pixels_by_class).all()
    shown = dicts.described(CLASSES)
    assert f"{1 - dicts.pixels_by_class.sum() / dicts.pixels:.1%} of the pixels ignored, sky " in shown
    for context in ("fork", "spawn"):
        loader = DataLoader(
            dicts, 3, num_workers=1, collate_fn=list, multiprocessing_context=context, timeout=60
        )
        assert list(itertools.chain(*loader)) == list(dicts)


def test_no_image_at_all(tmp_path):
    writer = PseudoLabelWriter(tmp_path, IDENTITY, ["a.jpg"])
    writer.write_shard(0, [make_mask_row("a.jpg", skipped="broken")])
    writer.finish()
    dicts = load_pseudo_labels(tmp_path)
    assert len(dicts) == 0 and dicts.pixels_by_class.tolist() == [0, 0, 0] and dicts.pixels == 0


@pytest.fixture
def photos(tmp_path, folder):
    """The images of the labels, and the metadata of registered ones."""
    for d in load_pseudo_labels(folder):
        file = tmp_path / "photos" / d["image_id"]
        file.parent.mkdir(parents=True, exist_ok=True)
        # Each class has its own grey, those ignored at 0.5 another one; images must be lossless to tell.
        grey = np.array([10, 90, 170, *[0] * 252, 250], np.uint8)[_expected(d["image_id"], 0.5)]
        Image.fromarray(np.dstack([grey] * 3)).save(file, "PNG")
    return str(tmp_path / "photos")


def test_the_mapper_thresholds_and_checks(small_config, folder, photos):
    register_pseudo_labels("masks", folder, 0.5, image_root=photos)
    metadata = MetadataCatalog.get("masks")
    assert (
        metadata.stuff_classes == CLASSES
        and metadata.ignore_label == 255
        and metadata.get("thing_classes") is None
    )
    small_config.INPUT.AUGMENTATION.IMAGE_SIZE = 30  # as large as the images: nothing is resized
    mapper = SelfTrainingDatasetMapper(small_config, is_train=False)
    for d in DatasetCatalog.get("masks"):
        if max(d["height"], d["width"]) != 30:
            continue
        sample = mapper(d)
        np.testing.assert_array_equal(sample["sem_seg"], _expected(d["image_id"], 0.5))
        assert sample["label_source"] == "pseudo" and not [k for k in sample if k.startswith("sem_seg_")]
    _flip_a_bit(folder / "masks" / "a.jpg.png")
    with pytest.raises(InputError, match="SHA-256"):
        mapper(DatasetCatalog.get("masks")[0])


def test_human_and_pseudo_masks_in_one_batch(small_config, folder, photos, tmp_path, caplog):
    for part, value in (("images", 70), ("masks", 1)):
        (tmp_path / part).mkdir()
        shape = (30, 30, 3) if part == "images" else (30, 30)
        Image.fromarray(np.full(shape, value, np.uint8)).save(tmp_path / part / "h.png")
    register_segmentation_folder("human", tmp_path / "images", tmp_path / "masks", CLASSES)
    register_pseudo_labels("pseudo", folder, 0.5, image_root=photos)
    cfg = small_config
    cfg.DATASETS.TRAIN, cfg.DATASETS.PSEUDO_TRAIN = ("human",), ("pseudo",)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.PSEUDO_IMS_PER_BATCH = 1, 3
    cfg.INPUT.AUGMENTATION.POLICY = "S1"
    with caplog.at_level("INFO"):
        batch = next(iter(build_selftrain_train_loader(cfg)))
    assert "pseudo: 4 images, " in caplog.text and "of the pixels ignored, sky " in caplog.text
    assert [s["label_source"] for s in batch] == ["human", *["pseudo"] * 3]
    for sample in batch:
        assert sample["sem_seg"].shape == sample["image"].shape[1:]
        assert set(sample["sem_seg"].unique().tolist()) <= {0, 1, 2, 255}
    cfg.DATALOADER.PSEUDO_SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with pytest.raises(InputError, match="for masks use TrainingSampler"):
        build_selftrain_train_loader(cfg)


def test_other_classes_are_refused(small_config, folder, tmp_path):
    for part, shape in (("images", (8, 8, 3)), ("masks", (8, 8))):
        (tmp_path / part).mkdir()
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / part / "h.png")
    register_segmentation_folder("human", tmp_path / "images", tmp_path / "masks", ["sky", "road", "tree"])
    register_pseudo_labels("pseudo", folder)
    small_config.DATASETS.TRAIN, small_config.DATASETS.PSEUDO_TRAIN = ("human",), ("pseudo",)
    small_config.SOLVER.PSEUDO_IMS_PER_BATCH = 1
    with pytest.raises(InputError, match="'pseudo' has other classes"):
        build_selftrain_train_loader(small_config)


def test_a_manifest_that_was_changed(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["pixels"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(folder)["pixels"] == manifest["pixels"]
    with pytest.raises(InputError, match="'pixels' is not what the shards hold"):
        verify_pseudo_labels(folder)
