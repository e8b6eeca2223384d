import pytest
import torch
from detectron2.modeling.matcher import Matcher

from selftrain_d2.modeling.matcher import BestAnchorMatcher


def _expected(quality, threshold):
    """Matching without an ignored band and with forced best anchors, box by box and anchor by anchor."""
    boxes, anchors = len(quality), len(quality[0])
    matches, labels = [], []
    for anchor in range(anchors):
        column = [quality[box][anchor] for box in range(boxes)]
        matches.append(column.index(max(column)))
        labels.append(int(max(column) >= threshold))
    for box in reversed(range(boxes)):  # the first box has the last word
        if max(quality[box]) > 0:
            anchor = quality[box].index(max(quality[box]))
            matches[anchor], labels[anchor] = box, 1
    return matches, labels


@pytest.mark.parametrize("seed", range(20))
def test_as_the_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values: ties, several boxes with one best anchor, boxes that meet no anchor.
    quality = torch.randint(0, 9, (6, 8), generator=generator) / 10
    quality[seed % 6] *= seed % 2
    matches, labels = BestAnchorMatcher([0.5], [0, 1])(quality)
    expected_matches, expected_labels = _expected(quality.tolist(), 0.5)
    assert labels.tolist() == expected_labels
    assert matches.tolist() == expected_matches
    assert matches.dtype == torch.int64 and labels.dtype == torch.int8


def test_where_it_differs_from_detectron2():
    # Both boxes are best served by anchor 0, and it overlaps the second one more.
    quality = torch.tensor([[0.3, 0.1, 0.0], [0.8, 0.6, 0.0]])
    matches, labels = Matcher([0.5], [0, 1], allow_low_quality_matches=True)(quality)
    assert matches[0] == 1 and labels.tolist() == [1, 1, 0]
    matches, labels = BestAnchorMatcher([0.5], [0, 1])(quality)
    assert matches[0] == 0 and labels.tolist() == [1, 1, 0]


def test_an_ignored_band_stays_possible():
    quality = torch.tensor([[0.45, 0.42, 0.1]])
    _, labels = BestAnchorMatcher([0.4, 0.5], [0, -1, 1])(quality)
    assert labels.tolist() == [1, -1, 0]


def test_an_image_without_boxes_is_all_negative():
    matches, labels = BestAnchorMatcher([0.5], [0, 1])(torch.zeros(0, 7))
    assert matches.tolist() == labels.tolist() == [0] * 7
