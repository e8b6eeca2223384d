"""Experiment trackers, W&B and MLflow, as writers of detectron2 (SELFTRAIN.TRACKERS)."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from selftrain_d2.engine.flat_config import flat_config
from selftrain_d2.errors import InputError
from selftrain_d2.files import read_json, write_json

logger = logging.getLogger(__name__)

#: W&B's project and MLflow's experiment, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise.
PROJECT = "selftrain_d2"
#: In OUTPUT_DIR: the run's id at each tracker.
RUN_IDS = "trackers.json"


class Tracker(EventWriter):
    """Sends config and scalars of a training run to a tracker.

    A resumed run goes on in the tracker's run of before. Nothing that a tracker raises stops the training: there is one
    warning, and nothing is sent any more.

    Args:
        cfg: of the run; its OUTPUT_DIR names the run, and the folder above that the group of runs.
        window_size: scalars are the median over so many steps, as in ``metrics.json``.
    """

    #: In SELFTRAIN.TRACKERS, also of the extra to install and of the module.
    name: str

    def __init__(self, cfg: CfgNode, window_size: int = 20):
        self.config = flat_config(cfg)
        self.output = Path(os.path.abspath(cfg.OUTPUT_DIR))
        self.window_size = window_size
        #: set before `close`: whether training came to its end.
        self.finished = False
        self._running = False
        self._last_write = -1

    def begin(self, start_iter: int) -> None:
        """Before the first step: begin a run, or go on with that of before."""
        with self._never_raising():
            ids = read_json(self.output / RUN_IDS) if (self.output / RUN_IDS).exists() else {}
            run_id = self.start(ids.get(self.name) if start_iter else None)
            write_json(self.output / RUN_IDS, {**ids, self.name: run_id})
            self._running = True

    def write(self) -> None:
        if not self._running:
            return
        by_step: dict[int, dict[str, float]] = {}
        for name, (value, step) in get_event_storage().latest_with_smoothing_hint(self.window_size).items():
            if step > self._last_write:  # the rest was sent before
                by_step.setdefault(step, {})[name] = float(value)
        self._last_write = max(by_step, default=self._last_write)
        with self._never_raising():
            for step in sorted(by_step):
                self.log(by_step[step], step)

    def close(self) -> None:
        if self._running:
            with self._never_raising():
                self.finish()
        self._running = False

    @contextlib.contextmanager
    def _never_raising(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._running = False
            logger.warning(
                f"The tracker {self.name} failed ({type(error).__name__}: {error}): training goes on without it, and "
                "metrics.json has all."
            )

    @abstractmethod
    def start(self, run_id: str | None) -> str:
        """Begin a run, or go on with one, and give its id."""

    @abstractmethod
    def log(self, scalars: dict[str, float], step: int) -> None:
        """Send the scalars of one step."""

    @abstractmethod
    def finish(self) -> None:
        """End the run."""


class WandbTracker(Tracker):
    """W&B. Its environment variables hold: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ... Its files are in OUTPUT_DIR."""

    name = "wandb"

    def start(self, run_id: str | None) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(self.output),
            config=self.config,
            name=self.output.name,
            group=self.output.parent.name,
            id=run_id,
            resume="allow",
            reinit="create_new",  # not a run that the caller has open
            settings=wandb.Settings(console="off"),
        )
        # W&B's own step may not go back, as that of a resumed run does.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        return self._run.id

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._run.log({**scalars, "iteration": step})

    def finish(self) -> None:
        self._run.finish(exit_code=0 if self.finished else 1)


class MlflowTracker(Tracker):
    """MLflow. Its environment variables hold: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ..."""

    name = "mlflow"

    #: Of one request.
    _MOST_PARAMETERS = 100
    _LONGEST_VALUE = 500

    def start(self, run_id: str | None) -> str:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id
            return run_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = self._client.create_run(
            experiment_id,
            run_name=self.output.name,
            tags={"output": str(self.output), "group": self.output.parent.name},
        )
        self._run_id = run.info.run_id
        parameters = [Param(key, str(value)[: self._LONGEST_VALUE]) for key, value in self.config.items()]
        for i in range(0, len(parameters), self._MOST_PARAMETERS):
            self._client.log_batch(self._run_id, params=parameters[i : i + self._MOST_PARAMETERS])
        return self._run_id

    def log(self, scalars: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # Names of classes may have letters that MLflow does not take.
        metrics = [
            Metric(re.sub(r"[^/\w.\- :]", "_", name), value, now, step) for name, value in scalars.items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def finish(self) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if self.finished else "FAILED")


TRACKERS: dict[str, type[Tracker]] = {tracker.name: tracker for tracker in (WandbTracker, MlflowTracker)}


def check_trackers(cfg: CfgNode) -> None:
    """Raise InputError if a tracker of SELFTRAIN.TRACKERS is not installed."""
    for name in cfg.SELFTRAIN.TRACKERS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder "wandb" of runs, where Python looks for modules
            raise InputError(
                f"SELFTRAIN.TRACKERS names {name}, which is not installed: pip install 'selftrain_d2[{name}]'."
            )


def build_trackers(cfg: CfgNode) -> list[Tracker]:
    """The trackers of SELFTRAIN.TRACKERS."""
    return [TRACKERS[name](cfg) for name in cfg.SELFTRAIN.TRACKERS]
