"""Training in several processes needs the gradient of every parameter."""

from __future__ import annotations

from detectron2.engine import HookBase

from selftrain_d2.engine.hooks.loss_normalizer import model_of
from selftrain_d2.errors import InputError


class GradientCheck(HookBase):
    """Refuses, after the first step, a model with parameters that no loss depends on.

    DistributedDataParallel waits for the gradients of all parameters before it averages them over processes: without
    some, others differ between processes in the first step, and the second ends with an error. Put it before the hook
    that saves checkpoints.
    """

    def __init__(self) -> None:
        self._done = False

    def after_step(self) -> None:
        """
        Raises:
            InputError: naming such parameters.
        """
        if self._done:
            return
        trained = {name: p.grad for name, p in model_of(self.trainer).named_parameters() if p.requires_grad}
        without = [name for name, gradient in trained.items() if gradient is None]
        if len(without) == len(trained):  # the step was left out
            return
        if without:
            names = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
            raise InputError(
                f"No loss depends on {len(without)} parameters of the model ({names}), which training in several "
                "processes cannot have: build no levels or features that the heads do not use (IN_FEATURES of "
                "MODEL.FPN and of the heads, MODEL.EFFICIENTNET.OUT_FEATURES), or train in one process."
            )
        self._done = True
