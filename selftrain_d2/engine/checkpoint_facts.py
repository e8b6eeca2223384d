"""What checkpoints say of the run that wrote them, and the classes of weights to start from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from selftrain_d2.data.datasets import difference_of_classes
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint import LoadReport
from selftrain_d2.modeling.classes import tensors_of_classes, tensors_of_image_classes

logger = logging.getLogger(__name__)


class CheckpointFacts:
    """Facts about a run that every checkpoint carries, and a resumed run must share."""

    def __init__(self, facts: dict[str, Any]):
        self.facts = facts

    def state_dict(self) -> dict[str, Any]:
        return self.facts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in self.facts.items():
            if state.get(key) != value:
                raise InputError(
                    f"The checkpoint to resume from has {key} {state.get(key)}, this run has {value}: "
                    "choose another OUTPUT_DIR."
                )


class Stage(CheckpointFacts):
    """SELFTRAIN.STAGE; see :func:`~selftrain_d2.engine.stage.with_stage`. A resumed run need not share it."""

    def __init__(self, stage: int):
        super().__init__({"stage": stage})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Classifiers:
    """The parts of a model that depend on classes, before weights to start from are loaded.

    Tensors of as many other classes fit, and would be taken for those of this run's classes.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, facts: Mapping[str, CheckpointFacts]):
        """
        Args:
            cfg: SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES is looked at.
            model: as it was built.
            facts: of the run, which its checkpoints carry.
        """
        self.cfg, self.model = cfg, model
        self.known = {
            "classes": facts["classes"].facts["thing_classes"],
            "image_classes": facts["classification"].facts["classification_classes"],
        }
        self.initial: dict[str, dict[str, torch.Tensor]] = {}
        if cfg.SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES:
            state = model.state_dict()
            for kind, names in (
                ("classes", tensors_of_classes(cfg, model)),
                ("image_classes", tensors_of_image_classes(model)),
            ):
                self.initial[kind] = {name: state[name].clone() for name in names}

    def compare(self, report: LoadReport) -> None:
        """Compare the classes of the weights that were loaded; where they are others, start these parts anew.

        Raises:
            InputError: as many other classes, or the same in another order, without
                SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES.
        """
        for kind, expected in self.known.items():
            found = getattr(report, kind)
            difference = difference_of_classes(expected, found) if expected and found else None
            if difference is None:
                continue
            weights, what = self.cfg.MODEL.WEIGHTS, kind.replace("_", " ")
            sentence = f"Weights {weights} know other {what} than the data: {difference}"
            # Those of another number of classes were not taken: their shapes differ.
            if len(found) == len(expected) and not self.initial:
                raise InputError(
                    f"{sentence}; order the data's as the weights', or set SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES True to "
                    "start what depends on classes anew."
                )
            self.model.load_state_dict(self.initial.get(kind, {}), strict=False)
            logger.info(f"{sentence}; what depends on them starts anew.")
