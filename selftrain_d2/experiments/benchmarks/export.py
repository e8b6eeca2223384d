"""The small RetinaNet of the demo (EfficientNet-Lite0 at 256 pixels): PyTorch beside its exported files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from selftrain_d2.config import CONFIGS, add_selftrain_config
from selftrain_d2.deployment.export import onnx_runner, write_checked
from selftrain_d2.deployment.exported import exportable
from selftrain_d2.experiments.benchmarks.timing import markdown_table, ratio, spread, time_in_turns
from selftrain_d2.modeling.backbone import fuse_batch_norms

CONFIG, SIZE, BATCH = "neon_trees/lite0_256.yaml", 256, 1


def run(rounds: int) -> dict[str, Any]:
    """Time detection in one image on one CPU thread, from pixels to boxes; random weights, no box above the threshold.

    "PyTorch" is the model as evaluation runs it, "PyTorch, fused" with batch norms folded and in batches.

    Args:
        rounds: how often each is measured.

    Returns:
        ``table`` (Markdown), ``speed`` (images per second) and ``time_ratio`` (time / PyTorch's), each with the median,
        smallest and largest of the rounds.

    Raises:
        InputError: a package is missing.
    """
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.merge_from_file(str(CONFIGS / CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    function = exportable(fuse_batch_norms(model), cfg.INPUT.FORMAT)
    images = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    threshold = torch.tensor([model.test_score_thresh])
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("onnx", "torchscript")}
        for name, file in files.items():
            write_checked(function, name, file, {})
        runtime = onnx_runner(files["onnx"])
        script = torch.jit.load(str(files["torchscript"]))
    arrays = images.numpy(), threshold.numpy()
    script(images, threshold)  # TorchScript compiles in its first two calls
    contestants = {
        "PyTorch": lambda: model([{"image": image} for image in images]),
        "PyTorch, fused": lambda: function(images, threshold),
        "TorchScript": lambda: script(images, threshold),
        "ONNX Runtime": lambda: runtime(*arrays),
    }
    with torch.no_grad():
        speeds = time_in_turns(contestants, BATCH, rounds)
    ratios = {name: ratio(speeds, "PyTorch", name) for name in contestants}
    rows = [
        [
            name,
            f"{spread(speeds[name])['median']:.1f}",
            "{median:.2f} ({min:.2f} - {max:.2f})".format(**ratios[name]),
        ]
        for name in contestants
    ]
    return {
        "table": markdown_table([f"Lite0, {SIZE} px", "images/s", "time / PyTorch's"], rows),
        "speed": {name: spread(values) for name, values in speeds.items()},
        "time_ratio": ratios,
    }
