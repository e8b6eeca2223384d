"""RetinaNet that keeps the losses of human and pseudo labels apart."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.events import get_event_storage
from torch import Tensor


@META_ARCH_REGISTRY.register()
class SelfTrainingRetinaNet(RetinaNet):
    """detectron2's RetinaNet over a batch of human-labeled and pseudo-labeled images.

    The whole batch goes through the network at once, so batch norm sees the mixed batch as in the paper.
    Then each source of labels has its own losses, normalized by its own positive anchors. Inference and
    training on a batch without pseudo labels are those of RetinaNet.

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
        # Moving average of positive anchors of each source; see `_losses_of`.
        self.positive_anchor_averages = {"human": 100.0, "pseudo": 100.0}

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """As ``DenseDetector.forward``. In training each input dict has a ``label_source``, "human" (the
        default) or "pseudo".

        Returns:
            In training, scalar tensors: ``loss_cls`` and ``loss_box_reg`` of a batch without pseudo labels;
            else ``loss_{cls,box_reg}_{human,pseudo}``, each times its source's weight. Their sum is the
            loss to minimize.
        """
        if not self.training:
            return super().forward(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        pred_logits, pred_anchor_deltas = self._transpose_dense_predictions(
            self.head(features), [self.num_classes, 4]
        )
        anchors = self.anchor_generator(features)
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)

        sources = [x.get("label_source", "human") for x in batched_inputs]
        self.raw_losses = {"human": None, "pseudo": None}
        weighted = {}
        for source, weight in zip(("human", "pseudo"), self.loss_weights):
            index = [i for i, s in enumerate(sources) if s == source]
            if not index:
                continue
            losses = self._losses_of(
                source,
                anchors,
                [x[index] for x in pred_logits],
                [gt_labels[i] for i in index],
                [x[index] for x in pred_anchor_deltas],
                [gt_boxes[i] for i in index],
            )
            self.raw_losses[source] = sum(losses.values()).detach()
            if "pseudo" not in sources:
                return losses
            weighted.update({f"{name}_{source}": weight * loss for name, loss in losses.items()})
        return weighted

    def _losses_of(self, source: str, *args) -> dict[str, Tensor]:
        """``RetinaNet.losses`` with the positive-anchor average of one source.

        RetinaNet keeps that average in ``self.loss_normalizer`` and moves it at each call: one shared by
        both sources would move twice a step and mix their counts.
        """
        self.loss_normalizer = self.positive_anchor_averages[source]
        with get_event_storage().name_scope(source):
            losses = self.losses(*args)
        self.positive_anchor_averages[source] = self.loss_normalizer
        return losses
