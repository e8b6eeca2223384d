"""RetinaNets of other systems through the public commands: trained, resumed, in two processes, labeling, exported."""

import json
from typing import NamedTuple

import pytest
import torch
from conftest import make_coco_set

from selftrain_d2 import load_pseudo_labels
from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.modeling.backbone.spinenet import SIZES, Size


class Detector(NamedTuple):
    """A config, made small."""

    config: str
    options: list  # KEY VALUE pairs
    drop_connect_key: str
    learned: list  # some of its layers, from the image to the outputs


SPINENET = Detector(
    "Base-RetinaNet-SpineNet.yaml",
    ["MODEL.SPINENET.NAME", "spinenet-49s", "MODEL.SPINENET.OUT_CHANNELS", "16"],
    "MODEL.SPINENET.DROP_CONNECT_RATE",
    ["backbone.stem_conv", "backbone.blocks.16.resamplings.0.0", "backbone.endpoints.p7", "head.cls_score"],
)
EFFICIENTDET = Detector(
    "efficientdet/d0.yaml",
    ["MODEL.FPN.OUT_CHANNELS", "16", "MODEL.BIFPN.REPEATS", "1"],
    "MODEL.EFFICIENTNET.DROP_CONNECT_RATE",
    ["backbone.bottom_up._conv_stem", "backbone.coarser_lateral", "backbone.cells.0.nodes.0.pointwise",
     "head.cls_score.1"],
)  # fmt: skip
#: KEY VALUE pairs of all.
SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RETINANET.NUM_CONVS", "1",
    "MODEL.RETINANET.NUM_CLASSES", "2",
    "INPUT.AUGMENTATION.IMAGE_SIZE", "96",
    "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.PSEUDO_IMS_PER_BATCH", "2",
    "SOLVER.BASE_LR", "0.001",
    "SOLVER.WARMUP_ITERS", "0",
    "SOLVER.STEPS", "()",
    "SOLVER.MAX_ITER", "2",
    "SOLVER.CHECKPOINT_PERIOD", "1",
    "SOLVER.AMP.ENABLED", "False",
    "SEED", "0",
]  # fmt: skip


@pytest.fixture(params=[SPINENET, EFFICIENTDET], ids=["spinenet", "efficientdet"])
def detector(request):
    return request.param


@pytest.fixture
def coco(tmp_path):
    return make_coco_set(tmp_path / "coco", 4, seed=0)


@pytest.fixture
def student(detector, coco, tmp_path):
    """``student(output, *options, arguments=())``: the command line of a student of two steps."""
    identity = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": coco.images}
    writer = PseudoLabelWriter(tmp_path / "pseudo", identity, ["001.png", "002.png"])
    boxes = make_row("001.png", 96, 96, [[10, 10, 60, 60]], [0.9], [0])
    writer.write_shard(0, [boxes, make_row("002.png", 96, 96)])
    writer.finish()

    def build(output, *options, arguments=()):
        return [
            "train", "--config-file", detector.config, *arguments,
            "--human-labels", "human", coco.json_file, coco.images,
            "--pseudo-labels", "pseudo", str(tmp_path / "pseudo"), *SMALL, *detector.options,
            "DATASETS.TRAIN", "('human',)", "DATASETS.PSEUDO_TRAIN", "('pseudo',)", "DATASETS.TEST", "()",
            "OUTPUT_DIR", str(output), *options,
        ]  # fmt: skip

    return build


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_trained_resumed_and_labeling(detector, student, coco, tmp_path, monkeypatch):
    """In bfloat16 autocast; a SpineNet of the right structure, but narrower than any that is published."""
    monkeypatch.setitem(SIZES, "spinenet-49s", Size(filter_scale=0.0625))
    options = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"]
    options += [detector.drop_connect_key.replace("DROP_CONNECT_RATE", "CHECKPOINT_ACTIVATIONS"), "True"]
    run = tmp_path / "run"
    assert main(student(run, *options)) == 0
    trained = weights(run)
    start = torch.load(run / "model_0000000.pth", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in trained.values())
    for name in detector.learned:
        assert not torch.equal(trained[f"{name}.weight"], start[f"{name}.weight"]), name

    (run / "last_checkpoint").write_text("model_0000000.pth")
    assert main(student(run, *options, arguments=["--resume"])) == 0
    for name, value in weights(run).items():
        assert torch.equal(value, trained[name]), name

    labels = ["--images", coco.images, "--output", str(tmp_path / "labels"), "--score-floor", "0.001"]
    model = [
        *SMALL,
        *detector.options,
        "MODEL.WEIGHTS",
        str(run / "model_final.pth"),
        "MODEL.RETINANET.SOFT_NMS_SIGMA",
        "0.3",
    ]
    assert main(["label", "--config-file", detector.config, *labels, *model]) == 0
    found = load_pseudo_labels(tmp_path / "labels", 0.001)
    assert len(found) == 4 and any(image["annotations"] for image in found)


@pytest.mark.slow
def test_two_processes_train_as_one(detector, student, tmp_path):
    """With synchronized batch norm, each process with half of the images; nothing else is drawn at random.

    The second step's losses show the first one's update. Biases are not compared: they start at zero, and so deep a
    network enlarges what rounding makes of a few images.
    """
    options = [detector.drop_connect_key, "0.0"]
    assert main(student(tmp_path / "one", *options)) == 0
    assert main(student(tmp_path / "two", *options, arguments=["--num-gpus", "2"])) == 0
    losses = []
    for run in ("one", "two"):
        last = (tmp_path / run / "metrics.json").read_text().splitlines()[-1]
        losses.append({name: value for name, value in json.loads(last).items() if "loss" in name})
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) > 6
    assert losses[0] == pytest.approx(losses[1], rel=3e-3)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    kernels = [name for name, value in one.items() if value.dim() == 4]
    assert len(kernels) > 100
    for name in kernels:
        assert (two[name] - one[name]).norm() / one[name].norm() < 0.01, name


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["onnx", "torchscript"])
def test_exported(weight_format, detector, student, tmp_path, capsys):
    """The command checks the file against the model at sizes other than the traced one."""
    options = ["MODEL.RETINANET.SOFT_NMS_SIGMA", "0.0", "SELFTRAIN.WEIGHT_EMA_DECAY", "0.0"]
    assert main(student(tmp_path / "run", *options)) == 0
    checkpoint = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    # scores of a new detector are equal but for rounding
    torch.nn.init.normal_(checkpoint["model"][f"{detector.learned[-1]}.weight"], std=0.3)
    torch.save(checkpoint, tmp_path / "run" / "model_final.pth")
    file = tmp_path / "model"
    assert (
        main(["export-model", str(tmp_path / "run"), "--format", weight_format, "--output", str(file)]) == 0
    )
    assert "largest deviation of boxes" in capsys.readouterr().out
    assert file.stat().st_size > 10e6
