"""``--dry-run``: what a command would do, checked and told instead of done.

A command whose module has a function ``plan(args) -> Plan`` takes this option (see :func:`selftrain_d2.cli.main`). Its
plan makes every check of the real run that needs neither images, nor weights, nor a GPU. A mistake is an InputError as
always; files that are not there yet are listed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from selftrain_d2.data.coco_datasets import coco_dataset
from selftrain_d2.data.datasets import register_dataset
from selftrain_d2.data.segmentation_datasets import VOC_NAME, voc_2012_places
from selftrain_d2.data.training_sets import get_human_dicts
from selftrain_d2.engine.coco_evaluation import check_evaluation
from selftrain_d2.engine.launch import DatasetSpec
from selftrain_d2.engine.process_group import Processes, check_processes
from selftrain_d2.inspection.box_reach import BoxReach
from selftrain_d2.storage import exists

Result = TypeVar("Result")

# Sources of training images: title, and what the names of their keys begin with.
_SOURCES = (("human labels", ""), ("pseudo labels", "PSEUDO_"), ("classification", "CLASSIFICATION_"))


class NamedDataset(NamedTuple):
    """A dataset that the command line names, before anything of it is read.

    Attributes:
        files: paths that it is read from.
        make: makes its DatasetSpec of the arguments, and may check the files.
    """

    name: str
    files: Sequence[str]
    make: Callable[..., DatasetSpec]
    arguments: tuple


class Plan:
    """Lines of what would be done, and paths that it needs but that are not there.

    ``str`` gives the text to print: ``title: what`` a line, then ``missing: path`` a line.

    Attributes:
        unread: names of datasets whose files are not there.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[str, Any]] = []
        self.missing: list[str] = []
        self.unread: list[str] = []

    def say(self, title: str, what: Any) -> None:
        self.lines.append((title, what))

    def has(self, *paths: str | os.PathLike) -> bool:
        """Whether all paths are there; others are noted. Weights by name and URLs count as there."""
        absent = [os.fspath(p) for p in paths if not exists(p)]
        self.missing += [path for path in absent if path not in self.missing]
        return not absent

    def read(self, paths: Iterable[str | os.PathLike], reader: Callable[[], Result]) -> Result | None:
        """What ``reader()`` returns, with all the checks that it makes; None if one of its paths is missing."""
        return reader() if self.has(*paths) else None

    def datasets(self, named: Iterable[NamedDataset]) -> list[DatasetSpec]:
        """Specs to register; of a dataset whose files are missing only the name."""
        specs = []
        for name, files, make, arguments in named:
            spec = self.read(files, lambda make=make, arguments=arguments: make(*arguments))
            if spec is None:
                self.unread.append(name)
                spec = (name, _register_unread, ())
            specs.append(spec)
        return specs

    def catalog(self, title: str, names: Sequence[str], more: str = "") -> None:
        """Say which registered datasets are used, and note the files of those that detectron2 ships."""
        if names:
            self.say(title, ", ".join(names) + more)
        for name in names:
            if name not in self.unread:
                self.has(*files_of_dataset(name))

    def sources(self, cfg: CfgNode) -> None:
        """Say what a training step consists of."""
        for title, prefix in _SOURCES:
            images = cfg.SOLVER[f"{prefix}IMS_PER_BATCH"]
            alpha = f", alpha {cfg.SELFTRAIN.ALPHA:g}" if prefix == "PSEUDO_" else ""
            self.catalog(title, cfg.DATASETS[f"{prefix}TRAIN"], f", {images} images a step{alpha}")

    def labels(self, cfg: CfgNode, training: bool = True) -> list[dict[str, Any]] | None:
        """Read the COCO files that are there, with all the checks of the real run.

        Returns:
            The dataset dicts of DATASETS.TRAIN, if they were read.
        """
        read = {}
        checks = [(cfg.DATASETS.TEST, check_evaluation)]
        if training:
            checks.insert(0, (cfg.DATASETS.TRAIN, get_human_dicts))
        for names, check in checks:
            if set(names).isdisjoint(self.unread) and all(coco_dataset(name) for name in names):
                files = [file for name in names for file in files_of_dataset(name)]
                read[check] = self.read(files, lambda check=check: check(cfg))
        return read.get(get_human_dicts)

    def reach(self, reach: BoxReach | None) -> None:
        """Say which human boxes the detector can be taught."""
        if reach is not None:
            self.say("boxes", reach.line())
            if reach.warned:
                self.say("warning", reach.warning())

    def model(self, cfg: CfgNode, model: nn.Module) -> None:
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        name = f"{cfg.MODEL.META_ARCHITECTURE} on {cfg.MODEL.BACKBONE.NAME}"
        self.say("model", f"{name}, {parameters:.1f} million parameters")

    def weights(self, cfg: CfgNode, resumed: bool = False) -> None:
        """Say what the model starts from."""
        weights = cfg.MODEL.WEIGHTS
        if weights:
            self.has(weights)
        start = weights or "random"
        self.say("weights", f"{start}, or the last checkpoint in the output folder" if resumed else start)

    def processes(self, processes: Processes, device: str) -> None:
        check_processes(processes, device)
        self.say("processes", processes.num_gpus * processes.num_machines)

    def __str__(self) -> str:
        missing = [("missing", path) for path in self.missing]
        return "\n".join(f"{title}: {what}" for title, what in [*self.lines, *missing])


def files_of_dataset(name: str) -> list[str]:
    """Paths that a dataset of detectron2's catalog is read from, as far as its metadata has them."""
    if name.startswith(VOC_NAME.format("")):
        places = voc_2012_places()
        return [str(next((place for place in places if place.is_dir()), places[0]))]
    metadata = MetadataCatalog.get(name)
    return [metadata.get(key) for key in ("json_file", "image_root", "sem_seg_root") if metadata.get(key)]


def _register_unread(name: str) -> None:
    register_dataset(name, list)
