"""Export a trained model: TorchScript or ONNX, for images of any number and size."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from selftrain_d2.deployment.exported import exportable
from selftrain_d2.deployment.image_function import ImageFunction
from selftrain_d2.errors import InputError
from selftrain_d2.files import whole_file
from selftrain_d2.modeling.backbone import fuse_batch_norms
from selftrain_d2.modeling.checkpoint import load_weights, require_complete, require_same_anchors

FORMATS = ("onnx", "torchscript")
#: (N, H, W) of the images that an exported file is checked on.
CHECKED_SHAPES = ((1, 128, 128), (2, 160, 96), (3, 101, 203))
#: What passes: the largest deviation of scores, of boxes in pixels and of masks' probabilities, and the share of boxes
#: without counterpart or of pixels of another class. These two are not 0: among scores that are equal but for rounding,
#: suppression may choose others, and a pixel between two classes may fall to either side.
TOLERANCE = {
    "scores": 1e-3,
    "boxes": 0.1,
    "masks": 1e-2,
    "share of other boxes": 0.05,
    "share of other classes": 1e-3,
}
_TRACED_SHAPE = (2, 3, 96, 128)
_OPSET = 17


def export_model(
    cfg: CfgNode, file_format: str, output: str | os.PathLike, allow_unsafe: bool = False
) -> dict:
    """Write a model's file, after it was checked against the model.

    Args:
        cfg: of the model; MODEL.WEIGHTS are its weights.
        file_format: of FORMATS.
        output: the file; there whole and checked, or not at all.

    Returns:
        The largest deviation of each output, over CHECKED_SHAPES.

    Raises:
        InputError: an unknown kind of model, weights that do not fit, a package that is missing, or a deviation above
            TOLERANCE.
    """
    if file_format == "onnx":
        _require_onnx()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    report = load_weights(model, cfg.MODEL.WEIGHTS, allow_unsafe)
    require_complete(report, cfg.MODEL.WEIGHTS)
    require_same_anchors(report, cfg)
    function = exportable(fuse_batch_norms(model), cfg.INPUT.FORMAT)
    facts = {
        "classes": report.classes or [],
        "image_size": cfg.INPUT.AUGMENTATION.IMAGE_SIZE,
        "score_threshold": function.score_threshold,
    }
    return write_checked(function, file_format, output, facts)


def write_checked(function: ImageFunction, file_format: str, output: str | os.PathLike, facts: dict) -> dict:
    """Write a function to export, after a check; see :func:`export_model`.

    Args:
        function: of :func:`~selftrain_d2.deployment.exported.exportable`.
        facts: what the file is to say of itself, by key, as JSON.
    """
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as temporary:
        write = _write_onnx if file_format == "onnx" else _write_torchscript
        write(function, temporary, facts)
        run = onnx_runner(temporary) if file_format == "onnx" else _torchscript_runner(temporary)
        deviations = _check(function, run)
        for name, largest in deviations.items():
            allowed = TOLERANCE[name]
            if not largest <= allowed:
                raise InputError(
                    f"The exported {name} differ from the model's by {largest:.2g}, more than {allowed}: {output} is "
                    "not written."
                )
    return deviations


def example_inputs(
    function: ImageFunction, shape: Sequence[int], threshold: float = 0.0
) -> tuple[torch.Tensor, ...]:
    """Noise of one seed for a function to export, (N, 3, H, W), and the score threshold where it takes one."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, tuple(shape), dtype=torch.uint8, generator=random)
    return (images, torch.tensor([threshold])) if "boxes" in function.outputs else (images,)


def onnx_runner(file: str | os.PathLike):
    """A function from input arrays to output arrays, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays)))


def _torchscript_runner(file: str | os.PathLike):
    module = torch.jit.load(os.fspath(file))

    @torch.no_grad()
    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        return [value.numpy() for value in module(*map(torch.from_numpy, arrays))]

    return run


@torch.no_grad()
def _check(function: ImageFunction, run) -> dict[str, float]:
    """The largest deviation of each output. With a score threshold of 0 every box takes part, found or not."""
    largest: dict[str, float] = {}
    for images, height, width in CHECKED_SHAPES:
        inputs = example_inputs(function, (images, 3, height, width))
        expected = dict(zip(function.outputs, (value.numpy() for value in function(*inputs))))
        found = dict(zip(function.outputs, run(*(value.numpy() for value in inputs))))
        for name in function.outputs:
            if expected[name].shape != found[name].shape:
                raise InputError(
                    f"The exported {name} have the shape {found[name].shape} for {images} images of {height} x {width} "
                    f"pixels, the model's {expected[name].shape}: the model cannot be exported."
                )
        deviations = {"scores": _largest(expected["scores"] - found["scores"])}
        if "boxes" in function.outputs:
            deviations.update(_box_deviations(expected, found))
        else:
            deviations["share of other classes"] = float(np.mean(expected["classes"] != found["classes"]))
        largest = {name: max(largest.get(name, 0.0), deviation) for name, deviation in deviations.items()}
    return largest


def _box_deviations(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest distance, in pixels, of boxes from their counterparts; the share of boxes that have none; where there
    are masks, the largest difference of theirs.

    A counterpart is of the same image, class and score, at whatever place: equal scores change places.
    """
    near = np.abs(expected["scores"][:, None] - found["scores"][:, :, None]) <= TOLERANCE["scores"]
    near &= expected["classes"][:, None] == found["classes"][:, :, None]
    distances = np.abs(expected["boxes"][:, None] - found["boxes"][:, :, None]).max(3)
    distances = np.where(near, distances, np.inf)  # (N, found, expected)
    real = found["scores"] > 0
    nearest = distances.min(2)
    matched = real & (nearest <= TOLERANCE["boxes"])
    deviations = {
        "boxes": _largest(nearest[matched]),
        "share of other boxes": float((real & ~matched).sum() / max(real.sum(), 1)),
    }
    if "masks" in found:
        counterparts = np.take_along_axis(expected["masks"], distances.argmin(2)[:, :, None, None], axis=1)
        deviations["masks"] = _largest((counterparts - found["masks"])[matched])
    return deviations


def _largest(differences: np.ndarray) -> float:
    return float(np.abs(differences).max(initial=0.0))


def _write_torchscript(function: ImageFunction, file: Path, facts: dict) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constants that are constant
        traced = torch.jit.trace(function, example_inputs(function, _TRACED_SHAPE), check_trace=False)
    torch.jit.save(traced, str(file), _extra_files={"facts.json": json.dumps(facts)})


def _write_onnx(function: ImageFunction, file: Path, facts: dict) -> None:
    import onnx

    inputs = example_inputs(function, _TRACED_SHAPE)
    names = ["images", "score_threshold"][: len(inputs)]
    axes = {0: "batch", 2: "height", 3: "width"}
    of_outputs = (
        {0: "batch", 1: "detections"}
        if "boxes" in function.outputs
        else {0: "batch", 1: "height", 2: "width"}
    )
    # The exporter by tracing: torch.export cannot follow a number of boxes that depends on the image.
    old = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            function,
            inputs,
            str(file),
            input_names=names,
            output_names=list(function.outputs),
            dynamic_axes={"images": axes, **{name: of_outputs for name in function.outputs}},
            opset_version=_OPSET,
            **old,
        )
    written = onnx.load(str(file))
    onnx.helper.set_model_props(written, {key: json.dumps(value) for key, value in facts.items()})
    onnx.checker.check_model(written)
    onnx.save(written, str(file))


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError("ONNX needs onnx and onnxruntime: pip install 'selftrain_d2[export]'.") from error
