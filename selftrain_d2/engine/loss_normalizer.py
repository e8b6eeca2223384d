"""The normalized loss of self-training (Appendix B of the paper) as a detectron2 hook."""

from __future__ import annotations

import math
from typing import Any

import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.meta_arch.by_source import LABEL_SOURCES


def model_of(trainer: TrainerBase) -> torch.nn.Module:
    """A trainer's model, without the wrapper for several processes."""
    model = trainer.model
    return model.module if isinstance(model, DistributedDataParallel) else model


class LossNormalizer(HookBase):
    """Weighs the human and the pseudo loss of every step.

    With L_h and L_p the losses of a step, and avg their exponential moving averages::

        L = 1 / (1 + alpha) * (L_h + alpha * avg(L_h) / avg(L_p) * L_p)

    (paper, Appendix B). The ratio of the averages is a constant for the gradient. With
    ``normalize=False`` the loss is the plain sum ``L_h + alpha * L_p``.

    detectron2 calls hooks before and after a step, never between forward and backward. So the hook gives
    the model its weights before the step, and takes the raw losses after it: the averages lag one step.
    In the first step, before any loss was seen, the ratio is 1. The averages start at the first losses.

    The trainer's model must have the two attributes of
    :class:`~selftrain_d2.modeling.meta_arch.LossesBySource`: ``loss_weights`` and ``raw_losses``.
    The trainer itself may be any of detectron2's (SimpleTrainer, AMPTrainer, DefaultTrainer) or your own.

    Args:
        alpha: weight of the pseudo loss, >= 0. The paper uses 0.25 - 4.
        ema_decay: decay per step of the moving averages, in [0, 1). The paper uses 0.9997.
        normalize: False for the plain sum.
        warmup_steps: alpha rises linearly from 0 over these steps (a ramp-up, as in Laine and Aila,
            arXiv:1610.02242). 0, the paper's: constant.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        ema_decay: float = 0.9997,
        normalize: bool = True,
        warmup_steps: int = 0,
    ):
        if not (math.isfinite(alpha) and alpha >= 0):
            raise InputError(f"SELFTRAIN.ALPHA must be a number >= 0, not {alpha}.")
        if not 0 <= ema_decay < 1:
            raise InputError(f"SELFTRAIN.EMA_DECAY must be in [0, 1), not {ema_decay}.")
        if warmup_steps < 0:
            raise InputError(f"SELFTRAIN.ALPHA_WARMUP_ITERS must be >= 0, not {warmup_steps}.")
        self.alpha = float(alpha)
        self.ema_decay = float(ema_decay)
        self.normalize = bool(normalize)
        self.warmup_steps = int(warmup_steps)
        #: steps seen: calls of :meth:`update`
        self.steps = 0
        self.human_average: float | None = None
        self.pseudo_average: float | None = None

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
        """avg(L_h) / avg(L_p); 1 while a loss is unseen or avg(L_p) is zero, where any finite value does."""
        if self.human_average is None or not self.pseudo_average:
            return 1.0
        return self.human_average / self.pseudo_average

    def update(self, human_loss: float, pseudo_loss: float) -> None:
        """Move both averages by one step's raw (unweighted) losses.

        Raises:
            FloatingPointError: a loss is NaN or infinite. The averages stay as they were.
        """
        for source, loss in zip(LABEL_SOURCES, (human_loss, pseudo_loss)):
            if not math.isfinite(loss):
                raise FloatingPointError(f"The {source} loss is {loss}.")
        self.human_average = self._moved(self.human_average, float(human_loss))
        self.pseudo_average = self._moved(self.pseudo_average, float(pseudo_loss))
        self.steps += 1

    def _moved(self, average: float | None, value: float) -> float:
        return value if average is None else self.ema_decay * average + (1 - self.ema_decay) * value

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
        self.trainer.storage.put_scalars(
            human_loss=human_loss,
            pseudo_loss=pseudo_loss,
            human_loss_average=self.human_average,
            pseudo_loss_average=self.pseudo_average,
            human_loss_weight=human_weight,
            pseudo_loss_weight=pseudo_weight,
            weighted_human_loss=human_weight * human_loss,
            weighted_pseudo_loss=pseudo_weight * pseudo_loss,
            loss_ratio=ratio,
            alpha=alpha,
            smoothing_hint=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Both moving averages (None before the first step) and the number of steps."""
        return {
            "human_average": self.human_average,
            "pseudo_average": self.pseudo_average,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` gave."""
        self.human_average = state["human_average"]
        self.pseudo_average = state["pseudo_average"]
        self.steps = state["steps"]


def check_keeps_losses_apart(model: nn.Module) -> None:
    """Raise InputError unless a model has human and pseudo losses of its own for LossNormalizer to weigh."""
    if not hasattr(model, "raw_losses"):
        raise InputError(
            f"{type(model).__name__} does not keep human and pseudo losses apart: put SelfTraining "
            "before the name in MODEL.META_ARCHITECTURE, or mix LossesBySource into a class of your own."
        )
