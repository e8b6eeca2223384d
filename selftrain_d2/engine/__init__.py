"""Training: the normalized loss, the trainer, and the loop of teacher, pseudo labels and student."""

from selftrain_d2.engine.hooks.loss_normalizer import LossNormalizer
from selftrain_d2.engine.trainer import SelfTrainingTrainer

__all__ = ["LossNormalizer", "SelfTrainingTrainer"]
