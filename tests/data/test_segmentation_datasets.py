import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from selftrain_d2.data.label_maps import read_label_map, voc_colours
from selftrain_d2.data.segmentation_datasets import (
    VOC_CLASSES,
    load_segmentation_folder,
    load_voc_2012,
    register_segmentation_folder,
)
from selftrain_d2.errors import InputError

TRAIN, VAL, AUG = ["2007_000032", "2007_000039"], ["2007_000033"], ["2008_000002", "2008_000003"]
SIZE = (12, 16)


def save_mask(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    image.putpalette(voc_colours().tobytes())
    image.save(path)


def save_image(path, size=SIZE, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def labels_of(seed, size=SIZE):
    """Two classes and a border of void."""
    labels = np.full(size, 255, dtype=np.uint8)
    labels[1:-1, 1:-1] = np.random.default_rng(seed).choice([0, seed % 20 + 1], (size[0] - 2, size[1] - 2))
    return labels


@pytest.fixture
def voc(tmp_path, monkeypatch):
    """A VOC2012 folder of five images, where detectron2 looks for data sets."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for seed, name in enumerate(TRAIN + VAL + AUG):
        save_image(root / "JPEGImages" / f"{name}.jpg", seed=seed)
        save_mask(root / "SegmentationClassAug" / f"{name}.png", labels_of(seed))
        if name not in AUG:
            save_mask(root / "SegmentationClass" / f"{name}.png", labels_of(seed))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in {"train": TRAIN, "val": VAL, "trainaug": TRAIN + AUG}.items():
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return root


@pytest.mark.parametrize(("split", "names"), [("train", TRAIN), ("val", VAL), ("trainaug", TRAIN + AUG)])
def test_voc_by_its_registered_names(voc, split, names):
    name = f"voc_2012_sem_seg_{split}"
    dicts = DatasetCatalog.get(name)
    assert [d["image_id"] for d in dicts] == names
    for sample in dicts:
        assert (sample["height"], sample["width"]) == SIZE
        seed = (TRAIN + VAL + AUG).index(sample["image_id"])
        np.testing.assert_array_equal(read_label_map(sample["sem_seg_file_name"]), labels_of(seed))
        assert ("Aug" in sample["sem_seg_file_name"]) == (split == "trainaug")
    metadata = MetadataCatalog.get(name)
    assert metadata.stuff_classes == list(VOC_CLASSES) and len(VOC_CLASSES) == 21
    assert (metadata.ignore_label, metadata.evaluator_type) == (255, "sem_seg")
    assert metadata.stuff_colors[15] == [192, 128, 128]


def test_the_images_to_pseudo_label_come_without_masks(voc):
    dicts = DatasetCatalog.get("voc_2012_sem_seg_aug")
    assert [d["image_id"] for d in dicts] == AUG
    assert not any("sem_seg_file_name" in d for d in dicts)


def test_voc_elsewhere(voc, tmp_path, monkeypatch):
    voc.rename(tmp_path / "VOC2012")
    assert len(DatasetCatalog.get("voc_2012_sem_seg_val")) == 1
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"nothing.*DETECTRON2_DATASETS"):
        DatasetCatalog.get("voc_2012_sem_seg_val")


@pytest.mark.parametrize(
    ("removed", "split", "message"),
    [
        ("ImageSets/Segmentation/trainaug.txt", "trainaug", "trainaug.txt cannot be read"),
        ("ImageSets/Segmentation/trainaug.txt", "aug", "trainaug.txt cannot be read"),
        ("JPEGImages/2007_000039.jpg", "train", "2007_000039.jpg cannot be read"),
        ("SegmentationClass/2007_000039.png", "train", "has no mask.*2007_000039.png"),
        ("SegmentationClassAug/2008_000003.png", "trainaug", "has no mask.*2008_000003.png"),
    ],
)
def test_voc_with_a_file_missing(voc, removed, split, message):
    (voc / removed).unlink()
    with pytest.raises(InputError, match=message):
        load_voc_2012(voc, split)


def test_voc_without_sbd(voc):
    (voc / "SegmentationClassAug").rename(voc / "other")
    with pytest.raises(InputError, match=r"SegmentationClassAug.*SBD"):
        load_voc_2012(voc, "trainaug")
    assert len(load_voc_2012(voc, "train")) == 2
    with pytest.raises(InputError, match="no split 'test'"):
        load_voc_2012(voc, "test")


@pytest.fixture
def folders(tmp_path):
    """Three images, one of them in a subfolder, and their masks."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for seed, name in enumerate(["a", "b", "sub/c"]):
        save_image(images / f"{name}.{'jpg' if seed else 'png'}", seed=seed)
        save_mask(masks / f"{name}.png", labels_of(seed))
    return images, masks


CLASSES = ["none", "one", "two", "three"]


def test_folders(folders):
    images, masks = folders
    register_segmentation_folder("mine", images, masks, CLASSES)
    first, again = DatasetCatalog.get("mine"), DatasetCatalog.get("mine")
    assert [d["image_id"] for d in first] == ["a.png", "b.jpg", "sub/c.jpg"]
    assert first[2]["sem_seg_file_name"] == str(masks / "sub" / "c.png")
    first[0].clear()  # what a user does to the dicts stays with that user
    assert again == DatasetCatalog.get("mine")
    with pytest.raises(InputError, match="mine"):
        register_segmentation_folder("mine", images, masks, CLASSES)


def test_evaluation_with_detectron2s_evaluator(folders):
    """Predictions right but for one class: mIOU worked out from counts of pixels."""
    register_segmentation_folder("mine", *folders, CLASSES)
    dicts = DatasetCatalog.get("mine")
    evaluator = SemSegEvaluator("mine", distributed=False, sem_seg_loading_fn=read_label_map)
    evaluator.reset()
    truth, guess = [], []
    for sample in dicts:
        labels = read_label_map(sample["sem_seg_file_name"])
        predicted = np.where((labels == 3) | (labels == 255), 0, labels)
        logits = torch.tensor((np.arange(4)[:, None, None] == predicted) * 5.0)
        evaluator.process([sample], [{"sem_seg": logits}])
        truth.append(labels[labels != 255])
        guess.append(predicted[labels != 255])
    truth, guess = np.concatenate(truth), np.concatenate(guess)
    ious = [((truth == c) & (guess == c)).sum() / ((truth == c) | (guess == c)).sum() for c in range(4)]
    result = evaluator.evaluate()["sem_seg"]
    for name, iou in zip(CLASSES, ious):
        assert result[f"IoU-{name}"] == pytest.approx(100 * iou)
    assert result["mIoU"] == pytest.approx(100 * np.mean(ious)) and ious[3] == 0


def test_a_mask_missing(folders):
    (folders[1] / "b.png").unlink()
    with pytest.raises(InputError, match=r"b\.jpg has no mask.*b\.png"):
        load_segmentation_folder(*folders, CLASSES)


def test_a_mask_of_another_size(folders):
    save_mask(folders[1] / "b.png", labels_of(1, size=(16, 12)))
    with pytest.raises(InputError, match=r"b\.png is 12 x 16.*b\.jpg 16 x 12"):
        load_segmentation_folder(*folders, CLASSES)


def test_a_class_id_without_a_name(folders):
    with pytest.raises(InputError, match=r"c\.png has the class id 3.*3 classes"):
        load_segmentation_folder(*folders, CLASSES[:3])


def test_a_mask_that_ignores_everything_is_fine(folders):
    save_mask(folders[1] / "b.png", np.full(SIZE, 255, dtype=np.uint8))
    assert len(load_segmentation_folder(*folders, CLASSES)) == 3


def test_two_images_of_one_mask(folders):
    save_image(folders[0] / "b.png")
    with pytest.raises(InputError, match=r"share the mask b\.png"):
        load_segmentation_folder(*folders, CLASSES)


def test_folders_that_are_not_there(folders, tmp_path):
    with pytest.raises(InputError, match=r"Mask folder.*gone"):
        load_segmentation_folder(folders[0], tmp_path / "gone", CLASSES)
    with pytest.raises(InputError, match=r"Image folder.*gone"):
        load_segmentation_folder(tmp_path / "gone", folders[1], CLASSES)
    with pytest.raises(InputError, match="0 classes"):
        load_segmentation_folder(*folders, [])


def test_a_broken_image(folders):
    (folders[0] / "b.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"Image .*b\.jpg cannot be read"):
        load_segmentation_folder(*folders, CLASSES)
