"""The tables of docs/model_zoo.md, on standard output: ``python -m selftrain_d2.experiments.model_table [TABLE ...]``.

Runs every backbone, every detector of configs/coco and configs/efficientdet and every segmentation model of
configs/pascal_voc at least once, on one image: many minutes on a CPU, and some gigabytes of memory.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from efficientnet_pytorch import EfficientNet as EfficientNetClassifier
from fvcore.nn import FlopCountAnalysis
from torch import nn

import selftrain_d2  # noqa: F401  (registers every component)
from selftrain_d2.config import CONFIGS, add_selftrain_config
from selftrain_d2.experiments.benchmarks.timing import markdown_table
from selftrain_d2.modeling.backbone import EFFICIENTNET_NAMES, EfficientNet, batch_norm_builder

SIZE = 640

BACKBONES = [name for name in EFFICIENTNET_NAMES if "lite" not in name] + ["efficientnet-lite0"]
# One config of each detector.
DETECTORS = {
    "EfficientNet-B0": "coco/one_gpu/efficientnet_b0_S4.yaml",
    "EfficientNet-B1": "coco/one_gpu/efficientnet_b1_S4.yaml",
    "EfficientNet-B2": "coco/one_gpu/efficientnet_b2_S4.yaml",
    "EfficientNet-B3": "coco/one_gpu/efficientnet_b3_S4.yaml",
    "EfficientNet-B7": "coco/efficientnet_b7/rand_S1.yaml",
    "ResNet-50": "coco/resnet50/rand_S4.yaml",
    "ResNet-101": "coco/resnet101/rand_S1.yaml",
}
# SpineNets, and ResNet-50 beside them: config, and parameters (M) and GFLOPs of 91 classes and milliseconds on a V100
# that [TF]'s model zoo (github.com/tensorflow/tpu, models/official/detection/MODEL_ZOO.md) lists for it.
SPINENETS = {
    "ResNet-50": ("coco/resnet50/rand_S4.yaml", "34.0", "97.0", "23"),
    "SpineNet-49S": ("coco/spinenet/spinenet_49s_S1.yaml", "11.9", "33.8", "19"),
    "SpineNet-49": ("coco/spinenet/spinenet_49_S1.yaml", "28.5", "85.4", "24"),
    "SpineNet-96": ("coco/spinenet/spinenet_96_S1.yaml", "43.0", "265.4", "53"),
    "SpineNet-143": ("coco/spinenet/spinenet_143_S3.yaml", "67.0", "524.0", "97"),
    "SpineNet-190": ("coco/spinenet/spinenet_190_S3.yaml", "163.6", "1885.0", ""),
}
# EfficientDets: config; parameters (M), GFLOPs, AP on COCO val and on test-dev, and milliseconds of one image from the
# file to its boxes on a V100 that [automl]'s README (github.com/google/automl, efficientdet) lists for it.
EFFICIENTDETS = {
    "EfficientDet-D0": ("efficientdet/d0.yaml", "3.9", "2.54", "10.2", "34.3", "34.6"),
    "EfficientDet-D1": ("efficientdet/d1.yaml", "6.6", "6.10", "13.5", "40.2", "40.5"),
    "EfficientDet-D2": ("efficientdet/d2.yaml", "8.1", "11.0", "17.7", "43.5", "43.9"),
    "EfficientDet-D3": ("efficientdet/d3.yaml", "12.0", "24.9", "28.0", "46.8", "47.2"),
    "EfficientDet-D4": ("efficientdet/d4.yaml", "20.7", "55.2", "42.8", "49.3", "49.7"),
    "EfficientDet-D5": ("efficientdet/d5.yaml", "33.7", "130", "72.5", "51.2", "51.5"),
    "EfficientDet-D6": ("efficientdet/d6.yaml", "51.9", "226", "92.8", "52.1", "52.6"),
    "EfficientDet-D7": ("efficientdet/d7.yaml", "51.9", "325", "122", "53.4", "53.7"),
    "EfficientDet-D7x": ("efficientdet/d7x.yaml", "77.0", "410", "153", "54.4", "55.1"),
}
NOT_TIMED = ("EfficientDet-D5", "EfficientDet-D6", "EfficientDet-D7", "EfficientDet-D7x")
# Detectors of more operations are timed once.
TIMED_THRICE_GFLOPS = 100.0
# Segmentation models: config, and parameters (M) and GFLOPs that the paper and its code give for it.
SEGMENTORS = {
    "EfficientNet-B0": ("pascal_voc/one_gpu/efficientnet_b0_S4.yaml", "", ""),
    "EfficientNet-B1": ("pascal_voc/one_gpu/efficientnet_b1_S4.yaml", "", ""),
    "EfficientNet-B2": ("pascal_voc/one_gpu/efficientnet_b2_S4.yaml", "", ""),
    "EfficientNet-B3": ("pascal_voc/one_gpu/efficientnet_b3_S4.yaml", "", ""),
    "EfficientNet-B7": ("pascal_voc/efficientnet_b7/rand_S1.yaml", "71", "60"),
    "EfficientNet-L2": ("pascal_voc/efficientnet_l2/imagenet_plus_plus_S4.yaml", "485", "229"),
}
SEGMENTATION_SIZE = 512
# Folder of configs -> what its table in the paper is about.
FAMILIES = {
    "coco/efficientnet_b7": "EfficientNet-B7 (Tables 2 and 3)",
    "coco/resnet50": "ResNet-50 (Table 4)",
    "coco/resnet101": "ResNet-101 (Table 12)",
    "coco/spinenet": "SpineNet (Table 5)",
    "coco/one_gpu": "One GPU (ours)",
    "efficientdet": "EfficientDet D0 to D7x",
    "pascal_voc/efficientnet_b7": "PASCAL VOC: EfficientNet-B7 (Tables 8, 11 and 14)",
    "pascal_voc/efficientnet_l2": "PASCAL VOC: EfficientNet-L2 (Table 6)",
    "pascal_voc/one_gpu": "PASCAL VOC: one GPU (ours)",
}


class DenseOutputs(nn.Module):
    """The part of a model whose work does not depend on what is in the image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor | list[list[torch.Tensor]]:
        features = self.model.backbone(images)
        if hasattr(self.model, "sem_seg_head"):
            return self.model.sem_seg_head.layers(features)
        return self.model.head([features[name] for name in self.model.head_in_features])


def load_config(name: str) -> CfgNode:
    """A shipped config, for the CPU."""
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name), allow_unsafe=False)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def build_efficientnet(name: str) -> EfficientNet:
    """Up to C5, without pyramid."""
    norm = batch_norm_builder("BN", device="cpu")
    return EfficientNet(name=name, out_features=["res3", "res4", "res5"], norm=norm)


def millions_of_parameters(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"


def gflops(model: nn.Module, size: int = SIZE) -> str:
    """Billions of operations on one image as fvcore counts them: a multiplication with its addition is one."""
    return f"{_operations(model, size) / 1e9:.1f}"


def gflops_of_large(model: DenseOutputs, size: int) -> str:
    """As :func:`gflops`, from runs at two small sizes: operations are a constant and a multiple of the area.

    Args:
        model: of layers that take any size.
        size: a multiple of its coarsest stride, in pixels.
    """
    stride = max(shape.stride for shape in model.model.backbone.output_shape().values())
    small, large = _operations(model, stride), _operations(model, 2 * stride)
    by_area = (large - small) / (3 * stride**2)
    return f"{(small + by_area * (size**2 - stride**2)) / 1e9:.1f}"


def _operations(model: nn.Module, size: int) -> float:
    with torch.no_grad():
        analysis = FlopCountAnalysis(model.eval(), torch.zeros(1, 3, size, size))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return analysis.total()


def backbone_table() -> str:
    models = ((name, build_efficientnet(name)) for name in BACKBONES)
    return _size_table("backbone", models)


def detector_table() -> str:
    models = ((name, DenseOutputs(build_model(load_config(config)))) for name, config in DETECTORS.items())
    return _size_table("detector on", models)


def cpu_seconds(model: nn.Module, size: int, repetitions: int = 3) -> str:
    """Processor time of a forward pass of one image on one core, the least of some repetitions.

    It depends on what else the machine does, but less than time by the clock.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    with torch.no_grad():
        for _ in range(repetitions):
            start = time.process_time()
            model.eval()(torch.zeros(1, 3, size, size))
            times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return f"{min(times):.2f}"


def _row(name: str, config: str, published: Sequence[str], timed: bool = True) -> list[str]:
    cfg = load_config(config)
    model, size = DenseOutputs(build_model(cfg)), cfg.INPUT.AUGMENTATION.IMAGE_SIZE
    operations = gflops_of_large(model, size)
    repetitions = 3 if float(operations) < TIMED_THRICE_GFLOPS else 1
    seconds = cpu_seconds(model, size, repetitions) if timed else ""
    return [name, millions_of_parameters(model), operations, f"{size}", seconds, *published]


def spinenet_table() -> str:
    """Each at its own size of images: parameters, operations and time, and what is published."""
    rows = [_row(name, config, published) for name, (config, *published) in SPINENETS.items()]
    titles = ["parameters (M)", "GFLOPs", "at pixels", "CPU seconds"]
    return markdown_table(
        ["detector on", *titles, "published: parameters (M)", "GFLOPs", "V100, ms"],
        rows,
    )


def efficientdet_table() -> str:
    """As :func:`spinenet_table`; the published AP is the aim of these configs."""
    rows = [
        _row(name, config, published, name not in NOT_TIMED)
        for name, (config, *published) in EFFICIENTDETS.items()
    ]
    titles = ["parameters (M)", "GFLOPs", "at pixels", "CPU seconds"]
    published_titles = ["published: parameters (M)", "GFLOPs", "V100, ms", "AP val", "AP test-dev"]
    return markdown_table(["detector", *titles, *published_titles], rows)


def classifier_size(name: str, size: int) -> tuple[float, float]:
    """Parameters (M) and operations (G) of the part of an EfficientNet that detectors leave out.

    That is the 1x1 convolution after C5 with its batch norm, and the classifier of 1,000 classes.
    """
    with torch.device("meta"):
        model = EfficientNetClassifier.from_name(name)
    parameters = sum(
        p.numel() for part in (model._conv_head, model._bn1, model._fc) for p in part.parameters()
    )
    operations = model._conv_head.weight.numel() * math.ceil(size / 32) ** 2 + model._fc.weight.numel()
    return parameters / 1e6, operations / 1e9


def segmentation_table() -> str:
    """Each model as it is, with the classifier it leaves out, and as the paper counts."""
    rows = []
    for name, (config, paper_parameters, paper_gflops) in SEGMENTORS.items():
        cfg = load_config(config)
        model = DenseOutputs(build_model(cfg))
        row = [name, millions_of_parameters(model), gflops(model, SEGMENTATION_SIZE)]
        added = classifier_size(cfg.MODEL.EFFICIENTNET.NAME, SEGMENTATION_SIZE)
        with_classifier = [f"{float(ours) + more:.1f}" for ours, more in zip(row[1:], added)]
        rows.append(
            [name, row[1], with_classifier[0], paper_parameters, row[2], with_classifier[1], paper_gflops]
        )
    titles = ["with classifier", "in the paper"]
    return markdown_table(
        ["segmentation model on", "parameters (M)", *titles, f"GFLOPs at {SEGMENTATION_SIZE} px", *titles],
        rows,
    )


def _size_table(title: str, models: Iterator[tuple[str, nn.Module]]) -> str:
    rows = [[name, millions_of_parameters(model), gflops(model)] for name, model in models]
    return markdown_table([title, "parameters (M)", f"GFLOPs at {SIZE} px"], rows)


def results_table(family: str) -> str:
    """Every config of a folder with its schedule, the AP or mIOU that the paper has, and room for ours."""
    metric = "mIOU" if family.startswith("pascal_voc") else "AP"
    rows = []
    for path in sorted((CONFIGS / family).glob("[!B]*.yaml")):  # not Base-...
        cfg = load_config(f"{family}/{path.name}")
        human, pseudo = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.PSEUDO_IMS_PER_BATCH
        in_paper = re.search(rf"([\d.]+) {metric} (in the paper|published)", path.read_text(encoding="utf-8"))
        rows.append(
            [
                f"[{path.stem}](../configs/{family}/{path.name})",
                f"{cfg.SOLVER.MAX_ITER:,}",
                f"{human} + {pseudo}" if pseudo else f"{human}",
                f"{cfg.SELFTRAIN.ALPHA:g}" if pseudo else "",
                in_paper.group(1) if in_paper else "",
                "",
            ]
        )
    return markdown_table(
        ["config", "steps", "images a step", "alpha", f"{metric} in the paper", f"{metric} of ours"], rows
    )


def results_tables() -> str:
    """:func:`results_table` of every family, each with its title."""
    return "\n\n".join(f"### {title}\n\n{results_table(family)}" for family, title in FAMILIES.items())


TABLES = {
    "results": results_tables,
    "detectors": detector_table,
    "spinenets": spinenet_table,
    "efficientdets": efficientdet_table,
    "segmentors": segmentation_table,
    "backbones": backbone_table,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(TABLES)}; all of them"
    )
    names = parser.parse_args().tables or list(TABLES)
    for name in names:
        if name not in TABLES:
            parser.error(f"no table {name}: {', '.join(TABLES)}")
        print(TABLES[name](), end="\n\n", flush=True)
