import math

import pytest
import torch

from selftrain_d2.modeling.soft_nms import soft_nms


def _iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / (sum(area) - width * height)


def _plain_loop(boxes, scores, classes, sigma, score_thresh, max_detections):
    """Soft-NMS as its paper writes it, class by class, to the end; then threshold, sort and cut."""
    boxes, classes = boxes.tolist(), classes.tolist()
    done = []
    for number in set(classes):
        rest = {i: s for i, s in enumerate(scores.tolist()) if classes[i] == number}
        while rest:
            best = max(rest, key=rest.get)
            done.append((rest.pop(best), best))
            for i in rest:
                rest[i] *= math.exp(-(_iou(boxes[best], boxes[i]) ** 2) / sigma)
    done = sorted((d for d in done if d[0] > score_thresh), reverse=True)[:max_detections]
    return [i for _, i in done], [s for s, _ in done]


def _detections(number, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand((number, 2), generator=generator) * 60
    size = torch.rand((number, 2), generator=generator) * 50
    return (
        torch.cat([corner, corner + size], dim=1),
        torch.rand(number, generator=generator),
        torch.randint(classes, (number,), generator=generator),
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("number", "classes", "max_detections"), [(1, 1, 100), (60, 1, 100), (200, 4, 30)])
@pytest.mark.parametrize(("sigma", "score_thresh"), [(0.3, 0.05), (0.05, 0.3), (2.0, 0.0)])
def test_as_the_plain_loop(number, classes, max_detections, sigma, score_thresh, seed):
    detections = _detections(number, classes, seed)
    limits = {"sigma": sigma, "score_thresh": score_thresh, "max_detections": max_detections}
    keep, scores = soft_nms(*detections, **limits)
    expected_keep, expected_scores = _plain_loop(*detections, **limits)
    # By index: scores that differ by less than float32 can tell may come in either order.
    expected = dict(zip(expected_keep, expected_scores))
    assert dict(zip(keep.tolist(), scores.tolist())) == pytest.approx(expected, rel=1e-5)
    assert (scores.diff() <= 0).all()


def test_one_pair_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10]])  # IoU 0.5 with the first, and 1
    scores, classes = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1])
    keep, new = soft_nms(boxes, scores, classes, sigma=0.3, score_thresh=0.05, max_detections=10)
    assert keep.tolist() == [0, 2, 1]  # another class is left alone, and now is before the second box
    torch.testing.assert_close(new, torch.tensor([0.9, 0.7, 0.8 * math.exp(-0.25 / 0.3)]))


def test_no_candidates():
    keep, scores = soft_nms(
        torch.zeros(0, 4),
        torch.zeros(0),
        torch.zeros(0, dtype=torch.long),
        sigma=0.3,
        score_thresh=0.05,
        max_detections=100,
    )
    assert len(keep) == len(scores) == 0 and keep.dtype == torch.long


def test_boxes_without_area_and_half_precision():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 9, 9]], dtype=torch.float16)
    scores = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float16)
    keep, new = soft_nms(
        boxes, scores, torch.zeros(3, dtype=torch.long), sigma=0.3, score_thresh=0.05, max_detections=3
    )
    assert keep.tolist() == [0, 1, 2]
    torch.testing.assert_close(new, scores.float())  # no overlap, no NaN


def test_inputs_are_left_as_they_were():
    boxes, scores, classes = _detections(30, 2, seed=0)
    before = scores.clone()
    soft_nms(boxes, scores, classes, sigma=0.3, score_thresh=0.05, max_detections=10)
    assert torch.equal(scores, before)
