"""Meta architectures that keep the losses of human and pseudo labels apart."""

from selftrain_d2.modeling.meta_arch.by_source import (
    LossesBySource,
    SelfTrainingGeneralizedRCNN,
    SelfTrainingPanopticFPN,
    SelfTrainingSemanticSegmentor,
)
from selftrain_d2.modeling.meta_arch.classification import ClassificationHead, add_classification_head
from selftrain_d2.modeling.meta_arch.dense import DenseLossesBySource
from selftrain_d2.modeling.meta_arch.fcos import SelfTrainingFCOS
from selftrain_d2.modeling.meta_arch.retinanet import SelfTrainingRetinaNet
from selftrain_d2.modeling.meta_arch.segmentation import SelfTrainingSegmentor, SemSegPyramidSumHead

__all__ = [
    "ClassificationHead",
    "DenseLossesBySource",
    "LossesBySource",
    "SelfTrainingFCOS",
    "SelfTrainingGeneralizedRCNN",
    "SelfTrainingPanopticFPN",
    "SelfTrainingRetinaNet",
    "SelfTrainingSegmentor",
    "SelfTrainingSemanticSegmentor",
    "SemSegPyramidSumHead",
    "add_classification_head",
]
