import cv2
import numpy as np
import pytest
import torch
from conftest import make_coco_set
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from selftrain_d2 import InputError
from selftrain_d2.data.image_sources import list_images
from selftrain_d2.labeling.inference import LOOK_AHEAD, Network, Teacher, label_in_order, read_ahead
from selftrain_d2.modeling.torch_flags import torch_flag


class _Recorder:
    """In the place of a teacher: keeps its batches, and says by one box which image it saw."""

    def __init__(self):
        self.batches = []

    def __call__(self, samples):
        self.batches.append([(s["file_name"], s["images"][0].shape) for s in samples])
        result = []
        for s in samples:
            instances = Instances((s["height"], s["width"]))
            instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, 1, float(s["file_name"])]]))
            instances.scores, instances.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
            result.append(instances)
        return result


def _samples(widths):
    """One for each width; 0: an image that was skipped."""
    for i, width in enumerate(widths):
        if width:
            yield {"file_name": str(i), "height": 1, "width": width, "images": [torch.zeros(3, 1, width)]}
        else:
            yield {"file_name": str(i), "skipped": "broken"}


@settings(max_examples=200, deadline=None)
@given(
    widths=st.lists(st.integers(0, 4), max_size=60),
    batch_size=st.integers(1, 5),
    look_ahead=st.integers(1, 4),
)
def test_rows_keep_their_order_and_batches_one_shape(widths, batch_size, look_ahead):
    teacher, taken = _Recorder(), []
    samples = (taken.append(sample) or sample for sample in _samples(widths))
    rows = []
    for row in label_in_order(samples, teacher, batch_size, look_ahead):
        assert len(taken) - len(rows) <= look_ahead * batch_size
        rows.append(row)
    assert [row["file_name"] for row in rows] == [str(i) for i in range(len(widths))]
    for i, (row, width) in enumerate(zip(rows, widths)):
        assert (row["skipped"] == "broken") == (width == 0)
        assert width == 0 or (row["boxes"][3] == i and row["width"] == width)
    for batch in teacher.batches:
        assert 1 <= len(batch) <= batch_size and len({shape for _, shape in batch}) == 1
    assert sum(map(len, teacher.batches)) == sum(width > 0 for width in widths)


@settings(max_examples=50, deadline=None)
@given(widths=st.lists(st.integers(1, 4), max_size=40), batch_size=st.integers(1, 5))
def test_batches_are_as_few_as_can_be_where_all_images_are_in_sight(widths, batch_size):
    teacher = _Recorder()
    list(label_in_order(_samples(widths), teacher, batch_size, look_ahead=40))
    assert len(teacher.batches) == sum(-(-widths.count(width) // batch_size) for width in set(widths))


def test_two_shapes_by_turns_fill_their_batches():
    teacher = _Recorder()
    list(label_in_order(_samples([1, 2] * 64), teacher, batch_size=8))
    assert [len(batch) for batch in teacher.batches] == [8] * 16 and LOOK_AHEAD > 1


@pytest.fixture
def detector(small_config):
    """A detector with random weights, which finds something everywhere; and its config."""
    torch.manual_seed(0)
    small_config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.05
    model = build_model(small_config)
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
    torch.nn.init.constant_(model.head.cls_score.bias, -1.0)
    return small_config, model


@pytest.fixture
def photos(tmp_path):
    """Three shapes by turns."""
    folder = make_coco_set(tmp_path / "photos", 9, seed=4).images
    for i in range(0, 9, 3):
        image = cv2.imread(f"{folder}/{i + 1:03d}.png")
        cv2.imwrite(f"{folder}/{i + 1:03d}.png", image[:60])
        cv2.imwrite(f"{folder}/{i + 2:03d}.png", image[:, :40])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.5)])
def test_reading_ahead_gives_the_images_at_each_scale(small_config, photos, workers, scales):
    small_config.SELFTRAIN.TTA.SCALES = scales
    small_config.DATALOADER.NUM_WORKERS = workers
    names = [*list_images(photos)[::-1], "lost.png"]
    samples = list(read_ahead(small_config, photos, names, batch_size=4))
    assert [sample["file_name"] for sample in samples] == names
    assert "lost.png" in samples.pop()["skipped"]
    for sample in samples:
        pixels = cv2.imread(f"{photos}/{sample['file_name']}")[:, :, ::-1]  # the config's format is RGB
        height, width = pixels.shape[:2]
        assert (sample["height"], sample["width"]) == (height, width)
        for scale, image in zip(scales, sample["images"]):
            factor = scale * 96 / max(height, width)
            assert (
                image.shape == (3, round(height * factor), round(width * factor))
                and image.dtype == torch.uint8
            )
        if scales == (1.0,) and (height, width) == (96, 96):
            assert (image.numpy() == pixels.transpose(2, 0, 1)).all()
    assert len({tuple(sample["images"][0].shape) for sample in samples}) == 3


def assert_same_detections(one, other, tolerance=1e-4):
    """The same boxes in any order: equal scores may change places."""
    one, other = (
        np.column_stack([np.reshape(row["boxes"], (-1, 4)), row["scores"], row["category_ids"]])
        for row in (one, other)
    )
    assert one.shape == other.shape
    close = (np.abs(one[:, None] - other) < [*[100 * tolerance] * 4, tolerance, 0.5]).all(axis=2)
    assert close.any(axis=0).all() and close.any(axis=1).all()


@pytest.mark.parametrize("tta", [False, True])
def test_batch_size_changes_nothing(detector, photos, tta):
    cfg, model = detector
    if tta:
        cfg.SELFTRAIN.TTA.FLIP, cfg.SELFTRAIN.TTA.SCALES = True, (0.7, 1.3)
    teacher, names = Teacher(cfg, model), list_images(photos)

    def rows(batch_size):
        return list(label_in_order(read_ahead(cfg, photos, names, 4), teacher, batch_size))

    one, three = rows(1), rows(3)
    assert sum(len(row["scores"]) for row in one) > 100
    for a, b in zip(one, three):
        assert_same_detections(a, b)


def test_bfloat16_is_near_float32_and_gives_float32(detector, photos):
    cfg, model = detector

    def detect(precision):
        cfg.SELFTRAIN.LABEL_PRECISION = precision
        samples = list(read_ahead(cfg, photos, list_images(photos)[2:3], 1))
        return Teacher(cfg, model)(samples)[0]

    full, half = detect("float32"), detect("bfloat16")
    assert half.scores.dtype == half.pred_boxes.tensor.dtype == torch.float32
    assert not torch.equal(half.scores, full.scores)  # it did run in bfloat16
    n = min(len(full), len(half), 20)
    assert n > 5 and (full.scores[:n] - half.scores[:n]).abs().max() < 0.03


def test_unknown_precision(detector):
    cfg, model = detector
    cfg.SELFTRAIN.LABEL_PRECISION = "int8"
    with pytest.raises(InputError, match=r"LABEL_PRECISION is 'int8'; known are float32, float16, bfloat16"):
        Teacher(cfg, model)


def test_a_teacher_without_boxes_is_refused(small_config):
    class Segmentor(torch.nn.Module):
        def forward(self, inputs):
            return [{"sem_seg": None} for _ in inputs]

    with pytest.raises(InputError, match="a Segmentor, which makes no boxes"):
        Teacher(small_config, Segmentor())(list(_samples([3])))


@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("bfloat16", True)])
def test_float32_is_not_tensor_float_32(small_config, precision, tf32):
    flags = [torch.backends.cudnn, torch.backends.cuda.matmul]
    small_config.SELFTRAIN.LABEL_PRECISION = precision
    seen = []

    class Model(torch.nn.Module):
        def forward(self, inputs):
            seen.extend(backend.allow_tf32 for backend in flags)
            return []

    sample = {"images": [torch.zeros(3, 8, 8, dtype=torch.uint8)], "height": 8, "width": 8}
    with torch_flag(flags[0], "allow_tf32", True), torch_flag(flags[1], "allow_tf32", True):
        Network(small_config, Model()).outputs([sample], 0, False, at_file_size=True)
        assert all(backend.allow_tf32 for backend in flags)
    assert seen == [tf32, tf32]
