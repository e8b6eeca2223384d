"""S1 to S4 as assembled from a config, alone and in detectron2's own mapper."""

import contextlib
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.structures import BoxMode
from fvcore.transforms.transform import VFlipTransform
from PIL import Image

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.data import augmentation
from selftrain_d2.data.augmentation import AUGMENTATION_REGISTRY, build_augmentations, set_test_size
from selftrain_d2.data.augmentation.jitter import FitLongerSide, ScaleJitterCrop
from selftrain_d2.data.augmentation.policies import AUTOAUGMENT_POLICIES, AutoAugment, RandAugment
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper
from selftrain_d2.data.scaled_images import scale_augmentations
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.generate import teacher_config_sha256


def make_config(**augmentation):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    for key, value in augmentation.items():
        setattr(cfg.INPUT.AUGMENTATION, key, value)
    return cfg


def random_boxes(rng, number, height, width):
    corners = np.sort(rng.uniform(0, 1, (number, 2, 2)), axis=1) * (width, height)
    return corners.reshape(-1, 4)


@pytest.mark.parametrize(
    "name, kinds, jitter",
    [
        ("S1", [T.RandomFlip, ScaleJitterCrop], (0.8, 1.2)),
        ("S2", [AutoAugment, T.RandomFlip, ScaleJitterCrop], (0.8, 1.2)),
        ("S3", [AutoAugment, T.RandomFlip, ScaleJitterCrop], (0.5, 2.0)),
        ("S4", [RandAugment, T.RandomFlip, ScaleJitterCrop], (0.5, 2.0)),
    ],
)
def test_the_policies_of_table_1(name, kinds, jitter):
    cfg = make_config(POLICY=name)
    augmentations = build_augmentations(cfg, is_train=True)
    assert [type(a) for a in augmentations] == kinds
    assert augmentations[-2].prob == 0.5
    assert augmentations[-1].scale_range == jitter and augmentations[-1].size == 640
    assert augmentations[-1].pad_value == tuple(cfg.MODEL.PIXEL_MEAN)
    (test_time,) = build_augmentations(cfg, is_train=False)
    assert isinstance(test_time, FitLongerSide) and test_time.size == 640


def test_config_keys():
    cfg = make_config(
        POLICY="S4",
        IMAGE_SIZE=96,
        SCALE_RANGE=(0.1, 1.9),
        RANDAUGMENT_LAYERS=2,
        RANDAUGMENT_MAGNITUDE=15.0,
        MIN_BOX_AREA_FRACTION=0.3,
        SCALE_PIXEL_LENGTHS=False,
    )
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 200
    rand, _, crop = build_augmentations(cfg, True)
    assert (rand.layers, rand.magnitude) == (2, 15.0)
    assert rand.settings.image_format == "RGB" and not rand.settings.scale_lengths
    assert rand.settings.min_area_fraction == crop.min_area_fraction == 0.3
    assert rand.settings.ignore_label == crop.ignore_label == 200
    assert crop.size == 96 and crop.scale_range == (0.1, 1.9)
    for version in ("v0", "v1"):
        auto = build_augmentations(make_config(POLICY="S2", AUTOAUGMENT=version), True)[0]
        assert auto.policy == AUTOAUGMENT_POLICIES[version]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"POLICY": "S5"}, r"POLICY is 'S5', which is not registered; known are .*S1, S2, S3, S4"),
        ({"POLICY": "S2", "AUTOAUGMENT": "v7"}, r"AUTOAUGMENT is 'v7'; known are v0, v1"),
        ({"SCALE_RANGE": (2.0, 0.5)}, r"SCALE_RANGE \(2.0, 0.5\)"),
        ({"IMAGE_SIZE": 0}, r"IMAGE_SIZE 0"),
        ({"MIN_BOX_AREA_FRACTION": 10.0}, r"MIN_BOX_AREA_FRACTION is 10.0"),
        ({"POLICY": "S4", "RANDAUGMENT_MAGNITUDE": -1.0}, r"level -1.0"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(InputError, match=message):
        build_augmentations(make_config(**changes), is_train=True)


def test_unknown_image_format():
    cfg = make_config()
    cfg.INPUT.FORMAT = "YUV-BT.601"
    with pytest.raises(InputError, match=r"INPUT\.FORMAT is 'YUV-BT\.601'"):
        build_augmentations(cfg, True)


def test_the_documented_policy_of_ones_own():
    """The example in docs/augmentation.md, as it stands there."""
    text = (Path(__file__).parents[3] / "docs" / "augmentation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(@AUGMENTATION_REGISTRY.*?)```", text, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 5
    try:
        exec(code, {"T": T, **vars(augmentation)})
        cfg = make_config(POLICY="Aerial", IMAGE_SIZE=32)
        chain = T.AugmentationList(build_augmentations(cfg, True))
        image = np.zeros((40, 40, 3), np.uint8)
        flipped = 0
        np.random.seed(0)
        for _ in range(60):
            sample = T.AugInput(image, boxes=np.array([[0.0, 0, 40, 20]]))
            drawn = chain(sample)
            assert sample.image.shape == (32, 32, 3)
            flipped += any(isinstance(t, VFlipTransform) for t in drawn.transforms)
        assert 15 < flipped < 45
        (resize,) = build_augmentations(cfg, False)
        assert resize.size == 32
    finally:
        AUGMENTATION_REGISTRY._obj_map.pop("Aerial", None)


def own_policy(augmentations):
    """A context manager: the policy "Own" gives what ``augmentations(cfg, is_train)`` does."""

    @contextlib.contextmanager
    def registered():
        AUGMENTATION_REGISTRY._do_register("Own", augmentations)
        try:
            yield make_config(POLICY="Own")
        finally:
            AUGMENTATION_REGISTRY._obj_map.pop("Own", None)

    return registered()


#: (height, width)
TEST_IMAGES = [(64, 64), (40, 90), (90, 40), (37, 101), (480, 640), (5, 100), (1, 1)]


@pytest.mark.parametrize("height, width", TEST_IMAGES)
def test_detectron2s_mapper_sees_our_test_images(height, width, tmp_path):
    """Pixel for pixel, at any size of ours, once the config says it in detectron2's keys."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg"):
        cv2.imwrite(str(tmp_path / name), pixels)
    for size in (33, 64, 96, 640):
        for policy, image_format in (("S1", "RGB"), ("S4", "BGR")):
            cfg = make_config(POLICY=policy, IMAGE_SIZE=size)
            cfg.INPUT.FORMAT = image_format
            written = cfg.clone()
            assert set_test_size(written)
            assert (size, size) == (written.INPUT.MIN_SIZE_TEST, written.INPUT.MAX_SIZE_TEST)
            ours, theirs = SelfTrainingDatasetMapper(cfg, False), DatasetMapper(written, False)
            for name in ("a.png", "b.jpg"):
                record = {"file_name": str(tmp_path / name), "height": height, "width": width}
                expected = theirs(dict(record))["image"]
                assert max(expected.shape) == size
                np.testing.assert_array_equal(ours(record)["image"], expected)


def test_a_policy_may_resize_test_images_by_detectron2s_keys(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((30, 100, 3), np.uint8))
    with own_policy(build_augmentation) as cfg:
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 60, 150
        written = cfg.clone()
        assert set_test_size(written) and written == cfg
        record = {"file_name": str(tmp_path / "a.png"), "height": 30, "width": 100}
        assert SelfTrainingDatasetMapper(cfg, False)(record)["image"].shape == (3, 45, 150)
        # test-time augmentation scales these as it scales IMAGE_SIZE
        cfg.SELFTRAIN.TTA.SCALES = (0.5, 2.0)
        views = [view.get_transform for (view,) in (v.augs for v in scale_augmentations(cfg))]
        image = np.zeros((30, 100, 3), np.uint8)
        assert [v(image).apply_image(image).shape for v in views] == [(23, 75, 3), (90, 300, 3)]
        # and labels of another size are another teacher's
        before = teacher_config_sha256(cfg)
        cfg.INPUT.MIN_SIZE_TEST = 61
        assert teacher_config_sha256(cfg) != before


def test_test_sizes_that_do_not_matter_do_not_count():
    """S1 to S4 have a size of their own: a config as it was written gives the same labels."""
    cfg = make_config(IMAGE_SIZE=96)
    before = teacher_config_sha256(cfg)
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 96
    assert teacher_config_sha256(cfg) == before


def test_test_images_as_they_are():
    with own_policy(lambda cfg, is_train: []) as cfg:
        assert set_test_size(cfg)
        image = np.zeros((30, 100, 3), np.uint8)
        (resize,) = build_augmentation(cfg, is_train=False)
        assert resize.get_transform(image).apply_image(image).shape == image.shape


@pytest.mark.parametrize(
    "augmentations",
    [
        [T.Resize((64, 64))],
        [T.ResizeShortestEdge([64, 80], 100, "choice")],
        [T.ResizeShortestEdge(64, 100, interp=Image.NEAREST)],
        [T.ResizeShortestEdge(64, 100), T.FixedSizeCrop((64, 64))],
    ],
)
def test_what_detectron2s_keys_cannot_say(augmentations):
    with own_policy(lambda cfg, is_train: augmentations) as cfg:
        before = cfg.clone()
        assert not set_test_size(cfg) and cfg == before


@pytest.mark.parametrize(
    "policy, version, number", [("S4", "v0", 5000), ("S3", "v1", 1500), ("S2", "v0", 500)]
)
def test_a_whole_chain_keeps_boxes_inside_and_masks_with_them(policy, version, number):
    """Any image size, any boxes: nothing is NaN, negative or outside, and no pixel leaves its label."""
    size = 48
    cfg = make_config(
        POLICY=policy, AUTOAUGMENT=version, IMAGE_SIZE=size, RANDAUGMENT_LAYERS=2, MIN_BOX_AREA_FRACTION=0.0
    )
    chain = T.AugmentationList(build_augmentations(cfg, True))
    rng = np.random.default_rng(0)
    np.random.seed(0)
    for draw in range(number):
        height, width = rng.integers(1, 70, 2)
        boxes = random_boxes(rng, draw % 4, height, width)
        if draw % 4:
            x0, y0, x1, y1 = boxes[0] = np.rint(boxes[0])
        image = np.full((height, width, 3), 77, np.uint8)
        labels = np.zeros((height, width), np.uint8)
        sample = T.AugInput(image, boxes=boxes.copy(), sem_seg=labels)
        transforms = chain(sample)
        assert sample.image.shape == (size, size, 3) and sample.image.dtype == np.uint8
        assert sample.boxes.shape == boxes.shape and np.isfinite(sample.boxes).all()
        assert (sample.boxes >= 0).all() and (sample.boxes <= size).all()
        assert (sample.boxes[:, :2] <= sample.boxes[:, 2:]).all()
        assert set(np.unique(sample.sem_seg)) <= {0, 255}
        if draw % 4 and not any(type(t).__name__ == "BoxOnlyTransform" for t in transforms.transforms):
            mask = np.zeros((height, width), bool)
            mask[int(y0) : int(y1), int(x0) : int(x1)] = True
            moved = transforms.apply_segmentation(mask)
            if moved.any():
                rows, columns = np.flatnonzero(moved.any(1)), np.flatnonzero(moved.any(0))
                found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                # Nearest neighbours are off by half a pixel of the source.
                slack = 2 + max(transforms.transforms[-1].scale)
                assert (sample.boxes[0, :2] <= found[:2] + slack).all()
                assert (sample.boxes[0, 2:] >= found[2:] - slack).all()
                assert (moved & (sample.sem_seg == 255)).sum() == 0


@pytest.mark.parametrize("policy", ["S1", "S2", "S3", "S4"])
def test_in_detectron2s_own_mapper(policy, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    square = [10.0, 10, 50, 10, 50, 50, 10, 50]
    record = {
        "file_name": str(tmp_path / "a.png"),
        "height": 60,
        "width": 80,
        "annotations": [
            {
                "bbox": [10, 10, 40, 40],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 1,
                "segmentation": [square],
                "keypoints": [20.0, 20, 2, 60, 55, 2],
            }
        ],
    }
    cfg = make_config(POLICY=policy, IMAGE_SIZE=64)
    mapper = DatasetMapper(
        True,
        augmentations=build_augmentations(cfg, True),
        image_format="BGR",
        use_instance_mask=True,
        use_keypoint=True,
        keypoint_hflip_indices=np.array([1, 0]),
    )
    np.random.seed(0)
    kept = 0
    for _ in range(40):
        sample = mapper(record)
        assert sample["image"].shape == (3, 64, 64)
        instances = sample["instances"]
        kept += len(instances)
        boxes = instances.gt_boxes.tensor.numpy()
        assert (boxes >= 0).all() and (boxes <= 64).all()
        if len(instances):
            hull = instances.gt_masks.get_bounding_boxes().tensor.numpy()
            assert (hull[:, :2] >= boxes[:, :2] - 1e-3).all() and (hull[:, 2:] <= boxes[:, 2:] + 1e-3).all()
    assert kept > 20
