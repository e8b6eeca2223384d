"""What a resumed run needs besides weights, optimizer and schedule, to go on as if it had never stopped."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from selftrain_d2.engine.loss_normalizer import model_of


class RunState(HookBase):
    """Keeps torch's random states and the model's own moving averages in every checkpoint.

    With it, a fixed SEED, and a loader that continues at the step where training stopped
    (``MixedBatchSampler.first_batch``), a run that was killed and resumed gives the same weights as one that
    was not: bit for bit on a CPU in one process, on GPUs as far as their kernels are deterministic. In several
    processes the first one's state is kept.

    It must be the last hook: what other hooks draw before training starts must not count.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        averages = getattr(model_of(self.trainer), "positive_anchor_averages", {})
        state = {"cpu": torch.get_rng_state(), "positive_anchor_averages": dict(averages)}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def before_train(self) -> None:
        if self._loaded is None:
            return
        state, self._loaded = self._loaded, None
        if state["positive_anchor_averages"]:
            model_of(self.trainer).positive_anchor_averages = dict(state["positive_anchor_averages"])
        if comm.get_rank() == 0:  # processes draw apart: one state for all would tie them
            torch.set_rng_state(state["cpu"])
            if "cuda" in state and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"])
