from types import SimpleNamespace

import pytest
import torch

from selftrain_d2.engine.hooks.label_monitor import LabelMonitor
from selftrain_d2.modeling.meta_arch.by_source import LabelCounts, no_labels


class _Trainer:
    """As much of a trainer as the hook sees."""

    def __init__(self):
        self.model = SimpleNamespace(label_counts=no_labels())
        self.iter = 0
        self.logged = {}
        self.storage = SimpleNamespace(put_scalars=self._put)

    def _put(self, smoothing_hint=None, **scalars):
        self.logged = scalars

    def run(self, monitor, steps, human, pseudo, kinds=("boxes",)):
        """Steps with (images, labels, images without) of each source, and of each of ``kinds`` the same."""
        monitor.trainer = self
        for _ in range(steps):
            self.model.label_counts = no_labels()
            for kind in kinds:
                self.model.label_counts[kind] = {"human": LabelCounts(*human), "pseudo": LabelCounts(*pseudo)}
            monitor.before_step()
            monitor.after_step()
            self.iter += 1


@pytest.fixture
def warnings_of(caplog):
    caplog.set_level("WARNING", "selftrain_d2")

    def take():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return take


def test_numbers_of_a_period(warnings_of):
    trainer = _Trainer()
    trainer.run(LabelMonitor(period=4), 4, (2, 6, 0), (3, 3, 1))
    assert trainer.logged["human_boxes_per_image"] == 3.0
    assert trainer.logged["pseudo_boxes_per_image"] == 1.0
    assert trainer.logged["pseudo_empty_share"] == pytest.approx(1 / 3)
    assert trainer.logged["images_per_second"] > 0
    assert warnings_of() == []


def test_it_warns_when_pseudo_labels_vanish_and_once(warnings_of):
    trainer, monitor = _Trainer(), LabelMonitor(min_nonempty_share=0.1, period=5)
    trainer.run(monitor, 5, (2, 6, 0), (4, 4, 3))  # a quarter has boxes
    assert warnings_of() == []
    trainer.run(monitor, 10, (2, 6, 0), (4, 0, 4))
    (message,) = warnings_of()
    assert "vanish: 0.0%" in message and "10.0%" in message and "SCORE_THRESH" in message
    trainer.run(monitor, 5, (2, 6, 0), (4, 4, 3))
    trainer.run(monitor, 5, (2, 6, 0), (4, 0, 4))
    assert len(warnings_of()) == 1  # it began anew


def test_it_warns_when_pseudo_labels_explode(warnings_of):
    trainer, monitor = _Trainer(), LabelMonitor(max_boxes_ratio=4.0, period=5)
    trainer.run(monitor, 5, (2, 6, 0), (2, 24, 0))  # 12 against 3: at the limit
    assert warnings_of() == []
    trainer.run(monitor, 5, (2, 6, 0), (2, 26, 0))
    (message,) = warnings_of()
    assert "explode: 13.0 boxes" in message and "against 3.0" in message


def test_numbers_of_masks(warnings_of):
    trainer = _Trainer()
    trainer.run(LabelMonitor(period=4), 4, (2, 1.5, 0), (4, 1.0, 1), kinds=["pixels"])
    assert {name: value for name, value in trainer.logged.items() if name != "images_per_second"} == {
        "human_valid_pixel_share": 0.75,
        "pseudo_valid_pixel_share": 0.25,
        "human_all_ignored_share": 0.0,
        "pseudo_all_ignored_share": 0.25,
    }
    assert warnings_of() == []


def test_it_warns_when_nearly_all_pixels_are_ignored(warnings_of):
    trainer, monitor = _Trainer(), LabelMonitor(min_nonempty_share=0.1, period=5)
    # No image is ignored as a whole, but 92 % of the pixels are.
    trainer.run(monitor, 10, (2, 1.5, 0), (4, 0.32, 0), kinds=["pixels"])
    (message,) = warnings_of()
    assert "masks vanish: 8.0%" in message and "10.0%" in message and "0.0% of the images none" in message
    trainer.run(monitor, 5, (2, 1.5, 0), (4, 0.4, 3), kinds=["pixels"])  # at the limit
    assert warnings_of() == []
    trainer.run(monitor, 5, (2, 1.5, 0), (4, 0.0, 4), kinds=["pixels"])
    (message,) = warnings_of()
    assert "vanish: 0.0%" in message and "100.0% of the images none" in message


def test_dense_pseudo_masks_beside_sparse_human_ones_are_no_explosion(warnings_of):
    trainer = _Trainer()
    trainer.run(LabelMonitor(max_boxes_ratio=4.0, period=2), 2, (2, 0.02, 0), (2, 1.9, 0), kinds=["pixels"])
    assert warnings_of() == []


def test_an_image_with_boxes_and_a_mask_is_one_image(monkeypatch):
    """A step takes a second, by this clock."""
    clock = iter(range(100))
    monkeypatch.setattr("selftrain_d2.engine.hooks.label_monitor.time.perf_counter", lambda: next(clock))
    trainer = _Trainer()
    trainer.run(LabelMonitor(period=3), 3, (2, 1.0, 0), (3, 1.0, 1), kinds=["boxes", "pixels"])
    assert trainer.logged["images_per_second"] == 5.0
    assert trainer.logged["pseudo_empty_share"] == trainer.logged["pseudo_all_ignored_share"]


def test_a_supervised_step_has_no_pseudo_labels(warnings_of):
    trainer = _Trainer()
    trainer.run(LabelMonitor(period=2), 2, (2, 6, 0), (0, 0, 0))
    assert "pseudo_empty_share" not in trainer.logged and warnings_of() == []
    assert torch.is_tensor(LabelMonitor()._counts)


def test_ignored_boxes_are_counted_and_never_warned_of(warnings_of):
    trainer = _Trainer()
    trainer.run(LabelMonitor(period=2), 2, (2, 0, 2), (4, 90, 1), kinds=["ignored_boxes"])
    assert {name: value for name, value in trainer.logged.items() if name != "images_per_second"} == {
        "human_ignored_boxes_per_image": 0.0,
        "pseudo_ignored_boxes_per_image": 22.5,
    }
    assert warnings_of() == []
