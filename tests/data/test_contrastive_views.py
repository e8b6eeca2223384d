"""Views for contrastive pre-training: what they show, and in which order the images come."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selftrain_d2.data import contrastive_views
from selftrain_d2.data.contrastive_views import ContrastiveViews, EpochBatchSampler, ReadabilityCheck
from selftrain_d2.data.loader import MixedDataset
from selftrain_d2.errors import InputError

pytest.importorskip("lightly")


def _views(**changes):
    arguments = {
        "size": 32,
        "color_strength": 0.5,
        "gaussian_blur": 0.5,
        "image_format": "RGB",
        "pixel_mean": [120.0, 110.0, 100.0],
        "pixel_std": [50.0, 60.0, 70.0],
    }
    return ContrastiveViews(**{**arguments, **changes})


@pytest.fixture
def photo(tmp_path):
    path = str(tmp_path / "photo.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
    return path


def _sample(views, path, draw=0):
    return MixedDataset([[path]], [views], seed=5)[0, 0, draw]


def test_grey_becomes_what_the_detector_would_see(tmp_path):
    path = str(tmp_path / "grey.png")
    Image.new("RGB", (50, 40), (90, 90, 90)).save(path)
    views = _sample(_views(color_strength=0.0), path)  # no other operation changes a grey image
    assert views.shape == (2, 3, 32, 32)
    for channel, (mean, std) in enumerate([(120, 50), (110, 60), (100, 70)]):
        assert torch.allclose(views[:, channel], torch.tensor((90.0 - mean) / std), atol=1e-3)


def test_bgr_is_rgb_with_its_channels_reversed(photo):
    rgb = _sample(_views(), photo)
    bgr = _sample(
        _views(image_format="BGR", pixel_mean=[100.0, 110.0, 120.0], pixel_std=[70.0, 60.0, 50.0]), photo
    )
    assert torch.equal(bgr, rgb.flip(1))
    assert not torch.equal(rgb, rgb.flip(1))


def test_views_depend_on_the_draw_alone(photo):
    before = torch.get_rng_state()
    one = _sample(_views(), photo)
    assert torch.equal(torch.get_rng_state(), before)  # training has its own random numbers
    torch.manual_seed(99)
    assert torch.equal(_sample(_views(), photo), one)
    assert not torch.equal(_sample(_views(), photo, draw=1), one)
    assert not torch.equal(one[0], one[1])


def test_an_image_that_vanished_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png cannot be read"):
        _sample(_views(), str(tmp_path / "gone.png"))


def test_readability(tmp_path, photo):
    (tmp_path / "text.png").write_text("not an image")
    check = ReadabilityCheck(str(tmp_path))
    assert check["photo.png"] == ""
    assert "not an image" in check["text.png"] and "FileNotFoundError" in check["gone.png"]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.data())
def test_every_epoch_has_each_image_at_most_once(images, data):
    batch_size = data.draw(st.integers(1, images))
    sampler = EpochBatchSampler(images, batch_size, seed=3)
    steps = sampler.batches_per_epoch
    batches = list(itertools.islice(sampler, 3 * steps))
    for epoch in range(3):
        drawn = [key[1] for batch in batches[epoch * steps : (epoch + 1) * steps] for key in batch]
        assert len(set(drawn)) == len(drawn) == steps * batch_size > images - batch_size
    draws = [key[2] for batch in batches for key in batch]
    assert len(set(draws)) == len(draws)  # random numbers of its own for every sample

    sampler.first_batch = data.draw(st.integers(0, 3 * steps - 1))
    rest = list(itertools.islice(sampler, 3 * steps - sampler.first_batch))
    assert rest == batches[sampler.first_batch :]


def test_processes_share_the_batches_of_one(monkeypatch):
    whole = list(itertools.islice(EpochBatchSampler(11, 4, seed=1), 5))
    monkeypatch.setattr(contrastive_views.comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(contrastive_views.comm, "get_rank", lambda rank=rank: rank)
        shares.append(list(itertools.islice(EpochBatchSampler(11, 4, seed=1), 5)))
    for batch, *parts in zip(whole, *shares):
        assert [len(part) for part in parts] == [2, 2]
        assert sorted(parts[0] + parts[1]) == sorted(batch)
