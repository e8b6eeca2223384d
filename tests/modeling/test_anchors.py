"""Which boxes a detector reaches, against brute force over every anchor, and against detectron2's own matching."""

import numpy as np
import pytest
import torch
from conftest import small_rcnn_config
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    DefaultAnchorGenerator,
    build_anchor_generator,
)
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, pairwise_iou

from selftrain_d2 import add_selftrain_config
from selftrain_d2.engine.checks import build_without_memory
from selftrain_d2.modeling.anchors import AnchorLevel, Anchors, Locations, matched_by
from selftrain_d2.modeling.meta_arch import SelfTrainingFCOS


def random_boxes(number, size, seed=0):
    """(N, 4): from thin to whole-image boxes, many at the borders."""
    rng = np.random.default_rng(seed)
    sides = size * 2.0 ** rng.uniform(-6, 0, (number, 2))
    corners = rng.uniform(-0.3, 1, (number, 2)).clip(0) * (size - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def iou(box, anchors):
    low, high = np.maximum(box[:2], anchors[:, :2]), np.minimum(box[2:], anchors[:, 2:])
    both = (high - low).clip(0).prod(1)
    return both / ((box[2:] - box[:2]).prod() + (anchors[:, 2:] - anchors[:, :2]).prod(1) - both)


def every_anchor(strides, sizes, ratios, offset, side):
    """(R, 4): written out by hand, location by location."""
    anchors = []
    for stride, level in zip(strides, sizes):
        places = (np.arange(-(-side // stride)) + offset) * stride
        for y in places:
            for x in places:
                for size in level:
                    for ratio in ratios:  # height / width
                        width, height = size / ratio**0.5, size * ratio**0.5
                        anchors.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return np.array(anchors)


def retinanet_config(**options):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SelfTrainingRetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_efficientnet_fpn_backbone"
    cfg.MODEL.EFFICIENTNET.NAME, cfg.MODEL.EFFICIENTNET.NORM = "efficientnet-b0", "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    for key, value in options.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.fixture(scope="module")
def model():
    return build_without_memory(retinanet_config())


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_best_iou_is_that_of_brute_force(model, offset):
    sizes, ratios = [[13, 20], [30, 41], [60, 83], [120, 150], [230, 300]], [0.4, 1.0, 2.0]
    cfg = retinanet_config(
        MODEL__ANCHOR_GENERATOR__SIZES=sizes,
        MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=[ratios],
        MODEL__ANCHOR_GENERATOR__OFFSET=offset,
    )
    anchors = matched_by(cfg, model)
    boxes = random_boxes(300, 150)
    painted = every_anchor([8, 16, 32, 64, 128], sizes, ratios, offset, 160)  # padded to whole pixels of P5
    expected = [iou(box, painted).max() for box in boxes]
    np.testing.assert_allclose(anchors.best_iou(boxes, 150), expected, atol=1e-5)


def test_reached_is_positive_by_overlap_in_detectron2(model):
    """Without the force that makes every box's best anchor positive."""
    cfg = retinanet_config()
    shapes = [ShapeSpec(stride=s, channels=16) for s in (8, 16, 32, 64, 128)]
    features = [torch.zeros(1, 1, -(-128 // shape.stride), -(-128 // shape.stride)) for shape in shapes]
    anchors = Boxes.cat(build_anchor_generator(cfg, shapes)(features))
    matcher = Matcher(cfg.MODEL.RETINANET.IOU_THRESHOLDS, cfg.MODEL.RETINANET.IOU_LABELS)
    boxes = random_boxes(200, 128, seed=1)
    expected = [
        bool((matcher(pairwise_iou(Boxes(torch.tensor(box[None]).float()), anchors))[1] == 1).any())
        for box in boxes
    ]
    assert 20 < sum(expected) < 180
    assert matched_by(cfg, model).reached(boxes, 128).tolist() == expected


def test_an_rpn_reaches_what_is_not_its_background():
    cfg = small_rcnn_config("SelfTrainingGeneralizedRCNN", MODEL__BACKBONE__FREEZE_AT=0)
    anchors = matched_by(cfg, build_without_memory(cfg))
    assert [level.stride for level in anchors.levels] == [4, 8, 16, 32, 64]
    assert anchors.iou_threshold == cfg.MODEL.RPN.IOU_THRESHOLDS[0] == 0.3
    # A square on an anchor's place of 0.6 times its side: IoU 0.36; of half its side: 0.25.
    boxes = np.array([[50 - s / 2, 50 - s / 2, 50 + s / 2, 50 + s / 2] for s in (0.6 * 32, 0.5 * 32)])
    anchors = Anchors([AnchorLevel(4, np.array([[-14.0, -14, 18, 18]]))], anchors.iou_threshold)
    assert anchors.reached(boxes, 96).tolist() == [True, False]


class _Levels(Backbone):
    """A backbone of which FCOS looks at the strides alone."""

    def output_shape(self):
        return {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(3, 8)}

    def forward(self, images):
        raise NotImplementedError


def fcos(radius):
    head = RetinaNetHead(input_shape=[ShapeSpec(channels=8)] * 5, num_classes=2, conv_dims=[8], num_anchors=1)
    return SelfTrainingFCOS(
        backbone=_Levels(),
        head=head,
        num_classes=2,
        center_sampling_radius=radius,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )


@pytest.mark.parametrize("radius", [0.4, 1.5])
def test_fcos_takes_the_boxes_that_its_own_matching_does(radius):
    model = fcos(radius)
    locations = matched_by(get_cfg(), model)
    assert isinstance(locations, Locations)
    boxes = random_boxes(300, 256, seed=2)
    grid = model.anchor_generator([torch.zeros(1, 1, 256 // s, 256 // s) for s in (8, 16, 32, 64, 128)])
    expected = (model._match_anchors(Boxes(torch.tensor(boxes).float()), grid) > 0).any(1)
    assert 0 < expected.sum() < 300
    assert locations.reached(boxes, 256).tolist() == expected.tolist()


def test_nothing_is_known_of_other_detectors(model):
    cfg = retinanet_config()
    assert matched_by(cfg, torch.nn.Linear(1, 1)) is None
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    assert matched_by(cfg, model) is None

    class Irregular(DefaultAnchorGenerator):
        def _grid_anchors(self, grid_sizes):
            return [anchors * 1.5 for anchors in super()._grid_anchors(grid_sizes)]

    try:
        ANCHOR_GENERATOR_REGISTRY.register(Irregular)
        cfg.MODEL.ANCHOR_GENERATOR.NAME = "Irregular"
        assert matched_by(cfg, model) is None
    finally:
        del ANCHOR_GENERATOR_REGISTRY._obj_map["Irregular"]


def test_scaled_anchors_are_those_of_scaled_sizes(model):
    sizes = ([[32], [64], [128], [256], [512]], [[8], [16], [32], [64], [128]])
    large, small = (
        matched_by(
            retinanet_config(MODEL__ANCHOR_GENERATOR__OFFSET=0.5, MODEL__ANCHOR_GENERATOR__SIZES=s), model
        )
        for s in sizes
    )
    for ours, theirs in zip(large.scaled(0.25).levels, small.levels):
        np.testing.assert_allclose(ours.first, theirs.first, atol=1e-3)


def test_no_box_is_no_fault():
    anchors = Anchors([AnchorLevel(8, np.array([[-8.0, -8, 8, 8]]))], 0.5)
    assert anchors.reached(np.zeros((0, 4)), 64).shape == (0,)
