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
            # sum of d^(n - i) x_i, over the sum of the weights
            factors = decay ** np.arange(step, -1.0, -1.0)
            average = factors @ losses[: step + 1] / factors.sum()
            expected = 1 / (1 + alpha), alpha / (1 + alpha) * average[0] / average[1]
            assert normalizer.weights == pytest.approx(expected, rel=1e-6)


def test_the_ratio_is_not_that_of_the_first_batch():
    """True ratio 2, losses that vary by 30 %: after 1,000 steps it is known to 2 %, whatever came first."""
    ratios = []
    for seed in range(100):
        factors = np.random.default_rng(seed).lognormal(sigma=0.3, size=(1000, 2))
        normalizer = LossNormalizer()
        for human, pseudo in factors * [2.0, 1.0]:
            normalizer.update(human, pseudo)
        ratios.append(normalizer.ratio)
    low, high = np.percentile(ratios, [5, 95])
    assert 1.95 < low < high < 2.05  # an average that starts at the first loss: 1.20 and 3.36


@pytest.mark.parametrize("nothing", [None, 0.0])
def test_a_source_with_nothing_to_learn_from_enters_no_average(nothing):
    normalizer = LossNormalizer(ema_decay=0.5)
    normalizer.update(3.0, nothing)  # e.g. masks without a valid pixel
    assert normalizer.pseudo_average is None
    assert normalizer.weights == (0.5, 0.5)  # the ratio is 1 until both losses were seen
    normalizer.update(1.0, 2.0)
    assert normalizer.human_average == pytest.approx((0.5 * 3 + 1) / 1.5)
    assert normalizer.pseudo_average == 2.0
    normalizer.update(nothing, 4.0)
    assert normalizer.human_average == pytest.approx((0.5 * 3 + 1) / 1.5)
    assert normalizer.pseudo_average == pytest.approx((0.5 * 2 + 4) / 1.5)


def test_nearly_empty_pseudo_labels_are_not_amplified_without_end(caplog):
    """A student that has learned "nothing is there" meets one box: unbounded, its loss 0.03 would weigh 27."""
    batches = [(0.29, 1.6e-4)] * 50 + [(0.29, 0.03)]
    model = _TwoLosses()
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.register_hooks([LossNormalizer(alpha=1.0)])
    trainer.train(0, len(batches))
    weighted = trainer.storage.latest()["weighted_pseudo_loss"][0]
    assert weighted == pytest.approx(0.03 * 10 / 2)
    warnings = [r.getMessage() for r in caplog.records if "MAX_LOSS_RATIO 10" in r.getMessage()]
    assert len(warnings) == 1 and "0.00016" in warnings[0] and "Nearly empty pseudo labels" in warnings[0]
    # What the paper's runs have stays the paper's.
    normalizer = LossNormalizer()
    normalizer.update(9.9, 1.0)
    assert normalizer.ratio == pytest.approx(9.9)
    with pytest.raises(InputError, match="MAX_LOSS_RATIO"):
        LossNormalizer(max_ratio=0)


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


def test_state_survives():
    one, other = LossNormalizer(alpha=2.0), LossNormalizer(alpha=2.0)
    one.update(1.0, 3.0)
    other.load_state_dict(one.state_dict())
    one.update(2.0, 2.0)
    other.update(2.0, 2.0)
    assert one.weights == other.weights and one.state_dict() == other.state_dict()
    # Checkpoints from before averages were bias-corrected go on from the averages they have.
    old = LossNormalizer(ema_decay=0.5)
    old.load_state_dict({"human_average": 1.0, "pseudo_average": 3.0, "steps": 10})
    old.update(3.0, 3.0)
    assert old.human_average == pytest.approx(2.0, rel=1e-3) and old.pseudo_average == pytest.approx(3.0)


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
    weight, seen, averages = 1.0, [], None
    for step, batch in enumerate(batches):
        raw = [weight * x for x in batch]
        ratio = np.divide(*averages) if seen else 1.0
        expected = {"human_loss_weight": 1 / 3, "pseudo_loss_weight": 2 / 3 * ratio}
        expected["total_loss"] = raw[0] / 3 + raw[1] * 2 / 3 * ratio
        seen.append(raw)
        averages = np.average(seen, axis=0, weights=0.5 ** np.arange(step, -1.0, -1.0))
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
