"""Joint training of a detector and a classifier, from the config to the checkpoint."""

import json
import logging

import pytest
import torch
from conftest import SMALL_MODEL, make_class_folders
from torch.utils.data import DataLoader

from selftrain_d2 import InputError, SelfTrainingTrainer, register_classification_folder
from selftrain_d2.cli import main
from selftrain_d2.engine.replay import replay
from selftrain_d2.engine.step_trainer import NonFiniteLossError
from selftrain_d2.modeling.checkpoint import load_weights, require_complete

HEAD = {"classification_head.predictor.weight", "classification_head.predictor.bias"}
FROZEN = [
    "MODEL.EFFICIENTNET.NORM", "FrozenBN", "MODEL.EFFICIENTNET.DROP_CONNECT_RATE", "0.0",
    "MODEL.FPN.OUTPUT_NORM", "", "MODEL.RETINANET.NORM", "", "MODEL.RETINANET.NORM_AFFINE_PER_LEVEL", "False",
    "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]",  # without batch norm, small numbers vanish in 16 blocks
]  # fmt: skip


@pytest.fixture
def joint_config(student_config, tmp_path):
    """Two human images, two pseudo images and four of three classes a step."""
    register_classification_folder("classes", make_class_folders(tmp_path / "classes"))
    cfg = student_config
    cfg.DATASETS.CLASSIFICATION_TRAIN = ("classes",)
    cfg.SOLVER.PSEUDO_IMS_PER_BATCH, cfg.SOLVER.CLASSIFICATION_IMS_PER_BATCH = 2, 4
    cfg.INPUT.CLASSIFICATION_IMAGE_SIZE = 64
    cfg.SOLVER.MAX_ITER = 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    return cfg


def _trainer(cfg, resume=False):
    torch.manual_seed(0)
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(resume)
    return trainer


def _trained(cfg, resume=False):
    trainer = _trainer(cfg, resume)
    trainer.train()
    return trainer


def _assert_same_weights(one, other, rtol, atol):
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=name)


def test_loss_is_outside_the_normalization(joint_config):
    joint_config.SELFTRAIN.ALPHA = 2.0
    joint_config.SELFTRAIN.CLASSIFICATION_LOSS_WEIGHT = 0.2
    trainer = _trained(joint_config)
    history = {k: [v for v, _ in b.values()] for k, b in trainer.storage.histories().items()}
    for step in range(2):
        detection = sum(
            history[f"{source}_loss_weight"][step] * history[f"{source}_loss"][step]
            for source in ("human", "pseudo")
        )
        total = detection + history["loss_classification"][step]
        assert history["total_loss"][step] == pytest.approx(total, rel=1e-5)
        assert history["human_loss_weight"][step] == pytest.approx(1 / 3)
    # The head begins near equal probabilities of three classes.
    assert history["loss_classification"][0] == pytest.approx(0.2 * 1.0986, rel=0.1)


def test_detection_alone_is_not_changed_by_a_weight_of_zero(joint_config):
    cfg = joint_config
    cfg.merge_from_list(FROZEN)
    cfg.SELFTRAIN.CLASSIFICATION_LOSS_WEIGHT = 0.0
    joint = _trained(cfg)
    cfg.DATASETS.CLASSIFICATION_TRAIN, cfg.SOLVER.CLASSIFICATION_IMS_PER_BATCH = (), 0
    cfg.OUTPUT_DIR += "_alone"
    alone = _trained(cfg)
    assert joint.model.state_dict().keys() - alone.model.state_dict().keys() == HEAD
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(joint.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_an_accumulated_step_is_the_step_of_the_whole_batch(joint_config):
    joint_config.merge_from_list(FROZEN)
    joint_config.SOLVER.MAX_ITER = 1
    start = {name: value.clone() for name, value in _trainer(joint_config).model.state_dict().items()}
    whole = _trained(joint_config)
    joint_config.SOLVER.ACCUMULATION_STEPS = 2
    joint_config.OUTPUT_DIR += "_parts"
    parts = _trained(joint_config)
    other, moved = parts.model.state_dict(), 0
    for name, value in whole.model.state_dict().items():
        step = (value - start[name]).norm()
        assert (value - other[name]).norm() <= 0.01 * step + 1e-7, name
        moved += int(step > 1e-5)
    assert moved > 50
    losses = [t.storage.history("loss_classification").latest() for t in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    joint_config.SOLVER.CLASSIFICATION_IMS_PER_BATCH = 3
    with pytest.raises(InputError, match=r"CLASSIFICATION_IMS_PER_BATCH = 3 does not divide"):
        SelfTrainingTrainer(joint_config)


def test_resumed_it_ends_where_an_undisturbed_run_does(joint_config, tmp_path):
    joint_config.SELFTRAIN.WEIGHT_EMA_DECAY = 0.5
    undisturbed = _trained(joint_config)
    average = undisturbed.weight_average.model.state_dict()
    assert average.keys() >= HEAD
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000000.pth")
    resumed = _trained(joint_config, resume=True)
    _assert_same_weights(undisturbed, resumed, rtol=0, atol=0)
    for name, value in resumed.weight_average.model.state_dict().items():
        assert torch.equal(value, average[name]), name


@pytest.mark.parametrize("change", ["off", "other classes"])
def test_resuming_with_other_classes_is_refused(joint_config, tmp_path, change):
    cfg = joint_config
    cfg.SOLVER.MAX_ITER = 1
    _trained(cfg)
    if change == "off":
        cfg.DATASETS.CLASSIFICATION_TRAIN, cfg.SOLVER.CLASSIFICATION_IMS_PER_BATCH = (), 0
    else:
        register_classification_folder("others", make_class_folders(tmp_path / "others", ["a", "b", "c"]))
        cfg.DATASETS.CLASSIFICATION_TRAIN = ("others",)
    with pytest.raises(
        InputError, match=r"has classification_classes \['bright', 'dark', 'noise'\], this run"
    ):
        _trainer(cfg, resume=True)


def test_bfloat16(joint_config):
    joint_config.SOLVER.MAX_ITER = 1
    joint_config.SOLVER.AMP.ENABLED, joint_config.SOLVER.AMP.PRECISION = True, "bfloat16"
    trainer = _trained(joint_config)
    loss = trainer.storage.history("loss_classification").latest()
    assert loss == pytest.approx(0.5 * 1.0986, rel=0.1)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_weights_of_joint_training_start_any_student(joint_config, tmp_path, caplog):
    cfg = joint_config
    cfg.SOLVER.MAX_ITER = 1
    teacher = _trained(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "output" / "model_final.pth")
    cfg.OUTPUT_DIR = str(tmp_path / "student")
    joint = _trainer(cfg)
    _assert_same_weights(teacher, joint, rtol=0, atol=0)  # the head too

    cfg.DATASETS.CLASSIFICATION_TRAIN, cfg.SOLVER.CLASSIFICATION_IMS_PER_BATCH = (), 0
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        student = _trainer(cfg)
        model = SelfTrainingTrainer.build_model(cfg)  # as for labeling and evaluation
        report = load_weights(model, cfg.MODEL.WEIGHTS)
    require_complete(report, cfg.MODEL.WEIGHTS)
    assert report.unexpected == [] and "classification" not in caplog.text
    for other in (student.model, model):
        assert not HEAD & other.state_dict().keys()
        for name, value in other.state_dict().items():
            assert torch.equal(value, teacher.model.state_dict()[name]), name


class _Poisoned:
    """The trainer's loader with one infinite pixel in the last image, which is one with a class."""

    def __init__(self, loader: DataLoader):
        self.loader, self.batch_sampler = loader, loader.batch_sampler

    def __iter__(self):
        for batch in self.loader:
            batch[-1]["image"] = batch[-1]["image"].float()
            batch[-1]["image"][0, 30, 30] = float("inf")
            yield batch


def test_a_loss_that_is_not_finite_is_replayed(joint_config, tmp_path):
    joint_config.merge_from_list(FROZEN)
    trainer = SelfTrainingTrainer(joint_config)
    trainer._trainer.data_loader = _Poisoned(trainer.data_loader)
    with pytest.raises(NonFiniteLossError) as stop:
        trainer.train()
    message = str(stop.value)
    assert "for classification labels (loss_classification nan)" in message
    files = message.split("Images: ")[1].split("; ")[0].split(", ")
    assert len(files) == 4 and all("/classes/" in file for file in files)
    found = replay(tmp_path / "output" / "not_finite_step_0000000_rank_0.pth")
    assert found["saved_losses"] == pytest.approx(found["losses"], rel=1e-4, nan_ok=True)
    assert [image["label_source"] for image in found["images"]][-4:] == ["classification"] * 4


@pytest.fixture
def command(joint_config, coco_set, tmp_path):
    """``command(output, *options)`` of `train`; the datasets are registered by it, under names of its own."""

    def build(output, *options, arguments=()):
        return [
            "train", "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml",
            "--human-labels", "labeled", coco_set.json_file, coco_set.images,
            "--pseudo-labels", "unlabeled", str(tmp_path / "pseudo"),
            "--classification-images", "things", str(tmp_path / "classes"), *arguments,
            *SMALL_MODEL, "DATASETS.TRAIN", "('labeled',)", "DATASETS.PSEUDO_TRAIN", "('unlabeled',)",
            "DATASETS.TEST", "()", "DATASETS.CLASSIFICATION_TRAIN", "('things',)",
            "SOLVER.PSEUDO_IMS_PER_BATCH", "2", "SOLVER.CLASSIFICATION_IMS_PER_BATCH", "2",
            "SELFTRAIN.CLASSIFICATION_LOSS_WEIGHT", "0.2", "SELFTRAIN.ALPHA", "2",
            "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(output), *options,
        ]  # fmt: skip

    return build


def test_command(command, tmp_path, capsys):
    assert main(command(tmp_path / "run")) == 0
    line = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[-1])
    assert {"loss_classification", "classification_accuracy", "loss_cls_pseudo"} <= line.keys()
    checkpoint = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert checkpoint["model"].keys() >= HEAD
    assert checkpoint["classification"] == {"classification_classes": ["bright", "dark", "noise"]}
    # Evaluation takes the same command, and no head.
    weights = ("MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth"), "DATASETS.TEST", "('labeled',)")
    assert main(command(tmp_path / "evaluation", *weights, arguments=["--eval-only"])) == 0
    capsys.readouterr()
    assert main(command(tmp_path / "no", "DATASETS.CLASSIFICATION_TRAIN", "('nothing',)")) == 2
    assert "'nothing', which is not registered" in capsys.readouterr().err


def test_two_processes_train_as_one_with_their_images(command, tmp_path):
    assert main(command(tmp_path / "one", *FROZEN)) == 0
    assert main(command(tmp_path / "two", *FROZEN, arguments=["--num-gpus", "2"])) == 0
    one, two = (
        torch.load(tmp_path / n / "model_final.pth", weights_only=True)["model"] for n in ("one", "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
