"""What differs in the loop between boxes and masks: whose data it is, how it is judged, and how it is shown."""

from __future__ import annotations

import functools
import os
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from detectron2.config import CfgNode

from selftrain_d2.data.image_sources import ImageSource
from selftrain_d2.data.unlabeled_images import UnlabeledImages, collect_images, without_known
from selftrain_d2.engine.launch import DatasetSpec, results_by_set

#: Names of the registered datasets.
LABELED, VALIDATION = "selftrain_labeled", "selftrain_validation"
#: Below the loop's output folder.
CONTACT_SHEET = "contact_sheet.png"

#: Dataset dicts of pseudo labels, as ``load_pseudo_labels`` gives them.
Samples = Sequence[dict[str, Any]]


@dataclass
class Task(ABC):
    """One's own data, as paths, for one kind of labels. What is optional serves to judge; only an
    oracle is trained on the withheld labels."""

    labeled_images: str
    #: One or several places, see :func:`~selftrain_d2.data.unlabeled_images.collect_images`.
    unlabeled_images: str | Sequence[str]
    validation_images: str | None = None
    #: What paths in lists and COCO files of unlabeled images are relative to.
    unlabeled_root: str | None = None

    #: In ``summary.json``.
    name: ClassVar[str]
    #: Group of detectron2's evaluation results, and those of its metrics in the table of stages.
    results: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    #: The field, and the argument of the command line, with the withheld labels of the unlabeled images.
    truth_field: ClassVar[str]

    @property
    def truth_argument(self) -> str:
        return f"--{self.truth_field.replace('_', '-')}"

    @property
    def has_truth(self) -> bool:
        return getattr(self, self.truth_field) is not None

    @abstractmethod
    def check(self, cfg: CfgNode) -> list[str]:
        """Check the config and all files before any work starts.

        Returns:
            The class names.

        Raises:
            InputError: naming the first fault.
        """

    @property
    def unlabeled_places(self) -> list[str]:
        """``unlabeled_images`` as a list."""
        places = self.unlabeled_images
        return [places] if isinstance(places, str) else list(places)

    @functools.cached_property
    def collected(self) -> ImageSource:
        """All images of the unlabeled places. Withheld labels name them relative to its root.

        Raises:
            InputError: see :func:`~selftrain_d2.data.unlabeled_images.collect_images`.
        """
        return collect_images(self.unlabeled_places, self.unlabeled_root)

    @functools.cached_property
    def unlabeled(self) -> UnlabeledImages:
        """Those that neither are labeled nor belong to validation, which is told by their files.

        Raises:
            InputError: as for ``collected``; or none is left.
        """
        return without_known(self.collected, self.known_images())

    @abstractmethod
    def known_images(self) -> dict[str, list[str]]:
        """Paths of the images that are "labeled" and "of validation"."""

    def image_folders(self) -> list[str]:
        """Those of which all images are used, so that nothing else may be written there."""
        return [place for place in self.unlabeled_places if os.path.isdir(place)]

    @abstractmethod
    def datasets(self) -> list[DatasetSpec]:
        """The labeled images, as LABELED, and those of validation, as VALIDATION."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Hashes of the labels that a stage depends on."""

    @abstractmethod
    def truth_fingerprint(self) -> dict[str, str]:
        """Hashes of the withheld labels; only for a task that has them."""

    @abstractmethod
    def truth_of(self, samples: Samples, masks: bool = False) -> list[dict[str, Any]]:
        """Unlabeled images with their withheld labels in place of any others; only for a task that has them.

        Args:
            samples: dataset dicts, of which only the image counts.
            masks: whether masks of objects are learned.

        Raises:
            InputError: an image has no truth, or truth of another size.
        """

    @abstractmethod
    def labeled_names(self) -> list[str]:
        """The labeled images, relative to their folder."""

    @abstractmethod
    def judge_on_labeled(self, folder: Path) -> float | None:
        """Judge a teacher by its labels of the labeled images: the first of ``metrics``, in percent.

        Args:
            folder: those labels, with all scores down to the floor.
        """

    @abstractmethod
    def set_number_of_classes(self, cfg: CfgNode, number: int) -> None:
        """Fit a model to the data, in place."""

    @abstractmethod
    def count(self, folder: Path, selection: Mapping[str, Any]) -> dict[str, Any]:
        """How much of a pseudo-label folder is selected; empty where nothing is left to train on.

        Args:
            selection: arguments of ``load_pseudo_labels``.
        """

    @abstractmethod
    def judge(self, output: Path, score_thresh: float) -> dict[str, Any]:
        """Judge the pseudo labels where truth is known: further entries of the summary, perhaps a picture."""

    def facts_of_labels(self, output: Path, selection: Mapping[str, Any]) -> dict[str, Any]:
        """What tells whether those pseudo labels that the student was trained on are too few or too wrong: further
        entries of the summary, for :meth:`fault_of_labels`.

        Args:
            selection: of these labels, for ``load_pseudo_labels``.
        """
        return {}

    @staticmethod
    @abstractmethod
    def fault_of_labels(runs: Sequence[Mapping[str, Any]]) -> str | None:
        """What is wrong with the pseudo labels, and what to change, in words; None if nothing is seen.

        Args:
            runs: summaries of the loop, one a seed.
        """

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


#: Rules of thumb: from here down pseudo labels are said to be too few (share of the truth that they have), or too
#: wrong (share of them that is right).
LEAST_RECALL, LEAST_PRECISION = 0.5, 0.7

_REMEDIES = {
    (True, False): "that is too few: lower SELFTRAIN.SCORE_THRESH, or train the teacher longer",
    (False, True): "that is too many wrong ones: raise SELFTRAIN.SCORE_THRESH, or train the teacher longer",
    (
        True,
        True,
    ): "that is both too few and too wrong, which no threshold mends: the teacher must become better, by "
    "more labeled images or more steps",
}


def fault(found: str, *, few: bool, wrong: bool) -> str | None:
    """A sentence of what was found with what to change; None where the labels are neither too few nor too wrong."""
    remedy = _REMEDIES.get((few, wrong))
    return f"{found}; {remedy}." if remedy else None


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


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
