"""Exported files against the models they are of, at shapes that they were not traced with."""

import numpy as np
import pytest
import torch
from conftest import assert_refused, small_rcnn_config
from detectron2.modeling import GeneralizedRCNN, build_model

from selftrain_d2.cli import main
from selftrain_d2.deployment import export
from selftrain_d2.deployment.batched import filled, suppressed
from selftrain_d2.deployment.exported import exportable
from selftrain_d2.errors import InputError

#: Standard deviations of last layers: what a new detector finds is equal but for rounding.
SPREAD = {
    "head.cls_score.weight": 0.3,
    "rpn_head.objectness_logits.weight": 0.01,
    "box_predictor.cls_score.weight": 0.01,
    "box_predictor.bbox_pred.weight": 0.001,
    "mask_head.predictor.weight": 0.01,
}


def varied(cfg):
    """A model with random weights whose detections differ from each other."""
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        for ending, deviation in SPREAD.items():
            if name.endswith(ending):
                torch.nn.init.normal_(parameter, std=deviation)
    return model.eval()


def rcnn_config(**options):
    cfg = small_rcnn_config("SelfTrainingGeneralizedRCNN", MODEL__BACKBONE__FREEZE_AT=0, **options)
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 60, 40
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    return cfg


def run_folder(cfg, folder):
    folder.mkdir()
    cfg.MODEL.WEIGHTS = ""
    model = varied(cfg)
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


@pytest.mark.parametrize(("weight_format", "masks"), [("onnx", True), ("torchscript", False)])
def test_rcnn(weight_format, masks, tmp_path, capsys):
    run = run_folder(rcnn_config(MODEL__MASK_ON=masks), tmp_path / "run")
    file = tmp_path / "model"
    assert main(["export-model", run, "--format", weight_format, "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "share of other boxes: 0\n" in printed
    assert ("deviation of masks" in printed) == masks


class Shifted(torch.nn.Module):
    """A function whose boxes depend on whether it is traced: as a trace goes wrong."""

    def __init__(self, function):
        super().__init__()
        self.function, self.outputs = function, function.outputs

    def forward(self, images, score_threshold):
        boxes, scores, classes = self.function(images, score_threshold)
        return (boxes + 1 if torch.jit.is_tracing() else boxes), scores, classes


def test_a_file_that_deviates_is_not_left(small_config, tmp_path):
    function = Shifted(exportable(build_model(small_config).eval(), "RGB"))
    with pytest.raises(InputError, match="share of other boxes differ from the model's by 1,"):
        export.write_checked(function, "torchscript", tmp_path / "model.pt", {})
    assert not list(tmp_path.glob("*model*"))


def test_masks_that_deviate_are_told():
    boxes, scores, classes = np.zeros((1, 2, 4)), np.array([[0.9, 0.8]]), np.array([[0, 1]])
    boxes[0, 1] = 10
    masks = np.zeros((1, 2, 3, 3))
    expected = {"boxes": boxes, "scores": scores, "classes": classes, "masks": masks}
    found = {name: value[:, ::-1].copy() for name, value in expected.items()}  # another order is no deviation
    found["masks"][0, 0, 1, 2] = 0.25  # of expected's second
    assert export._box_deviations(expected, found) == {"boxes": 0, "share of other boxes": 0, "masks": 0.25}
    found["boxes"][0, 0] += 1
    assert export._box_deviations(expected, found) == {"boxes": 0, "share of other boxes": 0.5, "masks": 0}


#: Images of two sizes in two batches.
SHAPES = ((2, 3, 96, 128), (1, 3, 70, 97))


def outputs_of_both(model, image_format="RGB"):
    """The batched steps and detectron2's own, image by image."""
    function = exportable(model, image_format)
    for shape in SHAPES:
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        as_read = images.flip(1) if image_format == "BGR" else images
        with torch.no_grad():
            outputs = dict(zip(function.outputs, function(images, torch.tensor([0.0]))))
            inputs = [{"image": image} for image in as_read]
            if isinstance(model, GeneralizedRCNN):
                expected = model.inference(inputs, do_postprocess=False)  # masks in cells of their boxes
                expected = [found[found.pred_boxes.nonempty()] for found in expected]
            else:
                expected = [output["instances"] for output in model(inputs)]
        for i, instances in enumerate(expected):
            real = outputs["scores"][i] > 0
            assert (outputs["classes"][i][~real] == -1).all()
            yield {name: values[i][real] for name, values in outputs.items()}, instances


def assert_same(outputs, instances):
    np.testing.assert_allclose(outputs["scores"], instances.scores, atol=1e-6)
    assert torch.equal(outputs["classes"], instances.pred_classes)
    np.testing.assert_allclose(outputs["boxes"], instances.pred_boxes.tensor, atol=1e-3)


def test_dense_detections_are_those_of_inference(small_config):
    small_config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    for outputs, instances in outputs_of_both(varied(small_config)):
        assert_same(outputs, instances)


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_regions_are_those_of_inference(class_agnostic):
    cfg = rcnn_config(
        MODEL__MASK_ON=True,
        MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0,
        MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=class_agnostic,
        MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=class_agnostic,
        MODEL__ROI_HEADS__IN_FEATURES=["p3"] if class_agnostic else ["p2", "p3", "p4", "p5"],
    )
    for outputs, instances in outputs_of_both(varied(cfg), "BGR"):
        assert len(instances) == cfg.TEST.DETECTIONS_PER_IMAGE
        assert_same(outputs, instances)
        np.testing.assert_allclose(outputs["masks"], instances.pred_masks[:, 0], atol=1e-5)


def test_boxes_outside_of_the_image_become_filling():
    boxes = torch.tensor([[[0.0, 5, 0, 9], [1, 1, 3, 3], [2, 2, 4, 4], [5, 5, 6, 6]]])
    found = filled(boxes, torch.tensor([[0.9, 0.8, 0.7, 0.0]]), torch.tensor([[0, 1, 2, 3]]))
    assert torch.equal(found[0][0, :2], boxes[0, 1:3])
    assert found[1].tolist() == [[pytest.approx(0.8), pytest.approx(0.7), 0, 0]]
    assert found[2].tolist() == [[1, 2, -1, -1]]


def test_suppression_keeps_images_and_classes_apart():
    box = torch.tensor([10.0, 10, 30, 30])
    boxes = box.repeat(2, 3, 1)
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.6, 0.0]])
    classes = torch.tensor([[0, 0, 1], [0, 0, 0]])
    expected = torch.tensor([[0.9, 0.0, 0.7], [0.0, 0.6, 0.0]])
    assert torch.equal(suppressed(boxes, scores, classes, 0.5), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ROI_HEADS__NAME": "CascadeROIHeads"}, "CascadeROIHeads cannot be exported: only StandardROIHeads"),
        ({"KEYPOINT_ON": True}, "KEYPOINT_ON"),
        ({"META_ARCHITECTURE": "SelfTrainingPanopticFPN"}, "SelfTrainingPanopticFPN cannot be exported"),
    ],
)
def test_rcnns_that_cannot_be_exported(options, message):
    options = {f"MODEL__{key}": value for key, value in options.items()}
    model = build_model(rcnn_config(**options, MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True))
    with pytest.raises(InputError, match=message):
        exportable(model, "BGR")


def test_what_cannot_be_exported(small_config, tmp_path, capsys):
    small_config.MODEL.RETINANET.SOFT_NMS_SIGMA = 0.5
    with pytest.raises(InputError, match="Soft-NMS"):
        exportable(build_model(small_config), "RGB")
    command = ["export-model", str(tmp_path), "--format", "onnx", "--output", str(tmp_path / "a.onnx")]
    assert_refused(command, capsys, "no config.yaml", output=tmp_path / "a.onnx")
