"""What a resumed run needs besides weights, optimizer and schedule, to go on as if it had never stopped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.solver import LRMultiplier
from detectron2.utils import comm

from selftrain_d2.engine.hooks.loss_normalizer import model_of

logger = logging.getLogger(__name__)


class RunState(HookBase):
    """Seeds every step, and keeps the model's own moving averages in every checkpoint.

    A step's random numbers (drop connect, sampled proposals) depend on the seed, the step and the process
    alone. So with a loader that continues at the step where training stopped
    (``MixedBatchSampler.first_batch``), a run that was killed and resumed gives the same weights as one that
    was not: bit for bit on a CPU, on GPUs as far as their kernels are deterministic. And neither evaluation on
    the way nor any hook before this one changes the training.

    Args:
        seed: of the run; None leaves torch's random states alone.
    """

    def __init__(self, seed: int | None):
        self.seed = seed
        self._loaded: dict[str, Any] | None = None

    def before_train(self) -> None:
        if self._loaded:
            # Checkpoints of earlier versions have averages alone.
            model_of(self.trainer).positive_anchor_averages = {
                source: (value, 1.0) if isinstance(value, float) else tuple(value)
                for source, value in self._loaded.items()
            }

    def before_step(self) -> None:
        if self.seed is not None:
            torch.manual_seed(step_seed(self.seed, self.trainer.iter, comm.get_rank()))

    def state_dict(self) -> dict[str, Any]:
        averages = getattr(model_of(self.trainer), "positive_anchor_averages", {})
        return {"positive_anchor_averages": dict(averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state["positive_anchor_averages"]


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's random numbers of one step in one process."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    return int(state) >> 1  # numpy 1 shifts no uint64 by an int


def optimizer_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Each group's options (``initial_lr``, ``weight_decay``, ``momentum``, ...) without the step's learning rate."""
    return [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]


def set_optimizer_options(
    optimizer: torch.optim.Optimizer, scheduler: LRMultiplier, options: Sequence[dict[str, Any]]
) -> None:
    """Give an optimizer that was loaded from a checkpoint the options that its config has now.

    PyTorch restores those of the checkpoint, SOLVER.BASE_LR among them. The schedule (STEPS, GAMMA, MAX_ITER, ...) is
    the config's anyway. Where nothing changed, every number stays as it is.

    Args:
        options: of the config, by :func:`optimizer_options` before the checkpoint was loaded.
    """
    changed = {}
    for group, wanted in zip(optimizer.param_groups, options):
        changed.update({k: (group.get(k), value) for k, value in wanted.items() if group.get(k) != value})
        group.update(wanted)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, scheduler.get_lr()):
        group["lr"] = lr
    if changed:
        text = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())
        logger.info(f"Going on with other options of the optimizer than before: {text}.")
