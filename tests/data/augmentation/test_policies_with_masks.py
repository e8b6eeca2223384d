"""S1 to S4 on images with label maps: labels are moved, never mixed, and never invented."""

import math
from unittest import mock

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.data.augmentation import build_augmentations
from selftrain_d2.data.augmentation.geometric import ResizeCropPadTransform
from selftrain_d2.data.augmentation.pixel import FILL_VALUE
from selftrain_d2.data.augmentation.policies import RandAugment
from selftrain_d2.data.augmentation.registry import flip_jitter_crop

GEOMETRIC = [
    "Rotate_BBox",
    "ShearX_BBox",
    "ShearY_BBox",
    "TranslateX_BBox",
    "TranslateY_BBox",
]
# Far apart, so that any mixture of two labels would be a third number.
LABELS = np.array([0, 7, 60, 131, 254, 255], np.uint8)
# Far from each other and from what fills: a colour tells its label. The last is that of pixels ignored in the input.
COLOURS = np.array(
    [[250, 20, 20], [20, 250, 20], [20, 20, 250], [250, 250, 20], [20, 250, 250], [250, 20, 250]], np.uint8
)
PAD = (60, 180, 90)


def _config(policy="S4", size=48, **keys):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.INPUT.AUGMENTATION.POLICY, cfg.INPUT.AUGMENTATION.IMAGE_SIZE = policy, size
    cfg.MODEL.PIXEL_MEAN = list(PAD)
    for key, value in keys.items():
        setattr(cfg.INPUT.AUGMENTATION, key, value)
    return cfg


@pytest.mark.parametrize("policy", ["S1", "S2", "S3", "S4"])
@settings(max_examples=150, deadline=None)
@given(
    labels=arrays(
        np.uint8, st.tuples(st.integers(1, 60), st.integers(1, 60)), elements=st.sampled_from(list(LABELS))
    ),
    size=st.integers(1, 64),
    boxes=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_no_label_that_was_not_there(policy, labels, size, boxes, seed):
    """Even of labels that change with every pixel."""
    np.random.seed(seed)
    cfg = _config(policy, size, RANDAUGMENT_LAYERS=2, AUTOAUGMENT="v1")
    image = np.random.randint(0, 256, (*labels.shape, 3), dtype=np.uint8)
    height, width = labels.shape
    sample = T.AugInput(
        image, sem_seg=labels.copy(), boxes=np.array([[0.0, 0, width, height]]) if boxes else np.zeros((0, 4))
    )
    T.AugmentationList(build_augmentations(cfg, is_train=True))(sample)
    assert sample.sem_seg.shape == sample.image.shape[:2] == (size, size)
    assert sample.sem_seg.dtype == np.uint8
    assert set(np.unique(sample.sem_seg)) <= {*np.unique(labels), 255}


@pytest.mark.parametrize("policy", ["S1", "S2", "S3", "S4"])
def test_labels_are_never_resized_but_by_the_nearest(policy):
    """Whatever OpenCV function moves a label map, its interpolation is the nearest one."""
    used = []

    def recording(function):
        def call(array, *arguments, **options):
            if array.ndim == 2:
                used.append(options.get("flags", options.get("interpolation")))
            return function(array, *arguments, **options)

        return call

    np.random.seed(0)
    chain = T.AugmentationList(build_augmentations(_config(policy, AUTOAUGMENT="v1"), is_train=True))
    module = "selftrain_d2.data.augmentation.geometric.cv2"
    with (
        mock.patch(f"{module}.warpAffine", recording(cv2.warpAffine)),
        mock.patch(f"{module}.resize", recording(cv2.resize)),
    ):
        for _ in range(200):
            labels = np.random.choice(LABELS, (40, 50)).astype(np.uint8)
            chain(T.AugInput(np.zeros((40, 50, 3), np.uint8), sem_seg=labels))
    assert len(used) >= 200 and set(used) == {cv2.INTER_NEAREST}


def _blocks(rng, rows, columns):
    """A label map of blocks of 6 to 12 pixels a side, each of one label, and its picture."""
    heights, widths = rng.integers(6, 13, rows), rng.integers(6, 13, columns)
    places = rng.integers(0, len(LABELS), (rows, columns)).repeat(heights, 0).repeat(widths, 1)
    return LABELS[places], COLOURS[places]


def _label_of(image):
    """The label that each pixel's colour tells (255 for a fill), and the distance to that colour."""
    known = np.array([*COLOURS, [FILL_VALUE] * 3, PAD], np.int32)
    labels = np.array([*LABELS, 255, 255])
    distances = np.abs(image[:, :, None].astype(np.int32) - known).max(-1)
    return labels[distances.argmin(-1)], distances.min(-1)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    enlarge=st.floats(1, 2),
    jitter=st.sampled_from([(0.5, 2.0), (0.8, 1.2)]),
    layers=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_image_and_labels_move_together(rows, columns, enlarge, jitter, layers, seed):
    """Away from edges, a pixel's colour tells its label, and colours that fill say that it is ignored."""
    labels, image = _blocks(np.random.default_rng(seed), rows, columns)
    np.random.seed(seed)
    cfg = _config(size=round(enlarge * max(labels.shape)))
    geometry = RandAugment(layers, 10.0, names=GEOMETRIC)
    sample = T.AugInput(image, sem_seg=labels)
    transforms = T.AugmentationList([geometry, *flip_jitter_crop(cfg, jitter)])(sample)
    (resize,) = [t for t in transforms.transforms if isinstance(t, ResizeCropPadTransform)]

    told, distance = _label_of(sample.image)
    # Bilinear resizing mixes the colours of two neighbouring pixels, which lie `scale` apart.
    reach = 2 * math.ceil(max(*resize.scale, 1)) + 3
    kernel = np.ones((reach, reach), np.uint8)
    inside = cv2.erode(sample.sem_seg, kernel) == cv2.dilate(sample.sem_seg, kernel)
    pure = inside & (distance <= 1)
    np.testing.assert_array_equal(sample.sem_seg[pure], told[pure])
    # Not pure: two ways to be ignored side by side (void of the input, and what fills), or slivers that shearing or
    # cropping left and shrinking skips.
    classes = inside & (sample.sem_seg != 255)
    if layers == 0 and classes.sum() > 100:
        assert (pure & classes).sum() > 0.8 * classes.sum()


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(2, 5), columns=st.integers(2, 5), layers=st.integers(0, 2), seed=st.integers(0, 2**31)
)
def test_most_pixels_are_away_from_edges(rows, columns, layers, seed):
    """So that the test above says something: of a map in one colour all pixels can be told."""
    _, image = _blocks(np.random.default_rng(seed), rows, columns)
    labels, image = np.full(image.shape[:2], 60, np.uint8), np.full_like(image, COLOURS[2])
    np.random.seed(seed)
    sample = T.AugInput(image, sem_seg=labels)
    chain = [RandAugment(layers, 10.0, names=GEOMETRIC), *flip_jitter_crop(_config(), (0.5, 2.0))]
    T.AugmentationList(chain)(sample)
    told, distance = _label_of(sample.image)
    clear = distance <= 1
    assert clear.mean() > 0.5
    # One pixel of each edge may be on the other side.
    differs = (told != sample.sem_seg) & clear
    edge = cv2.dilate((sample.sem_seg == 255).astype(np.uint8), np.ones((5, 5))) - (
        cv2.erode((sample.sem_seg == 255).astype(np.uint8), np.ones((5, 5)))
    )
    assert not (differs & (edge == 0)).any()
