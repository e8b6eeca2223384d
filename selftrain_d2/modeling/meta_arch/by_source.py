"""Any detectron2 meta architecture with the losses of human and pseudo labels kept apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN, PanopticFPN, SemanticSegmentor
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

#: The two sources of labels, in the order of every pair in this package.
LABEL_SOURCES = ("human", "pseudo")


@dataclass
class LabelCounts:
    """What a step's images of one source are labeled with."""

    images: int = 0
    boxes: int = 0
    #: images without a box
    empty: int = 0

    def add(self, sample: dict) -> None:
        """Count one sample of a batch."""
        boxes = len(sample["instances"])
        self.images += 1
        self.boxes += boxes
        self.empty += not boxes


class LossesBySource:
    """Mixed into a meta architecture, splits its training batch by ``label_source``.

    One forward pass for each source: the architecture's own ``forward`` needs no change, whatever heads and
    sampling it has, and each source's losses are exactly those it would have alone. Batch norm in training
    mode sees the sources one after the other (R-CNNs have it frozen by default, where that makes no
    difference). Dense detectors pass both at once, as the paper does: see
    :class:`~selftrain_d2.modeling.meta_arch.dense.DenseLossesBySource`.

    Names of parameters are those of the plain architecture, so its weights fit as they are. For one of your
    own::

        @META_ARCH_REGISTRY.register()
        class SelfTrainingMyDetector(LossesBySource, MyDetector):
            pass

    Attributes:
        loss_weights: weights (human, pseudo) of the losses that ``forward`` returns.
            :class:`~selftrain_d2.engine.LossNormalizer` sets them before every step.
        raw_losses: the last step's unweighted loss of each source, a scalar tensor, or None where the
            batch had no image of that source.
        label_counts: what the last step's images of each source were labeled with (boxes; nothing is counted
            where samples have no ``instances``).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_weights: tuple[float, float] = (1.0, 1.0)
        self.raw_losses: dict[str, Tensor | None] = dict.fromkeys(LABEL_SOURCES)
        self.label_counts = {source: LabelCounts() for source in LABEL_SOURCES}
        # raw losses of each forward pass, inside `one_step`
        self._passes: list[dict[str, Tensor | None]] | None = None

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """As the architecture's own. In training each input dict has a ``label_source``, "human" (the
        default) or "pseudo".

        Returns:
            In training, the architecture's losses: as they are for a batch without pseudo labels; else with
            ``_human`` or ``_pseudo`` after their names, each times its source's weight.
        """
        if not self.training:
            return super().forward(batched_inputs)
        self._count_labels(batched_inputs)
        losses = {}
        for source, index in by_source(batched_inputs).items():
            with get_event_storage().name_scope(source):
                losses[source] = super().forward([batched_inputs[i] for i in index])
        return self.weighted(losses)

    def weighted(self, losses: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Remember the raw losses, and give the losses that ``forward`` returns.

        Args:
            losses: the unweighted losses by name, of each source that the batch has.
        """
        self.raw_losses = {
            source: sum(losses[source].values()).detach() if source in losses else None
            for source in LABEL_SOURCES
        }
        if self._passes is not None:
            self._passes.append(self.raw_losses)
        if "pseudo" not in losses:
            return losses["human"]
        weights = dict(zip(LABEL_SOURCES, self.loss_weights))
        return {
            f"{name}_{source}": weights[source] * loss
            for source, of_source in losses.items()
            for name, loss in of_source.items()
        }

    def _count_labels(self, batched_inputs: Sequence[dict]) -> None:
        if not self._passes:  # the first or only pass of a step
            self.label_counts = {source: LabelCounts() for source in LABEL_SOURCES}
        for sample in batched_inputs:
            if "instances" in sample:
                self.label_counts[sample.get("label_source", "human")].add(sample)

    @contextlib.contextmanager
    def one_step(self, batches: Sequence[list[dict]]) -> Iterator[None]:
        """Inside, a forward pass for each of ``batches`` makes one step (gradient accumulation).

        The step's loss is the mean over the passes, and so are the ``raw_losses`` after it; ``label_counts``
        are sums. Each batch has the same number of images of each source.
        """
        self._passes = []
        try:
            yield
            passes = self._passes
        finally:
            self._passes = None
        self.raw_losses = {
            source: None if passes[0][source] is None else sum(raw[source] for raw in passes) / len(passes)
            for source in LABEL_SOURCES
        }


def by_source(batched_inputs: Sequence[dict]) -> dict[str, list[int]]:
    """Positions in a batch of the images of each source that it has, human first."""
    sources = [sample.get("label_source", "human") for sample in batched_inputs]
    return {
        source: [i for i, s in enumerate(sources) if s == source]
        for source in LABEL_SOURCES
        if source in sources
    }


def _register(architecture: type[nn.Module]) -> type[nn.Module]:
    """Register and return ``SelfTraining<architecture>``."""
    doc = f"detectron2's {architecture.__name__}; see :class:`LossesBySource`."
    members = {"__doc__": doc, "__module__": __name__}
    return META_ARCH_REGISTRY.register()(
        type(f"SelfTraining{architecture.__name__}", (LossesBySource, architecture), members)
    )


SelfTrainingGeneralizedRCNN = _register(GeneralizedRCNN)  # Faster, Mask, Cascade R-CNN
SelfTrainingPanopticFPN = _register(PanopticFPN)
SelfTrainingSemanticSegmentor = _register(SemanticSegmentor)
