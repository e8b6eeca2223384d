import json
import logging

import pytest
import torch
from conftest import small_rcnn_config
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from selftrain_d2 import InputError, SelfTrainingTrainer
from selftrain_d2.cli import main
from selftrain_d2.engine.replay import replay
from selftrain_d2.engine.step_trainer import NonFiniteLossError, StepTrainer, split_batch


def _batch(seed, sizes=(96, 96)):
    """Two human and two pseudo images; boxes 1, 2, 3, 0."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for i, count in enumerate([1, 2, 3, 0]):
        corner = torch.rand(count, 2, generator=generator) * 40
        instances = Instances(sizes)
        instances.gt_boxes = Boxes(torch.cat([corner, corner + 20 + corner.flip(1) / 2], dim=1))
        instances.gt_classes = torch.arange(count) % 2
        image = torch.randint(0, 255, (3, *sizes), generator=generator, dtype=torch.uint8)
        source = "human" if i < 2 else "pseudo"
        batch.append(
            {"image": image, "instances": instances, "label_source": source, "file_name": f"{source}_{i}.png"}
        )
    return batch


def _frozen_retinanet(cfg):
    cfg.MODEL.EFFICIENTNET.NORM = "FrozenBN"
    cfg.MODEL.EFFICIENTNET.DROP_CONNECT_RATE = 0.0
    cfg.MODEL.FPN.OUTPUT_NORM = cfg.MODEL.RETINANET.NORM = ""
    cfg.MODEL.RETINANET.NORM_AFFINE_PER_LEVEL = False
    return cfg


def _three_steps(cfg, **options):
    torch.manual_seed(0)
    model = build_model(cfg)
    model.loss_weights = (0.5, 2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = StepTrainer(model, [_batch(0), _batch(1), _batch(2)], optimizer, **options)
    trainer.train(0, 3)
    return trainer


def _assert_close_weights(one, other, rtol=1e-4):
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-5, msg=name)


@pytest.mark.parametrize("normalizer", ["batch", "moving_average"])
def test_an_accumulated_step_is_the_step_of_the_whole_batch(small_config, normalizer):
    cfg = _frozen_retinanet(small_config)
    cfg.MODEL.RETINANET.LOSS_NORMALIZER = normalizer
    whole, parts = _three_steps(cfg), _three_steps(cfg, accumulation_steps=2)
    _assert_close_weights(whole, parts)
    for source, average in whole.model.positive_anchor_averages.items():
        assert parts.model.positive_anchor_averages[source] == pytest.approx(average)
    for source in ("human", "pseudo"):
        torch.testing.assert_close(parts.model.raw_losses[source], whole.model.raw_losses[source])
    assert parts.model.label_counts == whole.model.label_counts
    boxes = whole.model.label_counts["boxes"]
    assert (boxes["human"].labels, boxes["pseudo"].empty) == (3, 1)
    names = ("total_loss", "loss_cls_pseudo")
    for name in names:
        value, expected = (t.storage.history(name).latest() for t in (parts, whole))
        assert value == pytest.approx(expected, rel=1e-4)


def test_an_accumulated_step_of_an_rcnn():
    """Every proposal is sampled: its losses are means over images, so they need no counting in advance."""
    cfg = small_rcnn_config("SelfTrainingGeneralizedRCNN")
    torch.manual_seed(0)
    model = build_model(cfg).train()
    model.loss_weights = (0.5, 2.0)

    def rpn_gradient(batches):
        model.zero_grad()
        with EventStorage(), model.one_step(batches):
            for batch in batches:
                losses = {k: v for k, v in model(batch).items() if "rpn" in k}
                (sum(losses.values()) / len(batches)).backward()
        return model.proposal_generator.rpn_head.conv.weight.grad.clone()

    batch = _batch(0)
    torch.testing.assert_close(
        rpn_gradient([batch]), rpn_gradient(split_batch(batch, 2)), rtol=1e-4, atol=1e-6
    )


def test_parts_have_the_same_share_of_each_source():
    parts = split_batch(_batch(0), 2)
    assert [[x["file_name"] for x in part] for part in parts] == [
        ["human_0.png", "pseudo_2.png"],
        ["human_1.png", "pseudo_3.png"],
    ]
    with pytest.raises(InputError, match=r"2 human-labeled images a step.*3 parts"):
        split_batch(_batch(0), 3)


def test_accumulation_by_config_key(student_config):
    student_config.SOLVER.ACCUMULATION_STEPS = 2
    with pytest.raises(InputError, match=r"PSEUDO_IMS_PER_BATCH = 1 does not divide.*ACCUMULATION_STEPS 2"):
        SelfTrainingTrainer(student_config)
    student_config.SOLVER.PSEUDO_IMS_PER_BATCH = 2
    student_config.SOLVER.MAX_ITER = 1
    trainer = SelfTrainingTrainer(student_config)
    trainer.train()
    assert trainer.model.label_counts["boxes"]["human"].images == 2  # one image a pass


def test_bfloat16(small_config):
    """Real mixed precision, on the CPU: near float32, and not float32."""
    cfg = _frozen_retinanet(small_config)
    precise, mixed = _three_steps(cfg), _three_steps(cfg, precision=torch.bfloat16)
    assert not mixed.grad_scaler.is_enabled()
    a, b = (t.storage.history("total_loss").latest() for t in (precise, mixed))
    assert a != b and b == pytest.approx(a, rel=0.02)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())


def test_gradients_are_clipped_as_the_config_says(student_config):
    """One step of plain SGD moves the weights by lr times the clipped gradient."""
    keys = student_config.SOLVER
    keys.CLIP_GRADIENTS.ENABLED, keys.CLIP_GRADIENTS.CLIP_TYPE = True, "norm"  # of each weight
    keys.CLIP_GRADIENTS.CLIP_VALUE, keys.MOMENTUM, keys.WEIGHT_DECAY, keys.MAX_ITER = 0.01, 0.0, 0.0, 1
    trainer = SelfTrainingTrainer(student_config)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    rate = trainer.optimizer.param_groups[0]["lr"]
    trainer.train()
    norms = torch.tensor([((b - p) / rate).norm() for b, p in zip(before, trainer.model.parameters())])
    assert norms.max().item() == pytest.approx(0.01, rel=1e-2)
    assert (norms > 0.0099).sum() > 10  # many were clipped, and to the same norm


# ---- losses that are not finite -----------------------------------------------------------------


class _Poisoned:
    """The trainer's loader with one infinite pixel in the pseudo image of some steps."""

    def __init__(self, loader, steps):
        self.loader, self.steps = loader, steps
        self.batch_sampler = loader.batch_sampler

    def __iter__(self):
        for step, batch in enumerate(self.loader):
            if step in self.steps:
                image = batch[-1]["image"].float()
                image[0, 50, 50] = float("inf")
                batch[-1]["image"] = image
            yield batch


def _poisoned_trainer(cfg, *steps):
    trainer = SelfTrainingTrainer(cfg)
    trainer._trainer.data_loader = _Poisoned(trainer.data_loader, steps)
    return trainer


def _without_batch_norm(cfg):
    """Batch norm would spread the NaN to human images."""
    return _frozen_retinanet(cfg)


@pytest.mark.parametrize("normalizer, half", [("batch", False), ("moving_average", False), ("batch", True)])
def test_the_run_stops_with_step_source_files_and_a_batch_to_replay(
    student_config, tmp_path, capsys, normalizer, half
):
    cfg = _without_batch_norm(student_config)
    cfg.MODEL.RETINANET.LOSS_NORMALIZER = normalizer
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION = half, "bfloat16"
    trainer = _poisoned_trainer(cfg, 2)
    with pytest.raises(NonFiniteLossError) as stop:
        trainer.train()
    message = str(stop.value)
    file = tmp_path / "output" / "not_finite_step_0000002_rank_0.pth"
    assert "at step 2, for pseudo labels" in message and str(file) in message
    pseudo = [w for w in message.split("Images: ")[1].split("; ")[0].split(", ")]
    assert len(pseudo) == 1 and pseudo[0].endswith(".png")
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())  # the step never reached them

    found = replay(file)
    assert found["step"] == 2 and found["parameters"] == []
    for name, value in found["saved_losses"].items():
        assert found["losses"][name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    assert found["module"].startswith("backbone.")
    assert [image["label_source"] for image in found["images"]] == ["human", "human", "pseudo"]
    assert found["images"][2]["pixels"][1] == float("inf")

    assert main(["replay", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "Step 2" in printed and pseudo[0] in printed and " to inf, " in printed


def test_steps_are_left_out_and_counted(student_config, caplog):
    """With batch norm: its statistics must not keep the NaN either."""
    student_config.SOLVER.MAX_SKIPPED_STEPS = 2
    student_config.SOLVER.MAX_ITER = 5
    trainer = _poisoned_trainer(student_config, 1, 2)
    logging.getLogger("selftrain_d2").propagate = True
    with caplog.at_level("WARNING", "selftrain_d2"):
        trainer.train()
    assert "The step is left out (2 of 2" in caplog.text
    for name, value in trainer.model.state_dict().items():
        assert torch.isfinite(value.float()).all(), name
    normalizer = trainer._hooks[0]
    assert normalizer.steps == 3  # two of five taught nothing
    checkpoint = torch.load(student_config.OUTPUT_DIR + "/model_final.pth", weights_only=True)
    assert checkpoint["trainer"]["_trainer"]["skipped_steps"] == 2

    student_config.SOLVER.MAX_SKIPPED_STEPS = 1
    with pytest.raises(NonFiniteLossError, match="at step 2"):
        _poisoned_trainer(student_config, 1, 2).train()


@pytest.mark.parametrize("half", [False, True])
def test_gradients_that_are_not_finite_never_reach_the_weights(student_config, tmp_path, half):
    """Though every loss is finite; and the checkpoint that is due at that step is not written."""
    cfg = _without_batch_norm(student_config)
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION = half, "bfloat16"
    trainer = SelfTrainingTrainer(cfg)
    weight = trainer.model.head.cls_score.weight
    weight.register_hook(lambda gradient: gradient / 0.0 if trainer.iter == 1 else gradient)
    with pytest.raises(NonFiniteLossError) as stop:
        trainer.train()
    message = str(stop.value)
    assert "losses are finite, but gradients are not (of 1 weights, e.g. head.cls_score.weight)" in message
    assert "at step 1" in message and "not_finite_step_0000001_rank_0.pth" in message
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert not (tmp_path / "output" / "model_0000001.pth").exists()

    cfg.SOLVER.MAX_SKIPPED_STEPS = 1
    trainer = SelfTrainingTrainer(cfg)
    weight = trainer.model.head.cls_score.weight
    weight.register_hook(lambda gradient: gradient / 0.0 if trainer.iter == 1 else gradient)
    trainer.train()
    assert trainer._trainer.skipped_steps == 1 and trainer._hooks[0].steps == cfg.SOLVER.MAX_ITER - 1


def test_the_message_says_how_little_the_pseudo_labels_were(student_config):
    with pytest.raises(NonFiniteLossError, match=r"(0 boxes|1 box) on 1 image\)"):
        _poisoned_trainer(_without_batch_norm(student_config), 0).train()


def test_weights_that_are_not_finite_are_named_as_the_cause(student_config):
    student_config.SOLVER.MAX_SKIPPED_STEPS = 10
    trainer = SelfTrainingTrainer(student_config)
    with torch.no_grad():
        trainer.model.head.cls_score.bias[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"the weights were not finite already"):
        trainer.train()


def test_the_command_ends_with_one_sentence(student_config, monkeypatch, capsys):
    from selftrain_d2.cli import train_net

    def fail(args):
        raise NonFiniteLossError("A loss is not finite at step 3.")

    monkeypatch.setattr(train_net, "run", fail)
    assert main(["train", "--config-file", "x.yaml"]) == 1
    assert capsys.readouterr().err == "selftrain-d2 train: error: A loss is not finite at step 3.\n"


@pytest.mark.parametrize("content", [b"not a checkpoint", None])
def test_a_file_that_is_no_saved_batch(tmp_path, capsys, content):
    file = tmp_path / "batch.pth"
    if content is None:
        torch.save({"model": {}}, file)
    else:
        file.write_bytes(content)
    assert main(["replay", str(file)]) == 2
    assert "is not a batch saved by training" in capsys.readouterr().err


def test_logged_scalars(student_config):
    student_config.SOLVER.MAX_ITER = 40
    SelfTrainingTrainer(student_config).train()
    with open(student_config.OUTPUT_DIR + "/metrics.json") as file:
        lines = [json.loads(line) for line in file]
    logged = next(line for line in lines if line["iteration"] == 39)
    assert logged["images_per_second"] > 0 and logged["alpha"] == 1.0
    assert logged["loss_ratio"] > 0 and "data_time" in logged
    # two pseudo images, one of them with a box that augmentation may push out
    assert 0.2 <= logged["pseudo_empty_share"] <= 0.9
    assert logged["human_boxes_per_image"] > logged["pseudo_boxes_per_image"] > 0
    assert logged["weighted_human_loss"] > 0 and logged["weighted_pseudo_loss"] > 0


def test_a_torch_without_a_scaler_for_every_device(monkeypatch, small_config):
    """torch 2.2 has CUDA's alone."""
    monkeypatch.delattr(torch.amp, "GradScaler", raising=False)
    trainer = _three_steps(_frozen_retinanet(small_config))
    assert trainer.iter == 3 and not trainer.grad_scaler.is_enabled()
