from types import SimpleNamespace

import pytest
import torch
from torch import nn

from selftrain_d2 import InputError, SelfTrainingTrainer
from selftrain_d2.engine.hooks.weight_average import WeightAverage
from selftrain_d2.modeling.checkpoint import load_weights


@pytest.fixture
def config(student_config):
    student_config.SELFTRAIN.WEIGHT_EMA_DECAY = 0.5
    student_config.SOLVER.MAX_ITER = 6
    student_config.SOLVER.CHECKPOINT_PERIOD = 1
    return student_config


def _train(cfg, resume=False):
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def test_average_follows_the_formula(config, tmp_path):
    trainer = _train(config)
    expected = None
    for step in range(6):
        weights = torch.load(tmp_path / "output" / f"model_{step:07d}.pth", weights_only=True)["model"]
        if expected is None:
            expected = weights
            continue
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {
            name: decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
            for name, value in weights.items()
        }
    final = torch.load(tmp_path / "output" / "weight_average" / "model_final.pth", weights_only=True)
    assert final["classes"] == {"thing_classes": ["red", "green"]} and "input" in final
    changed = 0
    for name, value in final["model"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
        changed += not torch.equal(value, trainer.model.state_dict()[name])
    assert changed > 100
    # Each checkpoint carries the average so far.
    model = SelfTrainingTrainer.build_model(config)
    load_weights(model, str(tmp_path / "output" / "model_0000005.pth"), averaged=True)
    assert all(torch.equal(value, final["model"][name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="carries no moving average"):
        load_weights(model, str(tmp_path / "output" / "weight_average" / "model_final.pth"), averaged=True)
    # The file to resume from is the trained model's.
    assert (tmp_path / "output" / "last_checkpoint").read_text() == "model_final.pth"


def test_a_resumed_run_has_the_same_average(config, tmp_path):
    config.SOLVER.CHECKPOINT_PERIOD = 3
    _train(config)
    final = tmp_path / "output" / "weight_average" / "model_final.pth"
    expected = torch.load(final, weights_only=True)["model"]
    final.unlink()
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000002.pth")
    assert _train(config, resume=True).start_iter == 3
    average = torch.load(final, weights_only=True)["model"]
    assert all(torch.equal(average[name], expected[name]) for name in expected)


def test_the_average_is_evaluated_and_training_goes_on_without_it(config):
    config.DATASETS.TEST, config.TEST.EVAL_PERIOD = ("human",), 2
    config.SOLVER.MAX_ITER = config.SOLVER.CHECKPOINT_PERIOD = 4
    seen = []

    class Trainer(SelfTrainingTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            seen.append([p.detach().clone() for p in model.parameters()])
            return {"bbox": {"AP": 1.0}}

    torch.manual_seed(0)  # the weights that both begin with
    trainer = Trainer(config)
    trainer.train()
    torch.manual_seed(0)
    config.DATASETS.TEST = ()
    undisturbed = _train(config)
    assert len(seen) == 2
    average = trainer.weight_average.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(seen[-1], average))
    for a, b in zip(trainer.model.parameters(), undisturbed.model.parameters()):
        assert torch.equal(a, b)


def test_no_step_waits_for_a_gpu():
    """Tensors on the meta device have no values to wait for: asking for one is an error there."""
    hook = WeightAverage(0.9)
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    hook.trainer = SimpleNamespace(model=model)
    hook.before_train()
    for _ in range(3):
        hook.after_step()
    assert int(hook.state_dict()["n_averaged"]) == 3


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_that_is_none(decay):
    with pytest.raises(InputError, match="WEIGHT_EMA_DECAY"):
        WeightAverage(decay)
