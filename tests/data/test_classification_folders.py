import itertools
import os

import cv2
import numpy as np
import pytest
import torch
from conftest import make_class_folders
from detectron2.data import DatasetCatalog, MetadataCatalog

from selftrain_d2 import InputError, build_selftrain_train_loader, register_classification_folder
from selftrain_d2.data.classification import (
    ClassificationMapper,
    classification_classes,
    get_classification_dicts,
    list_classes,
    load_classification_folder,
)
from selftrain_d2.data.datasets import register_human_labels


@pytest.fixture
def folder(tmp_path):
    return make_class_folders(tmp_path / "classes")


@pytest.fixture
def joint_config(small_config, coco_set, folder):
    register_human_labels("human", coco_set.json_file, coco_set.images)
    register_classification_folder("classes", folder)
    small_config.DATASETS.TRAIN = ("human",)
    small_config.DATASETS.CLASSIFICATION_TRAIN = ("classes",)
    small_config.SOLVER.CLASSIFICATION_IMS_PER_BATCH = 3
    return small_config


def test_classes_are_folder_names_and_images_may_lie_deeper(folder):
    (folder / "dark" / "deeper").mkdir()
    os.rename(folder / "dark" / "0.png", folder / "dark" / "deeper" / "0.png")
    (folder / ".cache").mkdir()
    (folder / "readme.txt").write_text("no class")
    assert list_classes(folder) == ["bright", "dark", "noise"]
    found = {
        os.path.relpath(d["file_name"], folder): d["class_id"] for d in load_classification_folder(folder)
    }
    expected = {f"{name}/{i}.png": c for c, name in enumerate(["bright", "dark", "noise"]) for i in range(4)}
    expected["dark/deeper/0.png"] = expected.pop("dark/0.png")
    assert found == expected


def test_registered_and_stamped(joint_config):
    assert MetadataCatalog.get("classes").classification_classes == ["bright", "dark", "noise"]
    dicts = get_classification_dicts(joint_config)
    assert len(dicts) == 12 and {d["label_source"] for d in dicts} == {"classification"}


def _no_sub_folder(folder):
    for path in list(folder.rglob("*.png")):
        path.unlink()
    for path in list(folder.iterdir()):
        path.rmdir()


def _one_class(folder):
    for name in ("dark", "noise"):
        for path in list((folder / name).iterdir()):
            path.unlink()
        (folder / name).rmdir()


def _empty_class(folder):
    (folder / "empty").mkdir()


def _damaged_class(folder):
    (folder / "damaged").mkdir()
    (folder / "damaged" / "0.png").write_bytes(b"nothing of an image")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_sub_folder, "at least two classes, and has none"),
        (_one_class, "at least two classes, and has only 'bright'"),
        (_empty_class, r"classes/empty holds no image"),
        (_damaged_class, r"None of the images of class 'damaged' in .* can be read"),
    ],
)
def test_folders_that_are_refused_when_registered(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        register_classification_folder("classes", folder)
    assert "classes" not in DatasetCatalog


def test_missing_folder_and_taken_name(folder, tmp_path):
    with pytest.raises(InputError, match=r"nowhere cannot be listed: No such file"):
        register_classification_folder("classes", tmp_path / "nowhere")
    register_classification_folder("classes", folder)
    with pytest.raises(InputError, match="registered already"):
        register_classification_folder("classes", folder)


def test_one_damaged_image_is_named_when_met(folder, small_config):
    file = folder / "dark" / "broken.png"
    file.write_bytes((folder / "dark" / "0.png").read_bytes()[:60])
    register_classification_folder("classes", folder)  # its other images can be read
    mapper = ClassificationMapper(small_config)
    with pytest.raises(InputError, match=r"Classification image .*dark/broken\.png cannot be read"):
        mapper({"file_name": str(file), "class_id": 1})


def test_config_mistakes(joint_config, folder):
    def refused(message, **keys):
        cfg = joint_config.clone()
        for key, value in keys.items():
            cfg.merge_from_list([key.replace("__", "."), value])
        with pytest.raises(InputError, match=message):
            build_selftrain_train_loader(cfg)

    refused("CLASSIFICATION_IMS_PER_BATCH belong together", SOLVER__CLASSIFICATION_IMS_PER_BATCH=0)
    refused("CLASSIFICATION_IMS_PER_BATCH is -1", SOLVER__CLASSIFICATION_IMS_PER_BATCH=-1)
    refused("'nothing', which is not registered", DATASETS__CLASSIFICATION_TRAIN=("nothing",))
    refused("'human', which is no classification dataset", DATASETS__CLASSIFICATION_TRAIN=("human",))
    refused("CLASSIFICATION_IMAGE_SIZE must be >= 0", INPUT__CLASSIFICATION_IMAGE_SIZE=-1)
    register_classification_folder("same", folder)
    make_class_folders(folder.parent / "other", ["bright", "dim"])
    register_classification_folder("other", folder.parent / "other")
    refused("'other' has other classes", DATASETS__CLASSIFICATION_TRAIN=("classes", "other"))
    joint_config.DATASETS.CLASSIFICATION_TRAIN = ("classes", "same")
    assert classification_classes(joint_config) == ["bright", "dark", "noise"]
    assert len(get_classification_dicts(joint_config)) == 24
    DatasetCatalog.register("own", lambda: [{"file_name": "a.png", "class_id": 3}])
    MetadataCatalog.get("own").set(classification_classes=["bright", "dark", "noise"])
    refused("'own' has class_id 3 for a.png, but 3 classes", DATASETS__CLASSIFICATION_TRAIN=("own",))


@pytest.mark.parametrize(("key", "size"), [(0, 96), (40, 40)])
def test_images_are_square_bytes_of_the_configured_size(joint_config, key, size):
    joint_config.INPUT.CLASSIFICATION_IMAGE_SIZE = key
    mapper = ClassificationMapper(joint_config)
    for d in get_classification_dicts(joint_config):
        sample = mapper(d)
        assert sample["image"].shape == (3, size, size) and sample["image"].dtype == torch.uint8
        assert (sample["class_id"], sample["label_source"]) == (d["class_id"], "classification")


def test_parts_keep_colours_and_are_mirrored_half_of_the_time(tmp_path, small_config):
    """A gradient from left to right in one channel: mirrored if it falls. Channels in the configured order."""
    pixels = np.zeros((60, 90, 3), dtype=np.uint8)
    pixels[:, :, 0] = np.linspace(0, 250, 90)  # blue, as OpenCV writes
    pixels[:, :, 2] = 200  # red
    cv2.imwrite(str(tmp_path / "gradient.png"), pixels)
    np.random.seed(0)
    mapper = ClassificationMapper(image_size=32, image_format="RGB")
    images = [mapper({"file_name": str(tmp_path / "gradient.png")})["image"].float() for _ in range(200)]
    slopes = torch.stack([i[2, :, -1].mean() - i[2, :, 0].mean() for i in images])
    assert all((i[0] == 200).all() and (i[1] == 0).all() for i in images)
    assert 70 < (slopes < 0).sum() < 130  # 4 standard deviations
    # 8 to 100 % of the area with sides 3:4 to 4:3: at least sqrt(0.08 * 3/4 * 90 * 60) = 18 of 90 columns.
    shares = slopes.abs() / 250
    assert shares.min() > 0.15 and shares.max() > 0.8 and shares.std() > 0.1


def test_random_numbers_of_torch_are_left_alone(joint_config):
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    drawn = [torch.rand(1)]
    ClassificationMapper(joint_config)(get_classification_dicts(joint_config)[0])
    torch.testing.assert_close(torch.cat([*drawn, torch.rand(1)]), expected, rtol=0, atol=0)


def _take(cfg, number, first=0):
    loader = build_selftrain_train_loader(cfg)
    loader.batch_sampler.first_batch = first
    return list(itertools.islice(iter(loader), number))


def _assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(itertools.chain(*one), itertools.chain(*other)):
        assert a["file_name"] == b["file_name"] and torch.equal(a["image"], b["image"])


def test_third_source_of_every_batch(joint_config):
    batches = _take(joint_config, 8)
    for batch in batches:
        assert [s["label_source"] for s in batch] == ["human"] * 2 + ["classification"] * 3
    names = [s["file_name"] for batch in batches[:4] for s in batch[2:]]
    assert len(set(names)) == 12  # an epoch has every image once


def test_same_samples_whatever_the_workers_and_wherever_resumed(joint_config):
    expected = _take(joint_config, 6)
    _assert_equal(_take(joint_config, 2, first=4), expected[4:])
    joint_config.DATALOADER.NUM_WORKERS = 2
    _assert_equal(_take(joint_config, 6), expected)


def test_detection_images_are_those_of_a_run_without(joint_config):
    joint = _take(joint_config, 4)
    joint_config.DATASETS.CLASSIFICATION_TRAIN, joint_config.SOLVER.CLASSIFICATION_IMS_PER_BATCH = (), 0
    _assert_equal([batch[:2] for batch in joint], _take(joint_config, 4))


def test_two_processes_share_the_stream_of_one(joint_config, monkeypatch):
    joint_config.SOLVER.CLASSIFICATION_IMS_PER_BATCH = 4
    alone = _take(joint_config, 3)
    halves = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        halves.append(_take(joint_config, 3))
    key = lambda s: (s["file_name"], s["image"].float().mean().item())  # noqa: E731
    for whole, first, second in zip(alone, *halves):
        assert [s["label_source"] for s in first] == ["human"] + ["classification"] * 2
        assert sorted(map(key, whole)) == sorted(map(key, first + second))
