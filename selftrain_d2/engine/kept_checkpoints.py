"""Which checkpoints of a run stay on the disk: the last ones, and the best by a metric of the validation set."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.engine import hooks
from detectron2.evaluation.testing import flatten_results_dict
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from selftrain_d2.engine.checkpoint_facts import CheckpointFacts
from selftrain_d2.engine.validation_loss import VALIDATION
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint import BEST_WEIGHTS, SafeDetectionCheckpointer, checkpoints_in, steps_of

logger = logging.getLogger(__name__)


class LastCheckpoints(hooks.PeriodicCheckpointer):
    """detectron2's hook, and of the checkpoints that it saves on the way only the last ones stay.

    fvcore's own ``max_to_keep`` knows those of this process alone: a resumed run would keep all from before.

    Args:
        checkpointer, period: of the hook.
        keep: how many; 0 for all. ``model_final.pth`` does not count.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, keep: int = 0):
        super().__init__(checkpointer, period)
        self.keep = keep

    def step(self, iteration: int, **kwargs: Any) -> None:
        super().step(iteration, **kwargs)
        if self.keep and (iteration + 1) % self.period == 0:
            steps = {file: steps_of(file) for file in checkpoints_in(self.checkpointer.save_dir)}
            numbered = [file for file in steps if math.isfinite(steps[file])]
            # By their steps: clocks of machines differ. First those after this one, of a run that was gone back on.
            numbered.sort(key=lambda file: (steps[file] <= iteration + 1, steps[file]))
            for file in numbered[: -self.keep]:
                os.remove(file)


class BestCheckpoint:
    """Keeps the weights with the best value of a metric, as they were evaluated, in ``OUTPUT_DIR/best/model_best.pth``.

    These are the averaged ones where evaluation is of the average. The file itself says how good they are and of which
    step: it is there whole or not at all, so that a resumed run goes on with what it finds. (detectron2's
    ``BestCheckpointer`` forgets the value, and makes its file the one to resume from.)

    Args:
        metric: a name as in ``metrics.json``: "bbox/AP", or "NAME/bbox/AP" with several names in DATASETS.TEST; of a
            project's own evaluator, any of its results. The higher the better; of the validation loss the lower.
        output: OUTPUT_DIR.
        facts: what checkpoints say of the run.
    """

    def __init__(self, metric: str, output: str, facts: Mapping[str, CheckpointFacts]):
        self.metric = metric
        self.output = output
        self.facts = facts
        self.best: dict[str, Any] | None = None

    def begin(self, start_iter: int) -> None:
        """Before the first step: take what the run has found so far, which is nothing for one that begins anew."""
        file = os.path.join(self.output, BEST_WEIGHTS)
        if start_iter == 0 and os.path.exists(file):
            os.remove(file)
        self.best = best_of(self.output)
        if self.best is not None and self.best["metric"] != self.metric:
            logger.warning(
                f"The best checkpoint so far is by {self.best['metric']}, not by TEST.BEST_METRIC {self.metric}: it "
                "gives way to the next that is evaluated."
            )
            self.best = None

    def update(self, results: Mapping[str, Any], steps: int, model: nn.Module) -> None:
        """Save a model if it is better than all before it.

        Args:
            results: of its evaluation.
            steps: that it was trained for.

        Raises:
            InputError: the metric is not among the results, or the file cannot be written.
        """
        values = {name: float(value) for name, value in flatten_results_dict(dict(results)).items()}
        if self.metric not in values:
            found = ", ".join(sorted(values)) or "no results"
            raise InputError(f"TEST.BEST_METRIC is {self.metric!r}, but the evaluation has {found}.")
        value = values[self.metric] if math.isfinite(values[self.metric]) else None
        if not self._is_better(value):
            return
        self.best = {"metric": self.metric, "value": value, "steps": steps}
        folder, name = os.path.split(os.path.join(self.output, BEST_WEIGHTS))
        os.makedirs(folder, exist_ok=True)
        # A checkpointer of its own: this file is not one to resume from.
        checkpointer = SafeDetectionCheckpointer(model, folder, **self.facts)
        checkpointer.save(os.path.splitext(name)[0], best=self.best)
        logger.info(f"The best so far: {self.metric} {value} after {steps} steps.")

    def _is_better(self, value: float | None) -> bool:
        if self.best is None:
            return True
        before = self.best["value"]
        if before is None or value is None:
            return before is None and value is not None
        return value < before if f"{VALIDATION}/" in self.metric else value > before


def best_of(output: str | os.PathLike) -> dict[str, Any] | None:
    """``metric``, ``value`` (None for NaN) and ``steps`` of the best checkpoint of a run; None if it has none."""
    file = os.path.join(output, BEST_WEIGHTS)
    if not os.path.isfile(file):
        return None
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["best"]  # no tensor is read
