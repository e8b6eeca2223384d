"""Self-training for detectron2: make a detector better with images nobody labeled.

Importing this package registers every component with detectron2.
"""

from selftrain_d2.environment import check_environment

check_environment()

from selftrain_d2 import (
    modeling,  # noqa: F401  (registers backbones and meta architectures)
    object_storage,  # noqa: F401  (registers s3:// and the like)
)
from selftrain_d2.config import add_selftrain_config
from selftrain_d2.data.augmentation import AUGMENTATION_REGISTRY, build_augmentations
from selftrain_d2.data.classification import register_classification_folder
from selftrain_d2.data.datasets import register_image_folder, register_pseudo_labels
from selftrain_d2.data.loader import build_selftrain_train_loader
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.segmentation_datasets import register_segmentation_folder
from selftrain_d2.data.tiles import Tiles
from selftrain_d2.deployment.detector import Detector
from selftrain_d2.engine import LossNormalizer, SelfTrainingTrainer
from selftrain_d2.errors import InputError
from selftrain_d2.labeling.generate import generate_pseudo_labels

__version__ = "0.1.0"

__all__ = [
    "AUGMENTATION_REGISTRY",
    "Detector",
    "InputError",
    "LossNormalizer",
    "SelfTrainingDatasetMapper",
    "SelfTrainingTrainer",
    "Tiles",
    "add_selftrain_config",
    "build_augmentations",
    "build_selftrain_train_loader",
    "generate_pseudo_labels",
    "load_pseudo_labels",
    "register_classification_folder",
    "register_image_folder",
    "register_pseudo_labels",
    "register_segmentation_folder",
]
