"""AutoAugment and RandAugment: the tables as published, and how they are drawn from."""

from collections import Counter

import numpy as np
import pytest
from fvcore.transforms.transform import NoOpTransform

from selftrain_d2.data.augmentation.box_only import BoxOnlyTransform
from selftrain_d2.data.augmentation.geometric import AffineTransform
from selftrain_d2.data.augmentation.ops import OPERATION_NAMES
from selftrain_d2.data.augmentation.pixel import PixelTransform
from selftrain_d2.data.augmentation.policies import (
    AUTOAUGMENT_POLICIES,
    RANDAUGMENT_OPERATIONS,
    AutoAugment,
    RandAugment,
)
from selftrain_d2.errors import InputError

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
BOXES = np.array([[8.0, 8, 40, 40]])


def what(transform):
    """A drawn transform's kind: the function of a pixel operation, the shape of a matrix."""
    if isinstance(transform, NoOpTransform):
        return "nothing"
    if isinstance(transform, PixelTransform):
        return transform.function.__name__
    if isinstance(transform, BoxOnlyTransform):
        return f"inside boxes: {what(transform.transforms[0])}"
    (_, b, dx), (c, _, _) = transform.matrix
    if b and c:
        return "rotation"
    return "shear_x" if b else "shear_y" if c else "translation_x" if dx else "translation_y"


def test_tables_have_the_published_sizes_and_known_operations():
    assert [len(AUTOAUGMENT_POLICIES[v]) for v in ("v0", "v1")] == [5, 20]
    assert AUTOAUGMENT_POLICIES["v1"][:5] == AUTOAUGMENT_POLICIES["v0"]
    for policy in AUTOAUGMENT_POLICIES.values():
        for sub_policy in policy:
            assert len(sub_policy) == 2
            for name, prob, level in sub_policy:
                assert name in OPERATION_NAMES and 0 <= prob <= 1 and 0 <= level <= 10
    assert len(set(RANDAUGMENT_OPERATIONS)) == 16


def test_v0_draws_what_its_table_says():
    augment = AutoAugment(AUTOAUGMENT_POLICIES["v0"])
    np.random.seed(0)
    number = 6000
    drawn = Counter(
        tuple(what(t) for t in augment.get_transform(IMAGE, BOXES).transforms) for _ in range(number)
    )
    share = {kinds: count / number for kinds, count in drawn.items()}
    # Products of a fifth, the probability of the first operation and that of the second.
    expected = {
        ("translation_x", "equalize"): 0.2 * 0.6 * 0.8,
        ("translation_x", "nothing"): 0.2 * 0.6 * 0.2,
        ("nothing", "equalize"): 0.2 * 0.4 * 0.8,
        ("inside boxes: translation_y", "cutout"): 0.2 * (0.2 / 3) * 0.8,
        ("nothing", "cutout"): 0.2 * (1 - 0.2 / 3) * 0.8,
        ("shear_y", "inside boxes: translation_y"): 0.2 * (0.6 / 3),
        ("shear_y", "nothing"): 0.2 * (1 - 0.6 / 3),
        ("rotation", "color"): 0.2 * 0.6,
        ("nothing", "color"): 0.2 * 0.4,
    }
    for kinds, probability in expected.items():
        assert share.get(kinds, 0) == pytest.approx(probability, abs=0.02), kinds
    # ShearX has level 0 in the table: it never does anything.
    assert not any("shear_x" in kinds or "sharpness" in kinds for kinds in share)


def test_every_randaugment_operation_is_drawn_equally_often():
    augment = RandAugment(layers=2, magnitude=7)
    np.random.seed(0)
    drawn = Counter(what(t) for _ in range(4000) for t in augment.get_transform(IMAGE, BOXES).transforms)
    assert len(drawn) == 16
    for count in drawn.values():
        assert count / 8000 == pytest.approx(1 / 16, abs=0.012)


def test_layers_and_magnitude():
    assert len(RandAugment(3, 10).get_transform(IMAGE).transforms) == 3
    assert RandAugment(0, 10).get_transform(IMAGE).transforms == []
    np.random.seed(0)
    only_rotation = RandAugment(1, 15, names=("Rotate_BBox",)).get_transform(IMAGE)
    angle = np.degrees(np.arccos(only_rotation.transforms[0].matrix[0, 0]))
    assert angle == pytest.approx(45)


def test_operations_inside_boxes_follow_the_boxes_the_operation_before_moved():
    augment = AutoAugment([[("TranslateX_BBox", 1.0, 1), ("Equalize_Only_BBoxes", 1.0, 0)]])
    np.random.seed(0)
    for _ in range(30):
        first, second = augment.get_transform(np.zeros((640, 640, 3), np.uint8), BOXES + 300).transforms
        if isinstance(second, BoxOnlyTransform):
            assert isinstance(first, AffineTransform)
            assert second.regions[0].tolist() == (first.apply_box(BOXES + 300)[0]).tolist()
            return
    pytest.fail("no operation inside boxes was drawn in 30 draws of probability 1/3")


def test_mistakes():
    with pytest.raises(InputError, match="at least one sub-policy"):
        AutoAugment([])
    with pytest.raises(InputError, match="Unknown operation 'Smear'"):
        AutoAugment([[("Smear", 1.0, 2)]])
    with pytest.raises(InputError, match="0 or more layers"):
        RandAugment(-1)
    with pytest.raises(InputError, match="level -3"):
        RandAugment(1, -3)
