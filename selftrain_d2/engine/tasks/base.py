"""What differs in the loop between boxes and masks: whose data it is, how it is judged, and how it is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from detectron2.config import CfgNode

from selftrain_d2.engine.launch import DatasetSpec, results_by_set

#: Names of the registered datasets.
LABELED, VALIDATION = "selftrain_labeled", "selftrain_validation"
#: Below the loop's output folder.
CONTACT_SHEET = "contact_sheet.png"

#: Dataset dicts of pseudo labels, as ``load_pseudo_labels`` gives them.
Samples = Sequence[dict[str, Any]]


@dataclass
class Task(ABC):
    """One's own data, as paths, for one kind of labels. What is optional serves to judge, never to train."""

    labeled_images: str
    unlabeled_images: str
    validation_images: str | None = None

    #: In ``summary.json``.
    name: ClassVar[str]
    #: Group of detectron2's evaluation results, and those of its metrics in the table of stages.
    results: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]

    @abstractmethod
    def check(self, cfg: CfgNode) -> list[str]:
        """Check the config and all files before any work starts.

        Returns:
            The class names.

        Raises:
            InputError: naming the first fault.
        """

    def image_folders(self) -> list[str]:
        """Those of which all images are used, so that nothing else may be written there."""
        return [self.unlabeled_images]

    @abstractmethod
    def datasets(self) -> list[DatasetSpec]:
        """The labeled images, as LABELED, and those of validation, as VALIDATION."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Hashes of the labels that a stage depends on."""

    @abstractmethod
    def set_number_of_classes(self, cfg: CfgNode, number: int) -> None:
        """Fit a model to the data, in place."""

    @abstractmethod
    def count(self, folder: Path, cfg: CfgNode) -> dict[str, Any]:
        """How much of a pseudo-label folder the config selects; empty where nothing is left to train on."""

    @abstractmethod
    def judge(self, output: Path, score_thresh: float) -> dict[str, Any]:
        """Judge the pseudo labels where truth is known: further entries of the summary, perhaps a picture."""

    @abstractmethod
    def draw(self, output: Path, names: Sequence[str], pseudo: Samples, students: Samples) -> None:
        """Draw the contact sheet.

        Args:
            output: the loop's output folder.
            names: of the images to show.
            pseudo: the pseudo labels that the student was trained on.
            students: what the student sees in these images.
        """

    @staticmethod
    def shown_threshold(score_thresh: float) -> float:
        """The least score of what the student sees in the images of the contact sheet."""
        return score_thresh

    @staticmethod
    @abstractmethod
    def interesting(pseudo: Samples) -> list[str]:
        """Images that have labels to show."""

    @staticmethod
    @abstractmethod
    def sentence(labels: dict[str, Any], selected: str) -> str:
        """The counts of a labeling stage in words."""

    @staticmethod
    @abstractmethod
    def further_lines(summary: dict[str, Any]) -> list[str]:
        """What the summary's page has besides, in Markdown."""


def evaluations(stages: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """The evaluations of the trained models of ``summary.json``.

    Yields:
        What to call it ("student", or "student on NAME" where there are several datasets), the stage, and its results
        ``{task: {metric: value}}``.
    """
    for stage, content in stages.items():
        if "metrics" in content:
            for name, tasks in results_by_set(content["metrics"]).items():
                yield f"{stage} on {name}" if name else stage, stage, tasks
