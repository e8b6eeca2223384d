"""Boxes as arrays: those of the dicts, and where the policies move them."""

import numpy as np
import pytest
from detectron2.structures import BoxMode

from selftrain_d2.data.augmentation.jitter import ScaleJitterCrop
from selftrain_d2.data.box_arrays import BoxArrays


def sample(height, width, *annotations):
    return {"height": height, "width": width, "annotations": list(annotations)}


def box(bbox, category_id=0, mode=BoxMode.XYWH_ABS, **more):
    return {"bbox": bbox, "bbox_mode": mode, "category_id": category_id, **more}


def test_what_training_learns_from():
    arrays = BoxArrays.of(
        [
            sample(
                40,
                60,
                box([1, 2, 10, 20], 3),
                box([1, 2, 11, 22], 4, BoxMode.XYXY_ABS),
                box([0, 0, 5, 5], iscrowd=1),
                box([5, 5, 0, 5]),
                box([30, 30, 10, 5, 45], mode=BoxMode.XYWHA_ABS),
                box([50, 30, 11, 11], 1),  # a pixel outside, as COCO's rounding
            ),
            {"annotations": [box([0, 0, 5, 5])]},  # of unknown size
            {"height": 9, "width": 9, "sem_seg_file_name": "mask.png"},
        ]
    )
    assert arrays.boxes.tolist() == [[1, 2, 11, 22], [1, 2, 11, 22], [50, 30, 60, 40]]
    assert arrays.category_ids.tolist() == [3, 4, 1]
    assert arrays.image_sizes.tolist() == [[40, 60]] * 3
    assert BoxArrays.of([]).resized(96).shape == (0, 4)


@pytest.mark.parametrize("size", [96, 333])
def test_resized_as_the_policies_do_without_jitter(size):
    generator = np.random.default_rng(0)
    samples, expected = [], []
    for height, width in ((480, 640), (501, 333), (64, 64), (3, 900)):
        corner = generator.uniform(0, (width / 2, height / 2), (5, 2))
        boxes = np.tile(corner, 2)
        boxes[:, 2:] += (width / 3, height / 3)
        samples.append(sample(height, width, *(box(list(b), mode=BoxMode.XYXY_ABS) for b in boxes)))
        transform = ScaleJitterCrop(size, (1, 1)).get_transform(np.zeros((height, width), np.uint8))
        expected.append(transform.apply_box(boxes))
    np.testing.assert_allclose(BoxArrays.of(samples).resized(size), np.concatenate(expected), atol=1e-3)


def test_a_sample_has_so_many_of_each_class_and_is_always_the_same():
    arrays = BoxArrays.of([sample(99, 99, *(box([i, i, 5, 5], i % 3 if i < 30 else 0) for i in range(90)))])
    drawn = arrays.sample(12)
    assert np.bincount(drawn.category_ids).tolist() == [12, 10, 10]
    assert len(np.unique(drawn.boxes[:, 0])) == 32
    assert np.array_equal(drawn.boxes, arrays.sample(12).boxes)
    kept = drawn.boxes[drawn.category_ids == 0][:, 0]
    assert kept.max() > 60  # drawn, not the first
