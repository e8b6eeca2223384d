import json

import pytest
import torch
from conftest import make_class_folders
from detectron2.engine import AMPTrainer, HookBase
from detectron2.modeling import build_model

from selftrain_d2 import InputError, LossNormalizer, SelfTrainingTrainer
from selftrain_d2.data.classification import register_classification_folder
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.engine.launch import pseudo_labels, registered
from selftrain_d2.modeling.checkpoint import SafeDetectionCheckpointer
from selftrain_d2.modeling.meta_arch import add_classification_head


def _trained(cfg, resume=False):
    torch.manual_seed(0)
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def _normalizer(trainer):
    return next(h for h in trainer._hooks if isinstance(h, LossNormalizer))


def test_checkpoints_hold_classes_and_averages(student_config, tmp_path):
    trainer = _trained(student_config)
    # weights_only: nothing in our own checkpoints needs code
    checkpoint = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    assert checkpoint["classes"] == {"thing_classes": ["red", "green"]}
    assert checkpoint["input"]["format"] == "RGB" and len(checkpoint["input"]["pixel_mean"]) == 3
    assert checkpoint["trainer"]["hooks"]["LossNormalizer"] == _normalizer(trainer).state_dict()


def test_resumed_training_goes_on_with_averages_and_images(student_config, tmp_path):
    _trained(student_config)
    first = torch.load(tmp_path / "output" / "model_0000001.pth", weights_only=True)
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    trainer = SelfTrainingTrainer(student_config)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2 and trainer.data_loader.batch_sampler.first_batch == 2
    assert _normalizer(trainer).state_dict() == first["trainer"]["hooks"]["LossNormalizer"]
    seen = next(iter(trainer.data_loader))
    fresh = iter(SelfTrainingTrainer(student_config).data_loader)
    expected = [next(fresh) for _ in range(3)][2]
    for a, b in zip(seen, expected):
        assert a["file_name"] == b["file_name"] and torch.equal(a["image"], b["image"])


def test_averages_do_not_travel_with_weights(student_config, tmp_path):
    _trained(student_config)
    cfg = student_config.clone()
    cfg.MODEL.WEIGHTS = str(tmp_path / "output" / "model_final.pth")
    cfg.OUTPUT_DIR = str(tmp_path / "next")
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(resume=False)
    averages = {"human_average": None, "human_count": 0, "pseudo_average": None, "pseudo_count": 0}
    assert _normalizer(trainer).state_dict() == {**averages, "steps": 0}
    assert trainer.start_iter == 0


def test_logged_losses_follow_the_formula(student_config, tmp_path):
    student_config.SELFTRAIN.ALPHA = 2.0
    trainer = _trained(student_config)
    line = json.loads((tmp_path / "output" / "metrics.json").read_text().splitlines()[-1])
    history = {k: [v for v, _ in b.values()] for k, b in trainer.storage.histories().items()}
    for step in range(4):
        total = (
            history["human_loss_weight"][step] * history["human_loss"][step]
            + history["pseudo_loss_weight"][step] * history["pseudo_loss"][step]
        )
        assert history["total_loss"][step] == pytest.approx(total, rel=1e-5)
    assert history["human_loss_weight"] == pytest.approx([1 / 3] * 4)
    ratio = history["human_loss"][0] / history["pseudo_loss"][0]
    assert history["pseudo_loss_weight"][:2] == pytest.approx([2 / 3, 2 / 3 * ratio])
    assert "human_loss_average" in line


class _Extra(HookBase):
    def after_step(self):
        self.trainer.storage.put_scalar("extra", self.trainer.iter, smoothing_hint=False)


def test_what_a_hook_before_the_last_one_logs_is_written(student_config, tmp_path):
    """detectron2's idiom for hooks of one's own."""

    class Trainer(SelfTrainingTrainer):
        def build_hooks(self):
            built = super().build_hooks()
            built.insert(-1, _Extra())
            return built

    student_config.SOLVER.MAX_ITER = 2
    Trainer(student_config).train()
    (line,) = (tmp_path / "output" / "metrics.json").read_text().splitlines()  # at the end, or every 20 steps
    assert json.loads(line)["extra"] == json.loads(line)["iteration"] == 1


def test_with_detectron2s_amp_trainer_unchanged(student_config, monkeypatch):
    """AMPTrainer insists on CUDA; told that it is there, it runs in float32 on the CPU."""
    built = SelfTrainingTrainer(student_config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    trainer = AMPTrainer(built.model, built.data_loader, built.optimizer, grad_scaler=scaler)
    normalizer = LossNormalizer(alpha=0.5)
    trainer.register_hooks([normalizer])
    monkeypatch.setattr("torch.cuda.amp.autocast", lambda dtype: torch.autocast("cpu", enabled=False))
    trainer.train(0, 2)
    assert normalizer.human_average > 0 and normalizer.pseudo_average > 0


def test_resuming_with_other_classes_is_refused(student_config, tmp_path):
    _trained(student_config)
    trainer = SelfTrainingTrainer(student_config)
    trainer.checkpointer.checkpointables["classes"].facts = {"thing_classes": ["cat", "dog"]}
    with pytest.raises(InputError, match="cat"):
        trainer.resume_or_load(resume=True)
    assert isinstance(trainer.checkpointer, SafeDetectionCheckpointer)


def test_weights_of_another_normalization_are_warned_about(student_config, tmp_path, caplog):
    _trained(student_config)
    cfg = student_config.clone()
    cfg.MODEL.WEIGHTS = str(tmp_path / "output" / "model_final.pth")
    cfg.OUTPUT_DIR = str(tmp_path / "next")
    with caplog.at_level("WARNING", "selftrain_d2"):
        SelfTrainingTrainer(cfg).resume_or_load(resume=False)
        assert "another input" not in caplog.text
        cfg.INPUT.FORMAT = "BGR"
        SelfTrainingTrainer(cfg).resume_or_load(resume=False)
        assert "INPUT.FORMAT RGB" in caplog.text


# ---- weights to start from, of other classes ----
def _start(cfg, folder, number_of_classes=2, **facts):
    """A trainer that starts from the weights of another one with these facts; and these weights, and its own first."""
    other = cfg.clone()
    other.MODEL.RETINANET.NUM_CLASSES = number_of_classes
    torch.manual_seed(1)
    model = build_model(other)
    if "classification" in facts:
        add_classification_head(model, len(facts["classification"]["classification_classes"]), 1.0)
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    torch.save({"model": weights, **facts}, cfg.MODEL.WEIGHTS)
    trainer = SelfTrainingTrainer(cfg)
    first = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    return trainer.model.state_dict(), weights, first


def _anew(state, weights, first):
    """Names of the tensors that kept their first values, though the weights have them; all others are the weights'."""
    anew = {name for name, value in weights.items() if not torch.equal(state[name], value)}
    assert all(torch.equal(state[name], first[name]) for name in anew)
    return anew


HEAD = {"head.cls_score.weight", "head.cls_score.bias"}


@pytest.mark.parametrize("classes", [["green", "red"], ["cat", "dog"]])
def test_weights_of_as_many_other_classes_are_refused_or_their_head_starts_anew(
    student_config, tmp_path, classes
):
    facts = {"classes": {"thing_classes": classes}}
    with pytest.raises(
        InputError, match=rf"know other classes than the data: \[{classes[0]}, .*WEIGHTS_OF_OTHER"
    ):
        _start(student_config, tmp_path, **facts)
    student_config.SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES = True
    assert _anew(*_start(student_config, tmp_path, **facts)) == HEAD


def test_weights_of_another_number_of_classes_bring_all_but_the_head(student_config, tmp_path):
    facts = {"classes": {"thing_classes": ["cat", "dog", "cow"]}}
    assert _anew(*_start(student_config, tmp_path, 3, **facts)) == HEAD


@pytest.mark.parametrize(
    ("facts", "stated"),
    [({}, True), ({"classes": {"thing_classes": ["red", "green"]}}, True), ({"classes": [1, 2]}, False)],
)
def test_weights_of_the_same_or_unknown_classes_are_taken_whole(student_config, tmp_path, facts, stated):
    student_config.SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES = stated
    assert _anew(*_start(student_config, tmp_path, **facts)) == set()


def test_the_head_for_joint_training_has_classes_too(student_config, tmp_path):
    register_classification_folder("images", make_class_folders(tmp_path / "images"))
    student_config.DATASETS.CLASSIFICATION_TRAIN, student_config.SOLVER.CLASSIFICATION_IMS_PER_BATCH = (
        ("images",),
        2,
    )
    same = {"classes": {"thing_classes": ["red", "green"]}}
    facts = {**same, "classification": {"classification_classes": ["dark", "bright", "noise"]}}
    with pytest.raises(InputError, match=r"know other image classes than the data: .*in another order"):
        _start(student_config, tmp_path, **facts)
    student_config.SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES = True
    anew = _anew(*_start(student_config, tmp_path, **facts))
    assert anew and all(name.startswith("classification_head.") for name in anew)


def test_uncertain_boxes_of_a_folder_are_ignored_by_a_config_key(student_config, coco_set, tmp_path):
    """From the labels on disk through a loader's worker to the model, which counts them."""
    names = ["003.png", "004.png"]
    identity = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": coco_set.images}
    with PseudoLabelWriter(tmp_path / "unsure", identity, names) as writer:
        boxes = [[10, 10, 60, 60], [20, 20, 80, 80], [5, 30, 40, 90]]
        writer.write_shard(0, [make_row(n, 96, 96, boxes, [0.9, 0.4, 0.1], [0, 1, 1]) for n in names])
        writer.finish()
    cfg = student_config
    cfg.DATASETS.PSEUDO_TRAIN, cfg.SOLVER.MAX_ITER, cfg.DATALOADER.NUM_WORKERS = ("unsure",), 1, 1
    found = {}
    for threshold in (0.0, 0.3):
        cfg.SELFTRAIN.IGNORE_SCORE_THRESH, cfg.OUTPUT_DIR = threshold, str(tmp_path / str(threshold))
        with registered([pseudo_labels("unsure", str(tmp_path / "unsure"), cfg)]):
            model = _trained(cfg).model
        found[threshold] = model.label_counts, model.raw_losses, model.positive_anchor_averages
    (off, off_losses, off_average), (on, on_losses, on_average) = found[0.0], found[0.3]
    assert (off["ignored_boxes"]["pseudo"].images, on["ignored_boxes"]["human"].images) == (0, 0)
    ignored = on["ignored_boxes"]["pseudo"]
    assert (ignored.images, ignored.labels) == (1, 1) and on["boxes"] == off["boxes"]
    assert torch.equal(on_losses["human"], off_losses["human"])
    assert on_losses["pseudo"] < off_losses["pseudo"] and on_average == off_average
