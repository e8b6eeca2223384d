"""The learning rate of a run whose last steps are on human labels alone (SELFTRAIN.REFINE_ITERS)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler

from selftrain_d2.data.loader import mixed_steps
from selftrain_d2.errors import InputError


class RefiningSchedule(ParamScheduler):
    """A schedule, then a constant for the last steps of a run.

    Args:
        schedule: of the steps before.
        steps, all_steps: their number, and that of the whole run.
        factor: of the last steps.
    """

    def __init__(self, schedule: ParamScheduler, steps: int, all_steps: int, factor: float):
        self.schedule = schedule
        self.steps = steps
        self.all_steps = all_steps
        self.factor = factor

    def __call__(self, where: float) -> float:
        step = round(where * self.all_steps)
        return self.schedule(step / self.steps) if step < self.steps else self.factor


def refining_schedule(
    cfg: CfgNode,
    optimizer: torch.optim.Optimizer,
    build: Callable[[CfgNode, torch.optim.Optimizer], LRMultiplier],
) -> LRMultiplier:
    """The schedule of a run of MAX_ITER - REFINE_ITERS steps, then SOLVER.BASE_LR x SELFTRAIN.REFINE_LR_FACTOR.

    Args:
        build: makes the schedule of a config without REFINE_ITERS.

    Raises:
        InputError: no step is left before the last ones; or as ``build``.
    """
    steps = mixed_steps(cfg)
    if steps < 1:
        raise InputError(
            f"SELFTRAIN.REFINE_ITERS is {cfg.SELFTRAIN.REFINE_ITERS}, which leaves nothing of SOLVER.MAX_ITER "
            f"{cfg.SOLVER.MAX_ITER} to learn from pseudo labels in: make it smaller."
        )
    before = cfg.clone()
    before.defrost()
    before.SOLVER.MAX_ITER, before.SELFTRAIN.REFINE_ITERS = steps, 0
    schedule = build(before, optimizer)._multiplier  # detectron2 builds it no other way
    whole = RefiningSchedule(schedule, steps, cfg.SOLVER.MAX_ITER, cfg.SELFTRAIN.REFINE_LR_FACTOR)
    return LRMultiplier(optimizer, whole, cfg.SOLVER.MAX_ITER)
