from types import SimpleNamespace

import pytest
import torch
from torch import nn

from selftrain_d2.engine.hooks.gradient_check import GradientCheck
from selftrain_d2.errors import InputError


@pytest.fixture
def hook():
    """Of a trainer whose model has parameters that are used, not used, and frozen."""
    hook = GradientCheck()
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("used", "unused", "frozen")})
    model["frozen"].requires_grad_(False)
    hook.trainer = SimpleNamespace(model=model)
    return hook


def test_parameters_without_gradient(hook):
    hook.after_step()  # a step that was left out has no gradient at all
    hook.trainer.model["used"](torch.ones(2)).sum().backward()
    with pytest.raises(InputError, match=r"No loss depends on 1 parameters of the model \(unused\.weight\)"):
        hook.after_step()


def test_all_have_one(hook):
    model = hook.trainer.model
    (model["used"](torch.ones(2)) + model["unused"](torch.ones(2))).sum().backward()
    hook.after_step()
    model["used"].weight.grad = None
    hook.after_step()  # the first step is enough
