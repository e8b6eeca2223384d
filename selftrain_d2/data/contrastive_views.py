"""Two views of every unlabeled image: what contrastive pre-training (SimCLR) learns from."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import Sampler

from selftrain_d2.data.image_files import read_image
from selftrain_d2.data.loader import SampleKey
from selftrain_d2.data.random_state import torch_seeded_by_numpy
from selftrain_d2.errors import InputError


class ContrastiveViews:
    """Maps a path to two independent augmentations of the image (SimCLR, arXiv:2002.05709, Appendix A).

    Random numbers come from numpy's global state alone, so that :class:`~selftrain_d2.data.loader.MixedDataset`
    decides them.

    Args:
        size: side of the square views, in pixels.
        color_strength: of the colour jitter (the paper's s); 0 for none.
        gaussian_blur: probability of blur, in [0, 1].
        image_format: channel order of the views, "RGB" or "BGR".
        pixel_mean, pixel_std: per channel in that order, for pixels in 0-255 (MODEL.PIXEL_MEAN, .PIXEL_STD).
    """

    def __init__(
        self,
        *,
        size: int,
        color_strength: float,
        gaussian_blur: float,
        image_format: str,
        pixel_mean: list[float],
        pixel_std: list[float],
    ):
        from lightly.transforms import SimCLRTransform

        self.reverse = image_format == "BGR"
        order = slice(None, None, -1 if self.reverse else 1)
        self.transform = SimCLRTransform(
            size,
            cj_strength=color_strength,
            gaussian_blur=gaussian_blur,
            # Of RGB in 0-1, which the colour operations take.
            normalize={
                "mean": [value / 255 for value in pixel_mean[order]],
                "std": [value / 255 for value in pixel_std[order]],
            },
        )

    def __call__(self, path: str) -> torch.Tensor:
        """(2, 3, size, size) float32, normalized.

        Raises:
            InputError: the image cannot be read.
        """
        image = Image.fromarray(_read(path))
        with torch_seeded_by_numpy():
            views = torch.stack(self.transform(image))
        return views.flip(1) if self.reverse else views


def _read(path: str) -> np.ndarray:
    try:
        return read_image(path, "RGB")
    except Exception as error:  # Pillow's decoders raise anything on a broken file
        raise InputError(f"Image {path} cannot be read any more ({error}): repair it.") from error


class ReadabilityCheck:
    """Maps an image's name to the reason why it cannot be read; to "" if it can.

    Args:
        image_root: see :class:`~selftrain_d2.data.image_sources.ImageSource`.
    """

    def __init__(self, image_root: str):
        self.image_root = image_root

    def __getitem__(self, name: str) -> str:
        try:
            read_image(os.path.join(self.image_root, name), "RGB")
        except Exception as error:  # see _read
            return f"{type(error).__name__}: {error}"
        return ""


class EpochBatchSampler(Sampler):
    """Endless batches of sample keys, in which no image comes twice.

    Every epoch is a permutation of its own, which depends on the seed and the epoch's number alone; its last
    images, too few for a batch, are left out, as in SimCLR's code.

    Args:
        images: their number.
        batch_size: images a step over all processes, which have equal shares; at most ``images``.
        seed: of the order.

    Attributes:
        first_batch: batches to leave out at the start. Training resumed at step n continues with batch n.
    """

    def __init__(self, images: int, batch_size: int, seed: int):
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.first_batch = 0

    @property
    def batches_per_epoch(self) -> int:
        """Steps of one epoch."""
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        epoch, batch = divmod(self.first_batch, self.batches_per_epoch)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.images)
            for start in range(
                batch * self.batch_size, self.batches_per_epoch * self.batch_size, self.batch_size
            ):
                places = range(start + rank, start + self.batch_size, world_size)
                yield [(0, int(order[place]), epoch * self.images + place) for place in places]
            epoch, batch = epoch + 1, 0
