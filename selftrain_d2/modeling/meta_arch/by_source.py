"""Any detectron2 meta architecture with the losses of human and pseudo labels kept apart."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN, PanopticFPN, SemanticSegmentor
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn


class LossesBySource:
    """Mixed into a meta architecture, splits its training batch by ``label_source``.

    One forward pass for each source: the architecture's own ``forward`` needs no change, whatever heads and
    sampling it has, and each source's losses are exactly those it would have alone. Batch norm in training
    mode sees the sources one after the other (R-CNNs have it frozen by default, where that makes no
    difference); :class:`SelfTrainingRetinaNet` passes both at once, as the paper does.

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
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_weights: tuple[float, float] = (1.0, 1.0)
        self.raw_losses: dict[str, Tensor | None] = {"human": None, "pseudo": None}

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """As the architecture's own. In training each input dict has a ``label_source``, "human" (the
        default) or "pseudo".

        Returns:
            In training, the architecture's losses: as they are for a batch without pseudo labels; else with
            ``_human`` or ``_pseudo`` after their names, each times its source's weight.
        """
        if not self.training:
            return super().forward(batched_inputs)
        parts: dict[str, list[dict]] = {"human": [], "pseudo": []}
        for sample in batched_inputs:
            parts[sample.get("label_source", "human")].append(sample)
        losses = {}
        for source, part in parts.items():
            if part:
                with get_event_storage().name_scope(source):
                    losses[source] = super().forward(part)
        return self.weighted(losses)

    def weighted(self, losses: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Remember the raw losses, and give the losses that ``forward`` returns.

        Args:
            losses: the unweighted losses by name, of each source that the batch has.
        """
        self.raw_losses = {
            source: sum(losses[source].values()).detach() if source in losses else None
            for source in ("human", "pseudo")
        }
        if "pseudo" not in losses:
            return losses["human"]
        weights = dict(zip(("human", "pseudo"), self.loss_weights))
        return {
            f"{name}_{source}": weights[source] * loss
            for source, of_source in losses.items()
            for name, loss in of_source.items()
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
