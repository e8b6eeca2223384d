"""Exported files against the models they are of, at shapes that they were not traced with."""

import numpy as np
import pytest
import torch
from conftest import assert_refused, small_rcnn_config
from detectron2.modeling import build_model

from selftrain_d2.cli import main
from selftrain_d2.deployment import export
from selftrain_d2.deployment.exported import exportable, suppressed
from selftrain_d2.errors import InputError


def run_folder(cfg, folder):
    folder.mkdir()
    cfg.MODEL.WEIGHTS = ""
    torch.manual_seed(0)
    model = build_model(cfg)
    if hasattr(model, "head"):  # scores of a new detector are equal but for rounding
        torch.nn.init.normal_(model.head.cls_score.weight, std=0.3)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder)


@pytest.mark.parametrize("weight_format", ["onnx", "torchscript"])
def test_retinanet(weight_format, small_config, tmp_path, capsys):
    file = tmp_path / "out" / "model"
    run = run_folder(small_config, tmp_path / "run")
    assert main(["export-model", run, "--format", weight_format, "--output", str(file)]) == 0
    assert "largest deviation of boxes" in capsys.readouterr().out
    assert [p.name for p in file.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("weight_format", ["onnx", "torchscript"])
def test_segmentor(weight_format, tmp_path, capsys):
    cfg = small_rcnn_config("SelfTrainingSemanticSegmentor", MODEL__BACKBONE__FREEZE_AT=0)
    run = run_folder(cfg, tmp_path / "run")
    file = tmp_path / "model"
    assert main(["export-model", run, "--format", weight_format, "--output", str(file)]) == 0
    assert "share of other classes: 0\n" in capsys.readouterr().out


class Shifted(torch.nn.Module):
    """A function whose boxes depend on whether it is traced: as a trace goes wrong."""

    def __init__(self, function):
        super().__init__()
        self.function, self.outputs = function, function.outputs

    def forward(self, images, score_threshold):
        boxes, scores, classes = self.function(images, score_threshold)
        return (boxes + 1 if torch.jit.is_tracing() else boxes), scores, classes


def test_a_file_that_deviates_is_not_left(small_config, tmp_path, monkeypatch):
    function = Shifted(exportable(build_model(small_config).eval(), "RGB"))
    monkeypatch.setattr(export, "DenseDetection", Shifted)
    with pytest.raises(InputError, match="share of other boxes differ from the model's by 1,"):
        export.write_checked(function, "torchscript", tmp_path / "model.pt", {})
    assert not list(tmp_path.glob("*model*"))


def test_detections_are_those_of_inference(small_config):
    """The batched steps against detectron2's own, image by image; images of two sizes in two batches."""
    small_config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(0)
    model = build_model(small_config).eval()
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.3)
    function = exportable(model, "RGB")
    for shape in ((2, 3, 96, 128), (1, 3, 70, 97)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        with torch.no_grad():
            boxes, scores, classes = function(images, torch.tensor([0.0]))
            expected = model([{"image": image} for image in images])
        for i, output in enumerate(expected):
            instances = output["instances"]
            found = scores[i] > 0
            # detectron2 drops boxes that lie outside of the image altogether
            area = (boxes[i, :, 2:] - boxes[i, :, :2]).prod(1) > 0
            np.testing.assert_allclose(scores[i][found & area], instances.scores, atol=1e-6)
            assert torch.equal(classes[i][found & area], instances.pred_classes)
            np.testing.assert_allclose(boxes[i][found & area], instances.pred_boxes.tensor, atol=1e-3)


def test_suppression_keeps_images_and_classes_apart():
    box = torch.tensor([10.0, 10, 30, 30])
    boxes = box.repeat(2, 3, 1)
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.6, 0.0]])
    classes = torch.tensor([[0, 0, 1], [0, 0, 0]])
    expected = torch.tensor([[0.9, 0.0, 0.7], [0.0, 0.6, 0.0]])
    assert torch.equal(suppressed(boxes, scores, classes, 0.5), expected)


def test_what_cannot_be_exported(small_config, tmp_path, capsys):
    with pytest.raises(InputError, match="SelfTrainingGeneralizedRCNN cannot be exported"):
        exportable(build_model(small_rcnn_config("SelfTrainingGeneralizedRCNN")), "BGR")
    small_config.MODEL.RETINANET.SOFT_NMS_SIGMA = 0.5
    with pytest.raises(InputError, match="Soft-NMS"):
        exportable(build_model(small_config), "RGB")
    command = ["export-model", str(tmp_path), "--format", "onnx", "--output", str(tmp_path / "a.onnx")]
    assert_refused(command, capsys, "no config.yaml", output=tmp_path / "a.onnx")
