"""Meta architectures that keep the losses of human and pseudo labels apart."""

from selftrain_d2.modeling.meta_arch.by_source import (
    LossesBySource,
    SelfTrainingGeneralizedRCNN,
    SelfTrainingPanopticFPN,
    SelfTrainingSemanticSegmentor,
)
from selftrain_d2.modeling.meta_arch.retinanet import SelfTrainingRetinaNet

__all__ = [
    "LossesBySource",
    "SelfTrainingGeneralizedRCNN",
    "SelfTrainingPanopticFPN",
    "SelfTrainingRetinaNet",
    "SelfTrainingSemanticSegmentor",
]
