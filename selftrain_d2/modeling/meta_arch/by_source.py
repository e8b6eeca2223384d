"""Any detectron2 meta architecture with the losses of human and pseudo labels kept apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN, PanopticFPN, SemanticSegmentor
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from selftrain_d2.modeling.meta_arch.box_weights import check_weighs_boxes, weighted_losses
from selftrain_d2.modeling.meta_arch.classification import (
    CLASSIFICATION,
    ClassificationHead,
    bottom_up_features,
    without_classification,
)
from selftrain_d2.modeling.meta_arch.ignored_boxes import OverlapRule, never_background
from selftrain_d2.modeling.meta_arch.soft_labels import check_takes_soft_labels, scores_of

#: The two sources of labels, in the order of every pair in this package.
LABEL_SOURCES = ("human", "pseudo")


#: Kinds of labels that are counted. Those of an image are its number of boxes; the share of its pixels that is not
#: ignored, in [0, 1]; and its number of boxes that are neither objects nor background.
LABEL_KINDS = ("boxes", "pixels", "ignored_boxes")


@dataclass
class LabelCounts:
    """How much a step's images of one source are labeled with labels of one kind."""

    images: int = 0
    labels: float = 0
    #: images without any
    empty: int = 0

    def add(self, labels: float) -> None:
        """Count one image."""
        self.images += 1
        self.labels += labels
        self.empty += not labels


class LossesBySource:
    """Mixed into a meta architecture, splits its training batch by ``label_source``.

    One forward pass for each source: the architecture's own ``forward`` needs no change, whatever heads and
    sampling it has, and each source's losses are exactly those it would have alone. Batch norm in training
    mode sees the sources one after the other (R-CNNs have it frozen by default, where that makes no
    difference). Dense detectors pass both at once, as the paper does: see
    :class:`~selftrain_d2.modeling.meta_arch.dense.DenseLossesBySource`.

    Images with ``label_source`` "classification" (joint training) pass through the backbone alone, below its pyramid,
    and the ``classification_head``.

    What ``ignored_boxes`` of an image cover (``Boxes`` in its pixels, which a sample may have) is not learned as
    background; see :mod:`~selftrain_d2.modeling.meta_arch.ignored_boxes`.

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
        takes_soft_labels: whether they follow ``gt_scores``; the same.
        label_counts: by a name of LABEL_KINDS and a source, how much the last step's images were labeled with:
            boxes where samples have ``instances``, pixels where they have ``sem_seg``, ignored boxes where they
            have ``ignored_boxes``.
        ignore_rule: when an ignored box covers another; by the config's SELFTRAIN.IGNORE_OVERLAP*.
        weighs_boxes: whether losses follow ``gt_weights`` of the instances; others refuse such samples.
        classification_head: None without joint training; see :func:`~.classification.add_classification_head`.
    """

    takes_soft_labels = False

    @property
    def weighs_boxes(self) -> bool:
        rpn, heads = (getattr(self, name, None) for name in ("proposal_generator", "roi_heads"))
        return hasattr(rpn, "losses") and hasattr(heads, "box_predictor")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_weights: tuple[float, float] = (1.0, 1.0)
        self.raw_losses: dict[str, Tensor | None] = dict.fromkeys(LABEL_SOURCES)
        self.label_counts = no_labels()
        self.classification_head: ClassificationHead | None = None
        cfg = next((x for x in (*args, kwargs.get("cfg")) if isinstance(x, CfgNode)), None)
        self.ignore_rule = OverlapRule() if cfg is None else OverlapRule.from_config(cfg)
        # raw losses of each forward pass, inside `one_step`
        self._passes: list[dict[str, Tensor | None]] | None = None

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """As the architecture's own. In training each input dict has a ``label_source``, "human" (the
        default), "pseudo", or "classification" (``image``, of one size, and ``class_id`` alone).

        Returns:
            In training, the losses of :meth:`losses_by_source`: as they are for a batch without pseudo labels;
            else with ``_human`` or ``_pseudo`` after their names, each times its source's weight. With
            classification images also ``loss_classification``, times its weight.
        """
        if not self.training:
            return super().forward(batched_inputs)
        labeled = without_classification(batched_inputs)
        self._count_labels(labeled)
        losses = self.weighted(self.losses_by_source(labeled))
        if len(labeled) < len(batched_inputs):
            losses.update(self._classification_losses(batched_inputs))
        return losses

    def losses_by_source(self, batched_inputs: list[dict]) -> dict[str, dict[str, Tensor]]:
        """The architecture's unweighted losses by name, of each source that a training batch has."""
        losses = {}
        for source, index in by_source(batched_inputs).items():
            samples = [batched_inputs[i] for i in index]
            nothing_valid = self.all_pixels_are_ignored(samples)
            if nothing_valid:
                samples = [{**x, "sem_seg": torch.zeros_like(x["sem_seg"])} for x in samples]
            ignoring = never_background(self, samples, self.ignore_rule)
            with get_event_storage().name_scope(source), ignoring, weighted_losses(self, samples):
                losses[source] = super().forward(samples)
            if nothing_valid:
                losses[source] = without_pixel_losses(losses[source])
        return losses

    def all_pixels_are_ignored(self, samples: Sequence[dict]) -> bool:
        """Whether samples have masks and no mask has a valid pixel.

        Heads that average over valid pixels (detectron2's SemSegFPNHead) would give NaN. They are given a mask of class
        0 instead, and :func:`without_pixel_losses` takes its loss away: gradients of zero, for every parameter.
        """
        return all("sem_seg" in x and not self._valid_pixel_share(x) for x in samples)

    def _valid_pixel_share(self, sample: dict) -> float:
        share = sample.get("valid_pixel_share")  # counted by SelfTrainingDatasetMapper
        if share is not None:
            return share
        ignored = getattr(getattr(self, "sem_seg_head", None), "ignore_value", 255)
        return (sample["sem_seg"] != ignored).float().mean().item()

    def _classification_losses(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        samples = [x for x in batched_inputs if x.get("label_source") == CLASSIFICATION]
        images = torch.stack([x["image"].to(self.device) for x in samples])
        features = bottom_up_features(self.backbone, (images - self.pixel_mean) / self.pixel_std)
        class_ids = torch.tensor([x["class_id"] for x in samples], device=self.device)
        return self.classification_head.losses(features, class_ids)

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
            self.label_counts = no_labels()
        for sample in batched_inputs:
            source = sample.get("label_source", "human")
            if "instances" in sample:
                if sample["instances"].has("gt_weights"):
                    check_weighs_boxes(self)
                if sample["instances"].has("gt_scores"):
                    check_takes_soft_labels(self)
                # Of soft labels as many as are to be expected.
                self.label_counts["boxes"][source].add(scores_of(sample["instances"]).sum().item())
            if "sem_seg" in sample:
                self.label_counts["pixels"][source].add(self._valid_pixel_share(sample))
            if "ignored_boxes" in sample:
                self.label_counts["ignored_boxes"][source].add(len(sample["ignored_boxes"]))

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


def no_labels() -> dict[str, dict[str, LabelCounts]]:
    """Counts of 0, by kind and source."""
    return {kind: {source: LabelCounts() for source in LABEL_SOURCES} for kind in LABEL_KINDS}


def by_source(batched_inputs: Sequence[dict]) -> dict[str, list[int]]:
    """Positions in a batch of the images of each source that it has: human, pseudo, classification."""
    sources = [sample.get("label_source", "human") for sample in batched_inputs]
    return {
        source: [i for i, s in enumerate(sources) if s == source]
        for source in (*LABEL_SOURCES, CLASSIFICATION)
        if source in sources
    }


def as_slice(index: list[int]) -> slice | list[int]:
    """Positions that follow each other as a slice: a tensor is not copied for it."""
    return slice(index[0], index[-1] + 1) if index == list(range(index[0], index[-1] + 1)) else index


def without_pixel_losses(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses by name, those of a semantic segmentation head (``loss_sem_seg``) times zero."""
    return {name: loss * 0.0 if "sem_seg" in name else loss for name, loss in losses.items()}


def pseudo_labels_in_words(model: nn.Module) -> str:
    """How much the pseudo-labeled images of a model's last step are labeled, e.g. "1 box on 10 images"."""
    counts = getattr(model, "label_counts", no_labels())
    boxes, pixels = (counts[kind]["pseudo"] for kind in ("boxes", "pixels"))
    if pixels.images and not boxes.images:
        images = _number(pixels.images, "image", "images")
        return f"{pixels.labels / pixels.images:.2%} of the pixels of {images} have a class"
    return f"{_number(round(boxes.labels), 'box', 'boxes')} on {_number(boxes.images, 'image', 'images')}"


def _number(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


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
