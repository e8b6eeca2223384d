"""The normalized loss of self-training (Appendix B of the paper) as a detectron2 hook."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.meta_arch.by_source import LABEL_SOURCES, pseudo_labels_in_words

logger = logging.getLogger(__name__)


def model_of(trainer: TrainerBase) -> torch.nn.Module:
    """A trainer's model, without the wrapper for several processes."""
    model = trainer.model
    return model.module if isinstance(model, DistributedDataParallel) else model


class BiasCorrectedAverage:
    """An exponential moving average without a start value: ``(1 - d) * sum of d^(n-i) x_i``, over ``1 - d^n``.

    Args:
        decay: d, in [0, 1).
    """

    def __init__(self, decay: float):
        self.decay = decay
        #: the average; None before the first value
        self.value: float | None = None
        #: values seen
        self.count = 0

    def update(self, value: float) -> None:
        """Move the average by one value."""
        self.count += 1
        old = value if self.value is None else self.value
        self.value = old + (1 - self.decay) / (1 - self.decay**self.count) * (value - old)


class LossNormalizer(HookBase):
    """Weighs the human and the pseudo loss of every step.

    With L_h and L_p the losses of a step, and avg their exponential moving averages::

        L = 1 / (1 + alpha) * (L_h + alpha * avg(L_h) / avg(L_p) * L_p)

    (paper, Appendix B). The ratio of the averages is a constant for the gradient. With
    ``normalize=False`` the loss is the plain sum ``L_h + alpha * L_p``.

    The averages are bias-corrected: those of n losses x_i have the weights ``d^(n-i)`` over their sum, so that the
    first losses weigh no more than the next ones. (An average that starts at the first loss is mostly that one for
    thousands of steps: at 0.9997, 0.41 of it after 3,000.) The ratio is 1 until both losses were seen.

    A source that has nothing to learn from in a step (no image, no valid pixel) has the loss None or 0, which
    enters no average.

    detectron2 calls hooks before and after a step, never between forward and backward. So the hook gives
    the model its weights before the step, and takes the raw losses after it: the averages lag one step.

    The trainer's model must have the two attributes of
    :class:`~selftrain_d2.modeling.meta_arch.LossesBySource`: ``loss_weights`` and ``raw_losses``.
    The trainer itself may be any of detectron2's (SimpleTrainer, AMPTrainer, DefaultTrainer) or your own.

    Args:
        alpha: weight of the pseudo loss, >= 0. The paper uses 0.25 - 4.
        ema_decay: decay per step of the moving averages, in [0, 1). The paper uses 0.9997.
        normalize: False for the plain sum.
        warmup_steps: alpha rises linearly from 0 over these steps (a ramp-up, as in Laine and Aila,
            arXiv:1610.02242). 0, the paper's: constant.
        max_ratio: the ratio is held at this, > 0. Pseudo labels that are nearly empty are learned to a loss near zero
            ("nothing is there"); without a bound the ratio then grows without end, and the first step that does have
            a box is multiplied by thousands.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        ema_decay: float = 0.9997,
        normalize: bool = True,
        warmup_steps: int = 0,
        max_ratio: float = 10.0,
    ):
        if not (math.isfinite(alpha) and alpha >= 0):
            raise InputError(f"SELFTRAIN.ALPHA must be a number >= 0, not {alpha}.")
        if not 0 <= ema_decay < 1:
            raise InputError(f"SELFTRAIN.EMA_DECAY must be in [0, 1), not {ema_decay}.")
        if warmup_steps < 0:
            raise InputError(f"SELFTRAIN.ALPHA_WARMUP_ITERS must be >= 0, not {warmup_steps}.")
        if not max_ratio > 0:
            raise InputError(f"SELFTRAIN.MAX_LOSS_RATIO must be above 0, not {max_ratio}.")
        self.alpha = float(alpha)
        self.ema_decay = float(ema_decay)
        self.normalize = bool(normalize)
        self.warmup_steps = int(warmup_steps)
        self.max_ratio = float(max_ratio)
        #: steps seen: calls of :meth:`update`
        self.steps = 0
        self._averages = {source: BiasCorrectedAverage(self.ema_decay) for source in LABEL_SOURCES}
        self._warned = False

    @property
    def human_average(self) -> float | None:
        """Bias-corrected moving average of the human loss; None before the first."""
        return self._averages["human"].value

    @property
    def pseudo_average(self) -> float | None:
        """Bias-corrected moving average of the pseudo loss; None before the first."""
        return self._averages["pseudo"].value

    @property
    def current_alpha(self) -> float:
        """Alpha of the next step."""
        return self.alpha * min(1.0, self.steps / self.warmup_steps) if self.warmup_steps else self.alpha

    @property
    def weights(self) -> tuple[float, float]:
        """Weights (human, pseudo) of the next step's raw losses."""
        alpha = self.current_alpha
        if not self.normalize:
            return 1.0, alpha
        return 1 / (1 + alpha), alpha * self.ratio / (1 + alpha)

    @property
    def ratio(self) -> float:
        """avg(L_h) / avg(L_p), at most ``max_ratio``; 1 until both losses were seen."""
        return min(self._unbounded_ratio, self.max_ratio)

    @property
    def _unbounded_ratio(self) -> float:
        if self.human_average is None or self.pseudo_average is None:
            return 1.0
        return self.human_average / self.pseudo_average

    def update(self, human_loss: float | None, pseudo_loss: float | None) -> None:
        """Move the averages by one step's raw (unweighted) losses.

        Args:
            human_loss, pseudo_loss: None or 0 where that source has nothing to learn from: its average stays.

        Raises:
            FloatingPointError: a loss is NaN or infinite. The averages stay as they were.
        """
        losses = dict(zip(LABEL_SOURCES, (human_loss, pseudo_loss)))
        for source, loss in losses.items():
            if loss is not None and not math.isfinite(loss):
                raise FloatingPointError(f"The {source} loss is {loss}.")
        for source, loss in losses.items():
            if loss:
                self._averages[source].update(loss)
        self.steps += 1

    # ---- as a hook --------------------------------------------------------------------------------

    def before_train(self) -> None:
        check_keeps_losses_apart(model_of(self.trainer))

    def before_step(self) -> None:
        model_of(self.trainer).loss_weights = self.weights

    def after_step(self) -> None:
        raw = model_of(self.trainer).raw_losses
        if raw["pseudo"] is None:  # a supervised step, or one that was left out: nothing to balance
            return
        # Every process must hold the same averages, or their gradients would be weighed differently.
        losses = torch.stack([raw["human"], raw["pseudo"]]).detach().double()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(losses)
            losses /= comm.get_world_size()
        human_loss, pseudo_loss = losses.tolist()
        human_weight, pseudo_weight = model_of(self.trainer).loss_weights
        alpha, ratio = self.current_alpha, self.ratio  # those that the step was weighed with
        try:
            self.update(human_loss, pseudo_loss)
        except FloatingPointError as error:
            raise FloatingPointError(f"Step {self.trainer.iter}: {error}") from None
        averages = {f"{source}_loss_average": average.value for source, average in self._averages.items()}
        self.trainer.storage.put_scalars(
            human_loss=human_loss,
            pseudo_loss=pseudo_loss,
            **{name: value for name, value in averages.items() if value is not None},
            human_loss_weight=human_weight,
            pseudo_loss_weight=pseudo_weight,
            weighted_human_loss=human_weight * human_loss,
            weighted_pseudo_loss=pseudo_weight * pseudo_loss,
            loss_ratio=ratio,
            alpha=alpha,
            smoothing_hint=False,
        )
        self._warn_of_bound()

    def _warn_of_bound(self) -> None:
        """Once each time that the ratio begins to be held."""
        held = self.normalize and self._unbounded_ratio > self.max_ratio
        if held and not self._warned and comm.is_main_process():
            logger.warning(
                f"Step {self.trainer.iter}: the pseudo loss is {self.pseudo_average:.3g} on average against "
                f"{self.human_average:.3g} of the human one, so there is next to nothing to learn from the pseudo "
                f"labels; their ratio is held at SELFTRAIN.MAX_LOSS_RATIO {self.max_ratio:g}. Nearly empty pseudo "
                f"labels do that: {pseudo_labels_in_words(model_of(self.trainer))} in this step. Lower "
                "SELFTRAIN.SCORE_THRESH, or train the teacher longer."
            )
        self._warned = held

    def state_dict(self) -> dict[str, Any]:
        """Both moving averages (None before the first loss), the losses in each, and the number of steps."""
        state: dict[str, Any] = {"steps": self.steps}
        for source, average in self._averages.items():
            state.update({f"{source}_average": average.value, f"{source}_count": average.count})
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` gave, in this version or one before there were counts."""
        self.steps = state["steps"]
        for source, average in self._averages.items():
            average.value = state[f"{source}_average"]
            average.count = state.get(f"{source}_count", self.steps)


def check_keeps_losses_apart(model: nn.Module) -> None:
    """Raise InputError unless a model has human and pseudo losses of its own for LossNormalizer to weigh."""
    if not hasattr(model, "raw_losses"):
        raise InputError(
            f"{type(model).__name__} does not keep human and pseudo losses apart: put SelfTraining "
            "before the name in MODEL.META_ARCHITECTURE, or mix LossesBySource into a class of your own."
        )
