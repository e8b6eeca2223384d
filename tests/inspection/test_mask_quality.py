"""Quality of pseudo masks against counting pixel after pixel, and against detectron2's evaluator."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selftrain_d2 import InputError
from selftrain_d2.data.label_maps import read_label_map
from selftrain_d2.data.pseudo_labels.masks import PixelLabels, mask_path, write_mask
from selftrain_d2.inspection.mask_quality import markdown_table, mask_quality

CLASSES = ["background", "red", "green", "absent"]


def _make(folder, seed, number=3, size=(7, 9)):
    """Pseudo masks and their truth in files, and the arrays."""
    rng = np.random.default_rng(seed)
    predictions, truth, arrays = [], {}, []
    for i in range(number):
        true = rng.choice([0, 1, 2, 255], size).astype(np.uint8)
        classes = rng.choice([0, 1, 2, 3, 255], size).astype(np.uint8)
        percents = rng.integers(0, 101, size).astype(np.uint8)
        name = f"{i}.jpg"
        row = write_mask(folder, name, PixelLabels(classes, percents))
        Image.fromarray(true).save(folder / f"{i}.png")
        truth[name] = str(folder / f"{i}.png")
        predictions.append(
            {
                "image_id": name,
                "sem_seg_file_name": str(folder / mask_path(name)),
                "sem_seg_sha256": row["png_sha256"],
            }
        )
        arrays.append((true, classes, percents))
    return predictions, truth, arrays


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), percent=st.integers(0, 100))
def test_against_counting_pixel_by_pixel(tmp_path_factory, seed, percent):
    predictions, truth, arrays = _make(tmp_path_factory.mktemp("masks"), seed)
    (row,) = mask_quality(predictions, truth, CLASSES, [percent / 100])
    pixels = ignored = correct = 0
    inside, union = np.zeros(4), np.zeros(4)
    seen = set()
    for true, classes, percents in arrays:
        for t, c, p in zip(true.flat, classes.flat, percents.flat):
            if t == 255:
                continue
            pixels += 1
            if c == 255 or p < percent:
                ignored += 1
                continue
            seen.add(int(t))
            correct += t == c
            if t == c:
                inside[t] += 1
                union[t] += 1
            else:
                union[t] += 1
                union[c] += 1
    assert row.pixels == pixels and row.ignored == pytest.approx(ignored / pixels)
    if ignored == pixels:
        assert row.pixel_accuracy is row.mean_iou is None
        return
    assert row.pixel_accuracy == pytest.approx(correct / (pixels - ignored))
    assert row.mean_iou == pytest.approx(np.mean([inside[c] / union[c] for c in seen]))
    for c, name in enumerate(CLASSES):
        assert row.iou[name] == (pytest.approx(inside[c] / union[c]) if union[c] else None)


def test_without_threshold_it_is_detectron2s_evaluation(tmp_path):
    predictions, truth, arrays = _make(tmp_path, 0)
    for prediction, (_, classes, percents) in zip(predictions, arrays):
        classes[classes == 255] = 0  # the evaluator knows no ignored prediction
        row = write_mask(tmp_path, prediction["image_id"], PixelLabels(classes, percents))
        prediction["sem_seg_sha256"] = row["png_sha256"]
    dicts = [{"file_name": name, "sem_seg_file_name": file} for name, file in truth.items()]
    DatasetCatalog.register("truth", lambda: dicts)
    MetadataCatalog.get("truth").set(stuff_classes=CLASSES, ignore_label=255)
    evaluator = SemSegEvaluator("truth", distributed=False, sem_seg_loading_fn=read_label_map)
    evaluator.reset()
    one_hot = np.eye(4, dtype=np.float32)
    outputs = [{"sem_seg": torch.from_numpy(one_hot[classes].transpose(2, 0, 1))} for _, classes, _ in arrays]
    evaluator.process([{"file_name": d["file_name"]} for d in dicts], outputs)
    expected = evaluator.evaluate()["sem_seg"]
    (row,) = mask_quality(predictions, truth, CLASSES, [0.0])
    assert 100 * row.mean_iou == pytest.approx(expected["mIoU"])
    assert 100 * row.pixel_accuracy == pytest.approx(expected["pACC"])
    assert 100 * row.iou["red"] == pytest.approx(expected["IoU-red"])


def test_faults(tmp_path):
    predictions, truth, _ = _make(tmp_path, 0)
    with pytest.raises(InputError, match=r"no true mask of 0\.jpg"):
        mask_quality(predictions, {}, CLASSES)
    with pytest.raises(InputError, match="class id 2, but there are 2 classes"):
        mask_quality(predictions, truth, CLASSES[:2])
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(truth["0.jpg"])
    with pytest.raises(InputError, match=r"0\.png is 3 x 3 pixels, but the pseudo mask 9 x 7"):
        mask_quality(predictions, truth, CLASSES)


def test_table(tmp_path):
    predictions, truth, _ = _make(tmp_path, 0)
    rows = mask_quality(predictions, truth, CLASSES, [0.5, 1.0])
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 4
    assert lines[2] == (
        f"| 0.5 | {100 * rows[0].ignored:.1f} | {100 * rows[0].pixel_accuracy:.1f} | {100 * rows[0].mean_iou:.1f} |"
    )
