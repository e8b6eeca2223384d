"""The example finds what the model finds, in pixels of the photograph."""

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from detectron2.modeling import build_model
from PIL import Image

from selftrain_d2.deployment.export import write_checked
from selftrain_d2.deployment.exported import exportable


def test_boxes_are_in_pixels_of_the_photograph(small_config, tmp_path):
    spec = importlib.util.spec_from_file_location("run_onnx", Path("examples/run_onnx.py").absolute())
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    small_config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(0)
    model = build_model(small_config).eval()
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.3)
    facts = {"classes": ["red", "green"], "image_size": 96, "score_threshold": 0.0}
    write_checked(exportable(model, "RGB"), "onnx", tmp_path / "a.onnx", facts)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 192, 3), dtype=np.uint8))
    boxes, scores, names = example.detect(session, photo)
    pixels = torch.from_numpy(np.array(photo.resize((96, 48), Image.BILINEAR)).transpose(2, 0, 1))
    with torch.no_grad():
        expected = model([{"image": pixels, "height": 96, "width": 192}])[0]["instances"]
    best = expected[:5]
    np.testing.assert_allclose(scores[:5], best.scores, atol=1e-5)
    assert names[0] == ["red", "green"][best.pred_classes[0]]
    np.testing.assert_allclose(boxes[0], best.pred_boxes.tensor[0], atol=0.05)
