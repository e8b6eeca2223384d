import math

import numpy as np
import pytest
import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from selftrain_d2 import InputError, LossNormalizer


def test_first_step_has_ratio_one():
    normalizer = LossNormalizer(alpha=3.0)
    assert normalizer.weights == (1 / 4, 3 / 4)


def test_averages_start_at_the_first_losses():
    normalizer = LossNormalizer(alpha=1.0)
    normalizer.update(2.0, 8.0)
    assert (normalizer.human_average, normalizer.pseudo_average) == (2.0, 8.0)
    # 1 / (1 + 1) and 1 / (1 + 1) * 1 * 2 / 8
    assert normalizer.weights == (0.5, 0.125)


def test_plain_sum():
    normalizer = LossNormalizer(alpha=2.5, normalize=False)
    normalizer.update(2.0, 8.0)
    assert normalizer.weights == (1.0, 2.5)


@pytest.mark.parametrize("alpha", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("decay", [0.9997, 0.9, 0.0])
def test_thousand_recorded_steps(alpha, decay):
    """The formula of Appendix B, with the averages as a closed sum in float64."""
    losses = np.random.default_rng(0).gamma(2.0, 1.0, (1000, 2)) * [1.0, 0.3]
    normalizer = LossNormalizer(alpha, decay)
    for step, (human, pseudo) in enumerate(losses):
        normalizer.update(human, pseudo)
        if step in (0, 1, 10, 999):
            # d^n x_0 + (1 - d) * sum_{i=1..n} d^(n - i) x_i
            factors = decay ** np.arange(step, -1.0, -1.0) * np.where(np.arange(step + 1) == 0, 1, 1 - decay)
            average = factors @ losses[: step + 1]
            expected = 1 / (1 + alpha), alpha / (1 + alpha) * average[0] / average[1]
            assert normalizer.weights == pytest.approx(expected, rel=1e-6)


def test_alpha_rises_linearly():
    normalizer = LossNormalizer(alpha=2.0, warmup_steps=4)
    seen = []
    for _ in range(6):
        seen.append(normalizer.current_alpha)
        assert normalizer.weights == pytest.approx((1 / (1 + seen[-1]), seen[-1] / (1 + seen[-1])))
        normalizer.update(1.0, 1.0)
    assert seen == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    resumed = LossNormalizer(alpha=2.0, warmup_steps=4)
    resumed.load_state_dict({"human_average": 1.0, "pseudo_average": 1.0, "steps": 3})
    assert resumed.current_alpha == 1.5
    with pytest.raises(InputError, match="ALPHA_WARMUP_ITERS"):
        LossNormalizer(warmup_steps=-1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_and_not_averaged(bad):
    normalizer = LossNormalizer()
    normalizer.update(1.0, 2.0)
    with pytest.raises(FloatingPointError, match="pseudo"):
        normalizer.update(5.0, bad)
    with pytest.raises(FloatingPointError, match="human"):
        normalizer.update(bad, 5.0)
    assert (normalizer.human_average, normalizer.pseudo_average) == (1.0, 2.0)


def test_vanishing_losses_keep_the_weights_finite():
    normalizer = LossNormalizer(ema_decay=0.5)
    normalizer.update(1.0, 0.0)
    assert all(math.isfinite(w) for w in normalizer.weights)


def test_state_survives():
    one, other = LossNormalizer(alpha=2.0), LossNormalizer(alpha=2.0)
    one.update(1.0, 3.0)
    other.load_state_dict(one.state_dict())
    one.update(2.0, 2.0)
    other.update(2.0, 2.0)
    assert one.weights == other.weights and one.state_dict() == other.state_dict()


@pytest.mark.parametrize("arguments", [{"alpha": -1.0}, {"alpha": math.nan}, {"ema_decay": 1.0}])
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(InputError, match="SELFTRAIN"):
        LossNormalizer(**arguments)


class _TwoLosses(nn.Module):
    """The hook's protocol, with losses that are simple to work out."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.loss_weights, self.raw_losses = (1.0, 1.0), {"human": None, "pseudo": None}

    def forward(self, batch):
        human, pseudo = (self.weight * x for x in batch)
        self.raw_losses = {"human": human.detach().squeeze(), "pseudo": pseudo.detach().squeeze()}
        return {"human": self.loss_weights[0] * human.sum(), "pseudo": self.loss_weights[1] * pseudo.sum()}


def test_as_a_hook_of_the_unchanged_simple_trainer():
    batches = [(3.0, 5.0), (1.0, 2.0), (4.0, 1.0)]
    model = _TwoLosses()
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1))
    logged = []
    normalizer = LossNormalizer(alpha=2.0, ema_decay=0.5)

    class Recorder(type(normalizer).__mro__[1]):
        def after_step(self):
            logged.append({k: v[0] for k, v in self.trainer.storage.latest().items()})

    trainer.register_hooks([normalizer, Recorder()])
    trainer.train(0, 3)

    # The same three steps by hand.
    weight, averages = 1.0, None
    for step, batch in enumerate(batches):
        raw = [weight * x for x in batch]
        ratio = 1.0 if averages is None else averages[0] / averages[1]
        expected = {"human_loss_weight": 1 / 3, "pseudo_loss_weight": 2 / 3 * ratio}
        expected["total_loss"] = raw[0] / 3 + raw[1] * 2 / 3 * ratio
        averages = raw if averages is None else [0.5 * a + 0.5 * x for a, x in zip(averages, raw)]
        expected.update(zip(("human_loss", "pseudo_loss"), raw))
        expected.update(zip(("human_loss_average", "pseudo_loss_average"), averages))
        assert {k: logged[step][k] for k in expected} == pytest.approx(expected)
        weight -= 0.1 * (batch[0] / 3 + batch[1] * 2 / 3 * ratio)
    assert model.weight.item() == pytest.approx(weight)


def test_a_model_that_mixes_the_losses_is_refused():
    model = nn.Linear(1, 1)
    trainer = SimpleTrainer(model, [], torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.register_hooks([LossNormalizer()])
    with pytest.raises(InputError, match="META_ARCHITECTURE"):
        trainer.train(0, 1)
