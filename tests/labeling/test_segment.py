"""Pixels labeled in strips against the plain way: everything at the size of the image, one view after another."""

import numpy as np
import pytest
import torch
from conftest import small_rcnn_config
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from selftrain_d2 import InputError
from selftrain_d2.data.augmentation import build_augmentations
from selftrain_d2.data.mapper import image_to_tensor
from selftrain_d2.data.scaled_images import scale_augmentations
from selftrain_d2.labeling import segment
from selftrain_d2.labeling.inference import make_sample
from selftrain_d2.labeling.segment import (
    SegmentationTeacher,
    label_pixels,
    makes_masks,
    mean_probabilities,
    resized_rows,
)

SIDES = st.integers(1, 40)


def _naive(logits, size):
    """(K, H, W): each view enlarged as a whole."""
    whole = [F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0].softmax(0) for x in logits]
    return torch.stack(whole).mean(0)


def _assert_labels(labels, probabilities):
    """The labels are the arg-max and its percentage, but where rounding may decide."""
    scores, best = probabilities.max(0)
    second = probabilities.topk(2, dim=0).values[1] if len(probabilities) > 1 else torch.zeros_like(scores)
    clear = (scores - second > 1e-5).numpy()
    np.testing.assert_array_equal(labels.classes[clear], best.numpy()[clear])
    percent = 100 * scores.numpy().astype(np.float64)
    assert (np.abs(labels.percents + 0.5 - percent) <= 0.5 + 1e-3).all()


@settings(max_examples=200, deadline=None)
@given(h=SIDES, w=SIDES, height=SIDES, width=SIDES, cut=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_rows_are_those_of_the_whole(h, w, height, width, cut):
    image = torch.randn(3, h, w)
    top, bottom = sorted(int(c * height) for c in cut)
    top = min(top, height - 1)
    bottom = max(bottom, top + 1)
    whole = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0]
    rows = resized_rows(image, (height, width), top, bottom)
    # Float32 rounds a row's place by 1e-7 of the height, which weighs differences between rows of up to six.
    torch.testing.assert_close(rows, whole[:, top:bottom], atol=5e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4),
    size=st.tuples(SIDES, SIDES),
    classes=st.integers(1, 5),
    strip=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_strips_are_the_whole(sizes, size, classes, strip, seed):
    torch.manual_seed(seed)
    logits = [3 * torch.randn(classes, h, w) for h, w in sizes]
    expected = _naive(logits, size)
    torch.testing.assert_close(mean_probabilities(logits, size, 0, size[0]), expected, atol=1e-5, rtol=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "STRIP_NUMBERS", strip)
        _assert_labels(label_pixels(logits, size), expected)


class _Painter(torch.nn.Module):
    """A segmentor whose logits follow colours and places: so resizing, and left and right, matter.

    Like detectron2's, it answers at ``height`` x ``width`` where the input has them.
    """

    def __init__(self):
        super().__init__()
        self.shapes, self.batches = [], []

    def forward(self, inputs):
        self.batches.append(len(inputs))
        outputs = []
        for x in inputs:
            image = x["image"].float() / 60
            self.shapes.append(tuple(image.shape[1:]))
            ramp = torch.linspace(-1, 1, image.shape[2]).expand(image.shape[1:])[None]
            logits = torch.cat([image, 3 * ramp * image[:1]])
            size = x.get("height", image.shape[1]), x.get("width", image.shape[2])
            outputs.append(
                {"sem_seg": F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]}
            )
        return outputs


@pytest.fixture
def image():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (57, 83, 3), dtype=np.uint8)


def _config(small_config, scales=(1.0,), flip=False):
    small_config.SELFTRAIN.TTA.SCALES, small_config.SELFTRAIN.TTA.FLIP = scales, flip
    small_config.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    return small_config


def _sample(cfg, image):
    return make_sample("a", image, scale_augmentations(cfg))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)])
def test_views_against_a_plain_loop(small_config, image, scales, flip):
    cfg, model = _config(small_config, scales, flip), _Painter()
    (labels,) = SegmentationTeacher(cfg, model)([_sample(cfg, image)])
    assert len(model.shapes) == len(scales) * (1 + flip)

    probabilities = []
    for scale in scales:
        scaled = cfg.clone()
        scaled.INPUT.AUGMENTATION.IMAGE_SIZE = round(96 * scale)
        view = T.AugInput(image)
        T.AugmentationList(build_augmentations(scaled, is_train=False))(view)
        assert max(view.image.shape) == round(96 * scale)
        for mirror in (False, True)[: 1 + flip]:
            pixels = view.image[:, ::-1].copy() if mirror else view.image
            (output,) = model([{"image": image_to_tensor(pixels)}])
            logits = output["sem_seg"].flip(-1) if mirror else output["sem_seg"]
            probabilities.append(_naive([logits], image.shape[:2]))
    _assert_labels(labels, torch.stack(probabilities).mean(0))
    assert len(np.unique(labels.classes)) == 4 and labels.percents.min() < 50 < labels.percents.max()


def test_one_view_is_the_segmentors_own_inference(small_config, image):
    cfg, model = _config(small_config), _Painter()
    sample = _sample(cfg, image)
    (labels,) = SegmentationTeacher(cfg, model)([sample])
    (output,) = model([{"image": sample["images"][0], "height": 57, "width": 83}])
    _assert_labels(labels, output["sem_seg"].softmax(0))


def test_memory_limits_how_many_images_go_together(small_config, image, monkeypatch):
    cfg, model = _config(small_config, (1.0, 0.5)), _Painter()
    samples = [_sample(cfg, np.roll(image, i, axis=1)) for i in range(5)]
    expected = list(SegmentationTeacher(cfg, model)(samples))
    assert model.batches == [5, 5]
    one_image = 4 * sum(x[0].numel() for x in samples[0]["images"])
    monkeypatch.setattr(segment, "LOGIT_NUMBERS", 2 * one_image)
    model.batches.clear()
    for labels, other in zip(SegmentationTeacher(cfg, model)(samples), expected):
        np.testing.assert_array_equal(labels.classes, other.classes)
    assert model.batches == [2, 2, 2, 2, 1, 1]


def test_too_many_classes(small_config):
    small_config.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 256
    with pytest.raises(InputError, match="NUM_CLASSES is 256: pseudo masks can have 1 to 255"):
        SegmentationTeacher(small_config, _Painter())


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("SemanticSegmentor", True),
        ("SelfTrainingSegmentor", True),
        ("PanopticFPN", False),
        ("GeneralizedRCNN", False),
    ],
)
def test_which_teachers_label_pixels(architecture, expected):
    """PanopticFPN has a semantic head too, but its pseudo labels are boxes with masks."""
    assert makes_masks(build_model(small_rcnn_config(architecture))) == expected
