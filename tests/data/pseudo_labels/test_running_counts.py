import numpy as np
import pytest

from selftrain_d2.data.pseudo_labels.counts import HumanCounts
from selftrain_d2.data.pseudo_labels.running_counts import DECAY, RunningCounts

# People drew 2 red boxes an image, and one green one in ten.
HUMAN = HumanCounts({"red": 80, "green": 4}, 40)


def _counted(**options):
    counts = RunningCounts(["red", "green"], HUMAN, **options)
    counts.start_step()
    # Two images: people would have drawn 4 red boxes in them.
    counts.add(np.array([0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.9]), np.array([0] * 7 + [1]), 2)
    return counts


def test_a_class_keeps_as_many_boxes_an_image_as_people_drew():
    red = np.array([0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35])
    learned, ignored = _counted().thresholds()
    assert (red >= learned[0]).sum() == 4 and ignored is None
    # Green has too few human boxes: of both together 84 / 40 * 2 = 4.2 are wanted, which are 0.95 ... 0.75 and 0.9.
    assert 0.65 < learned[1] <= 0.75


def test_boxes_are_ignored_to_a_multiple_of_that_count_and_not_below_a_score():
    red = np.array([0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35])
    for ignore_from, number in ((0.1, 6), (0.5, 5), (0.99, 4)):
        learned, ignored = _counted(ignore_from=ignore_from, ignore_ratio=1.5).thresholds()
        assert (red >= ignored[0]).sum() == number and (ignored <= learned).all()


def test_old_boxes_weigh_less_and_the_state_is_kept():
    counts = _counted()
    counts.start_step()
    counts.add(np.array([0.2]), np.array([0]), 1)
    assert counts.images == pytest.approx(2 * DECAY + 1)
    assert counts.boxes.sum() == pytest.approx(8 * DECAY + 1)
    other = RunningCounts(["red", "green"], HUMAN)
    other.load_state_dict(counts.state_dict())
    assert (other.thresholds()[0] == counts.thresholds()[0]).all() and other.images == counts.images
