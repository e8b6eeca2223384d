"""Images per second and core of S1 to S4, beside detectron2, torchvision and Pillow."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import PIL
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image, ImageEnhance, ImageOps
from torchvision import tv_tensors
from torchvision.io import decode_jpeg, read_file
from torchvision.transforms import v2

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.data.augmentation import pixel
from selftrain_d2.data.augmentation.geometric import AffineTransform, ResizeCropPadTransform
from selftrain_d2.data.augmentation.pixel import FILL_VALUE, PixelTransform
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper, read_image
from selftrain_d2.experiments.benchmarks.timing import markdown_table, ratio, spread, time_in_turns

SIZE = 640
HEIGHT, WIDTH = 750, 1000
BOXES = 20
SMALL_JITTER, LARGE_JITTER = (0.8, 1.2), (0.5, 2.0)
# Pairs of which the issue is which is faster: (one, other).
COMPARED = (
    ("S1", "detectron2 LSJ 0.8-1.2"),
    ("S1", "torchvision jitter 0.8-1.2"),
    ("S1", "Pillow S1"),
    ("S4", "detectron2 LSJ 0.5-2.0"),
    ("S4", "torchvision RandAugment (tensors)"),
    ("S4", "torchvision RandAugment (Pillow)"),
    ("S4", "Pillow S4"),
    ("S4", "S1"),
)


def run(rounds: int) -> dict[str, Any]:
    """Time all contestants, reading from JPEG files and from decoded images.

    Args:
        rounds: how often each is measured.

    Returns:
        ``table`` (Markdown) and the figures behind it: ``speed`` and ``ratio`` by "decode included" or
        "decode excluded", then by contestant or pair; each the median, smallest and largest of the rounds.
    """
    results: dict[str, Any] = {"speed": {}, "ratio": {}}
    with tempfile.TemporaryDirectory() as folder:
        records = make_records(Path(folder), number=24)
        for kind, contestants in (
            ("decode included", _from_files(records)),
            ("decode excluded", _from_memory(records)),
        ):
            speeds = time_in_turns(contestants, len(records), rounds)
            results["speed"][kind] = {name: spread(values) for name, values in speeds.items()}
            results["ratio"][kind] = {
                f"{one} / {other}": ratio(speeds, one, other) for one, other in COMPARED
            }
    results["versions"] = {"torchvision": torchvision.__version__, "pillow": PIL.__version__}
    results["table"] = _table(results["speed"], "images/s", 0) + "\n\n" + _table(results["ratio"], "times", 2)
    return results


def make_records(folder: Path, number: int) -> list[dict[str, Any]]:
    """Write JPEG files with detail at every scale, and make dataset dicts with boxes of all sizes."""
    rng = np.random.RandomState(0)
    records = []
    for index in range(number):
        image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for cells in (4, 16, 64, 250, 750):
            noise = rng.normal(size=(cells * 3 // 4, cells, 3)).astype(np.float32)
            image += cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) / cells**0.5
        image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
        path = str(folder / f"{index}.jpg")
        cv2.imwrite(path, image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        sides = np.exp(rng.uniform(np.log(16), np.log(400), (BOXES, 2)))
        corners = rng.uniform(size=(BOXES, 2)) * ((WIDTH, HEIGHT) - sides)
        boxes = np.concatenate([corners, sides], axis=1)
        annotations = [
            {"bbox": box.tolist(), "bbox_mode": BoxMode.XYWH_ABS, "category_id": i, "iscrowd": 0}
            for i, box in enumerate(boxes)
        ]
        records.append(
            {
                "file_name": path,
                "image_id": index,
                "height": HEIGHT,
                "width": WIDTH,
                "annotations": annotations,
            }
        )
    return records


class _TorchvisionChain:
    """torchvision v2, at its fastest: tensors decoded by torchvision, or Pillow images; plain bilinear."""

    def __init__(self, jitter: tuple[float, float], rand_augment: bool = False, pillow: bool = False):
        self.rand_augment = v2.RandAugment(num_ops=1, magnitude=10, fill=FILL_VALUE) if rand_augment else None
        self.pillow = pillow
        self.jitter = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                # Pillow's resizing always smooths; for tensors, plain is the faster and the paper's.
                v2.ScaleJitter((SIZE, SIZE), jitter, antialias=pillow),
                v2.RandomCrop(SIZE, pad_if_needed=True, fill=FILL_VALUE),
                v2.SanitizeBoundingBoxes(),
            ]
        )

    def read(self, path: str) -> torch.Tensor | Image.Image:
        return Image.open(path).convert("RGB") if self.pillow else decode_jpeg(read_file(path))

    def __call__(self, image: torch.Tensor | Image.Image, annotations: list[dict[str, Any]]):
        boxes = torch.tensor([a["bbox"] for a in annotations])
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=(HEIGHT, WIDTH)),
            "labels": torch.tensor([a["category_id"] for a in annotations]),
        }
        if self.rand_augment:  # refuses boxes, so it gets the image alone
            image = self.rand_augment(image)
        image = image if self.pillow else tv_tensors.Image(image)
        image, target = self.jitter(image, target)
        return v2.functional.to_image(image), target


# Our pixel functions and Pillow's, with the same arguments.
_PILLOW_OPERATIONS: dict[Callable, Callable[..., Image.Image]] = {
    pixel.autocontrast: lambda image: ImageOps.autocontrast(image),
    pixel.equalize: lambda image: ImageOps.equalize(image),
    pixel.invert: lambda image: ImageOps.invert(image),
    pixel.posterize: lambda image, bits: ImageOps.posterize(image, bits),
    pixel.solarize: lambda image, threshold: ImageOps.solarize(image, threshold),
    pixel.solarize_add: lambda image, addition: image.point(
        [min(v + addition, 255) if v < 128 else v for v in range(256)] * 3
    ),
    pixel.color: lambda image, factor, image_format: ImageEnhance.Color(image).enhance(factor),
    pixel.contrast: lambda image, factor, image_format: ImageEnhance.Contrast(image).enhance(factor),
    pixel.brightness: lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    pixel.sharpness: lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
}


class _PillowInput:
    """An AugInput whose image is Pillow's."""

    def __init__(self, image: Image.Image, boxes: np.ndarray):
        self.pillow_image, self.boxes = image, boxes

    @property
    def image(self) -> np.ndarray:
        """Augmentations look at the size only."""
        return np.empty((self.pillow_image.height, self.pillow_image.width, 0), np.uint8)

    def transform(self, transform: T.Transform) -> None:
        self.boxes = transform.apply_box(self.boxes)
        for step in getattr(transform, "transforms", [transform]):
            self.pillow_image = _apply_with_pillow(step, self.pillow_image)


def _apply_with_pillow(transform: T.Transform, image: Image.Image) -> Image.Image:
    if isinstance(transform, T.HFlipTransform):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if isinstance(transform, AffineTransform):
        inverse = transform.inverse().matrix.ravel()
        fill = (FILL_VALUE,) * 3
        return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.NEAREST, fillcolor=fill)
    if isinstance(transform, ResizeCropPadTransform):
        (y, x), (scale_y, scale_x) = transform.origin, transform.scale
        region = (x, y, x + transform.width / scale_x, y + transform.height / scale_y)
        content = image.resize((transform.width, transform.height), Image.BILINEAR, box=region)
        result = Image.new("RGB", (SIZE, SIZE), (FILL_VALUE,) * 3)
        result.paste(content)
        return result
    if isinstance(transform, PixelTransform) and transform.function is pixel.cutout:
        x, y, half = (transform.arguments[name] for name in ("center_x", "center_y", "half_side"))
        result = image.copy()
        result.paste((FILL_VALUE,) * 3, (max(x - half, 0), max(y - half, 0), x + half, y + half))
        return result
    if isinstance(transform, PixelTransform):
        return _PILLOW_OPERATIONS[transform.function](image, **transform.arguments)
    return image  # nothing was drawn


class _PillowChain:
    """The same draws as a policy's, with all work on pixels done by Pillow."""

    def __init__(self, policy: str):
        self.augmentations = _policy_mapper(policy).augmentations

    def read(self, path: str) -> Image.Image:
        return Image.open(path).convert("RGB")

    def __call__(
        self, image: Image.Image, annotations: list[dict[str, Any]]
    ) -> tuple[torch.Tensor, np.ndarray]:
        boxes = np.array([a["bbox"] for a in annotations])
        boxes[:, 2:] += boxes[:, :2]
        sample = _PillowInput(image, boxes)
        self.augmentations(sample)
        pixels = torch.from_numpy(np.array(sample.pillow_image)).permute(2, 0, 1).contiguous()
        return pixels, sample.boxes


def _policy_mapper(policy: str, mapper_class: type = SelfTrainingDatasetMapper) -> DatasetMapper:
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.INPUT.AUGMENTATION.POLICY = policy
    cfg.INPUT.AUGMENTATION.IMAGE_SIZE = SIZE
    return mapper_class(cfg, is_train=True)


class _DecodedMapper(SelfTrainingDatasetMapper):
    """The mapper, given images that are already decoded."""

    def _read(self, sample):
        return sample["decoded"]


def _detectron2_mapper(jitter: tuple[float, float]) -> DatasetMapper:
    """Large scale jitter of detectron2's own augmentations."""
    augmentations = [T.ResizeScale(*jitter, SIZE, SIZE), T.FixedSizeCrop((SIZE, SIZE)), T.RandomFlip()]
    return DatasetMapper(True, augmentations=augmentations, image_format="BGR")


def _chains() -> dict[str, Callable]:
    """The contestants that take an image of their own kind and annotations."""
    return {
        "torchvision jitter 0.8-1.2": _TorchvisionChain(SMALL_JITTER),
        "torchvision jitter 0.5-2.0": _TorchvisionChain(LARGE_JITTER),
        "torchvision RandAugment (tensors)": _TorchvisionChain(LARGE_JITTER, rand_augment=True),
        "torchvision RandAugment (Pillow)": _TorchvisionChain(LARGE_JITTER, rand_augment=True, pillow=True),
        "Pillow S1": _PillowChain("S1"),
        "Pillow S4": _PillowChain("S4"),
    }


def _from_files(records: list[dict[str, Any]]) -> dict[str, Callable[[], object]]:
    def each(function: Callable[[dict[str, Any]], object]) -> Callable[[], object]:
        return lambda: [function(record) for record in records]

    contestants = {
        "decode only, detectron2": each(lambda r: utils.read_image(r["file_name"], "BGR")),
        "decode only, ours": each(lambda r: read_image(r["file_name"], "BGR")),
        "detectron2 LSJ 0.8-1.2": each(_detectron2_mapper(SMALL_JITTER)),
        "detectron2 LSJ 0.5-2.0": each(_detectron2_mapper(LARGE_JITTER)),
    }
    for name, chain in _chains().items():
        contestants[name] = each(lambda r, chain=chain: chain(chain.read(r["file_name"]), r["annotations"]))
    for policy in ("S1", "S2", "S3", "S4"):
        contestants[policy] = each(_policy_mapper(policy))
    return contestants


def _from_memory(records: list[dict[str, Any]]) -> dict[str, Callable[[], object]]:
    decoded = [read_image(record["file_name"], "BGR") for record in records]
    contestants = {}

    def all_of_detectron2(mapper):
        with mock.patch.object(utils, "read_image", side_effect=decoded):
            return [mapper(record) for record in records]

    for name, jitter in (("0.8-1.2", SMALL_JITTER), ("0.5-2.0", LARGE_JITTER)):
        mapper = _detectron2_mapper(jitter)
        contestants[f"detectron2 LSJ {name}"] = lambda mapper=mapper: all_of_detectron2(mapper)
    for name, chain in _chains().items():
        pairs = [(chain.read(record["file_name"]), record["annotations"]) for record in records]
        contestants[name] = lambda chain=chain, pairs=pairs: [chain(*pair) for pair in pairs]
    with_pixels = [{**record, "decoded": image} for record, image in zip(records, decoded)]
    for policy in ("S1", "S2", "S3", "S4"):
        mapper = _policy_mapper(policy, _DecodedMapper)
        contestants[policy] = lambda mapper=mapper: [mapper(record) for record in with_pixels]
    return contestants


def _table(results: dict[str, dict[str, dict[str, float]]], unit: str, digits: int) -> str:
    kinds = list(results)
    rows = []
    for name in results[kinds[0]]:
        cells = [results[kind].get(name) for kind in kinds]
        rows.append(
            [name]
            + [
                f"{c['median']:.{digits}f} ({c['min']:.{digits}f} - {c['max']:.{digits}f})" if c else ""
                for c in cells
            ]
        )
    return markdown_table([unit, *kinds], rows)
