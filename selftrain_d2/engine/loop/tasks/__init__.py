"""The tasks of the loop: boxes and masks."""

from __future__ import annotations

from selftrain_d2.engine.loop.tasks.base import Task
from selftrain_d2.engine.loop.tasks.detection import Detection
from selftrain_d2.engine.loop.tasks.segmentation import Segmentation

__all__ = ["TASKS", "Detection", "Segmentation", "Task"]

#: By the name on the command line and in ``summary.json``.
TASKS: dict[str, type[Task]] = {task.name: task for task in (Detection, Segmentation)}
