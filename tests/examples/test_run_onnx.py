"""The example finds what the model finds, in pixels of the photograph."""

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import small_rcnn_config
from detectron2.modeling import build_model
from PIL import Image

from selftrain_d2.deployment.export import write_checked
from selftrain_d2.deployment.exported import exportable


@pytest.fixture
def example():
    file = Path(__file__).parents[2] / "examples" / "run_onnx.py"
    spec = importlib.util.spec_from_file_location("run_onnx", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both(example, cfg, file, **last_layers):
    """What the example and the model find in a photograph of 192 x 96 pixels that a camera wrote on its side."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, deviation in last_layers.items():
        torch.nn.init.normal_(model.get_parameter(name.replace("__", ".")), std=deviation)
    facts = {"classes": ["red", "green"], "image_size": 96, "score_threshold": 0.0}
    write_checked(exportable(model, "RGB"), "onnx", file, facts)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 192, 3), dtype=np.uint8))
    on_its_side = photo.transpose(Image.ROTATE_90)
    on_its_side.getexif()[274] = 6  # turn right to see it upright
    pixels = torch.from_numpy(np.array(photo.resize((96, 48), Image.BILINEAR)).transpose(2, 0, 1))
    with torch.no_grad():
        expected = model([{"image": pixels, "height": 96, "width": 192}])[0]["instances"]
    return example.detect(session, on_its_side), expected


def test_boxes_are_in_pixels_of_the_photograph(example, small_config, tmp_path):
    small_config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    found, expected = both(example, small_config, tmp_path / "a.onnx", head__cls_score__weight=0.3)
    boxes, scores, names, masks = found
    np.testing.assert_allclose(scores[:5], expected.scores[:5], atol=1e-5)
    assert names[0] == ["red", "green"][expected.pred_classes[0]]
    np.testing.assert_allclose(boxes[0], expected.pred_boxes.tensor[0], atol=0.05)
    assert masks is None


def test_masks_are_in_pixels_of_the_photograph(example, tmp_path):
    cfg = small_rcnn_config("SelfTrainingGeneralizedRCNN", MODEL__BACKBONE__FREEZE_AT=0, MODEL__MASK_ON=True)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 60, 40
    found, expected = both(
        example,
        cfg,
        tmp_path / "a.onnx",
        proposal_generator__rpn_head__objectness_logits__weight=0.01,
        roi_heads__box_predictor__cls_score__weight=0.01,
        roi_heads__mask_head__predictor__weight=0.01,
    )
    boxes, scores, _, masks = found
    np.testing.assert_allclose(scores[:5], expected.scores[:5], atol=1e-5)
    np.testing.assert_allclose(boxes[:5], expected.pred_boxes.tensor[:5], atol=0.05)
    true = expected.pred_masks[:5].numpy()
    assert 0.05 < true.mean() < 0.95
    assert np.mean(masks[:5] != true) < 1e-3
