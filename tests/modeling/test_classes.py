"""What of a model depends on its classes."""

import pytest
from conftest import small_rcnn_config
from detectron2.modeling import build_model

from selftrain_d2.modeling.classes import number_of_classes, tensors_of_classes


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, ["box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor"]),
        (
            {"MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": "True"},
            ["box_predictor.cls_score", "mask_head.predictor"],
        ),
    ],
)
def test_tensors_of_classes(options, layers):
    cfg = small_rcnn_config("GeneralizedRCNN", MODEL__MASK_ON="True", **options)
    expected = {f"roi_heads.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(tensors_of_classes(cfg, build_model(cfg))) == expected


def test_number_of_classes(small_config):
    sections = {
        "RetinaNet": "RETINANET",
        "SelfTrainingSegmentor": "SEM_SEG_HEAD",
        "SelfTrainingPanopticFPN": "ROI_HEADS",
    }
    for number, (architecture, section) in enumerate(sections.items(), start=7):
        small_config.MODEL.META_ARCHITECTURE = architecture
        small_config.MODEL[section].NUM_CLASSES = number
        assert number_of_classes(small_config) == (f"MODEL.{section}.NUM_CLASSES", number)
    small_config.MODEL.META_ARCHITECTURE = "MyDetector"  # somebody else's, with keys of its own
    assert number_of_classes(small_config) is None
