"""A moving average of the weights, for evaluation and as the next teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel

from selftrain_d2.engine.hooks.loss_normalizer import model_of
from selftrain_d2.errors import InputError


class WeightAverage(HookBase):
    """Keeps an exponential moving average of weights and batch-norm statistics.

    The decay of step n is ``min(decay, (1 + n) / (10 + n))``, as in TensorFlow's ExponentialMovingAverage with
    ``num_updates``: a short run does not end with the weights that it began with.

    Args:
        decay: in (0, 1); EfficientNet's is 0.9999.
        steps_before: n of the first step. From 1 on the weights that training begins with have a part in the average.
    """

    def __init__(self, decay: float, steps_before: int = 0):
        if not 0 < decay < 1:
            raise InputError(f"SELFTRAIN.WEIGHT_EMA_DECAY must be in [0, 1), not {decay}.")
        self.decay = decay
        self.steps_before = steps_before
        self._average: AveragedModel | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights."""
        assert self._average is not None, "Training has not begun."
        return self._average.module

    def before_train(self) -> None:
        # Made here, not before: weights are loaded by now.
        self._average = AveragedModel(model_of(self.trainer), use_buffers=True)
        if self._loaded is not None:
            self._average.load_state_dict(self._loaded)
            self._loaded = None

    @torch.no_grad()
    def after_step(self) -> None:
        # AveragedModel.update_parameters moves the number of updates to the GPU, and so waits for it.
        updates = self._average.n_averaged  # on the CPU
        n = int(updates) + self.steps_before
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        model = model_of(self.trainer)
        averages = (*self.model.parameters(), *self.model.buffers())
        pairs = list(zip(averages, (*model.parameters(), *model.buffers())))
        moved = [pair for pair in pairs if pair[1].is_floating_point()]
        copied = [pair for pair in pairs if not pair[1].is_floating_point()]  # numbers of batches
        torch._foreach_lerp_([a for a, _ in moved], [v for _, v in moved], 1 - decay)
        if copied:
            torch._foreach_copy_([a for a, _ in copied], [v for _, v in copied])
        updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the trainer's model has the averaged weights."""
        model = model_of(self.trainer)
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.model.state_dict())
        try:
            yield
        finally:
            model.load_state_dict(trained)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._average is None else self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state or None
