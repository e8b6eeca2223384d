"""SimCLR's loss against the paper's formula, and which part of a detector it trains."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils.events import EventStorage
from torch import nn

from selftrain_d2 import add_selftrain_config
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.simclr import SimCLR, build_bottom_up, contrastive_accuracy

pytest.importorskip("lightly")


def _similarities(first, second):
    """Cosines of all pairs of 2N views."""
    z = np.concatenate([first, second]).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return z @ z.T


def _nt_xent(first, second, temperature):
    """Equation 1 of arXiv:2002.05709, averaged over all 2N views, written as it stands there."""
    similarities = _similarities(first, second) / temperature
    views, images = len(similarities), len(first)
    losses = []
    for i in range(views):
        others = [np.exp(similarities[i, k]) for k in range(views) if k != i]
        losses.append(-np.log(np.exp(similarities[i, (i + images) % views]) / sum(others)))
    return np.mean(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_is_the_papers(small_config, temperature):
    torch.manual_seed(0)
    model = SimCLR(build_bottom_up(small_config), temperature)
    projections = []
    model.head.register_forward_hook(lambda module, inputs, output: projections.append(output.detach()))
    with EventStorage() as storage:
        loss = model(torch.randn(5, 2, 3, 32, 32))["loss_contrastive"]
        accuracy = storage.latest()["contrastive_accuracy"][0]
    first, second = projections[0].numpy()[:5], projections[0].numpy()[5:]
    assert loss.item() == pytest.approx(_nt_xent(first, second, temperature), rel=1e-5)

    similarities = _similarities(first, second)
    np.fill_diagonal(similarities, -2)
    hits = [similarities[i].argmax() == (i + 5) % 10 for i in range(10)]
    assert accuracy == pytest.approx(np.mean(hits))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone._conv_stem.parameters())


def test_both_views_of_an_image_are_its_pair(small_config):
    """Views that are all alike within an image give a loss near zero: the pairs are the right ones."""
    model = SimCLR(build_bottom_up(small_config), temperature=0.1)
    model.backbone._drops = False
    images = torch.randn(4, 1, 3, 32, 32)
    with EventStorage() as storage:
        model(images.repeat(1, 2, 1, 1, 1))
        assert storage.latest()["contrastive_accuracy"][0] == 1


def test_loss_falls(small_config):
    """The gradient leads from guessing, log(2N - 1), to telling the views of a fixed batch apart."""
    torch.manual_seed(0)
    model = SimCLR(build_bottom_up(small_config), temperature=0.5)
    model.backbone._drops = False
    views = torch.randn(4, 2, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    losses = []
    with EventStorage():
        for _ in range(15):
            loss = model(views)["loss_contrastive"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert abs(losses[0] - np.log(7)) < 0.7
    assert losses[-1] < losses[0] - 0.5


def test_accuracy():
    apart = torch.eye(4)
    assert contrastive_accuracy(apart, 3 * apart) == 1
    assert contrastive_accuracy(apart, apart.roll(1, 0)) == 0


def _rcnn_config(**keys):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list([word for key, value in keys.items() for word in (key.replace("__", "."), value)])
    return cfg


@pytest.mark.parametrize(
    "keys",
    [
        {"MODEL__BACKBONE__NAME": "build_resnet_fpn_backbone", "MODEL__RESNETS__NORM": "FrozenBN"},
        {"MODEL__BACKBONE__NAME": "build_efficientnet_fpn_backbone", "MODEL__EFFICIENTNET__NORM": "FrozenBN"},
    ],
)
def test_nothing_is_frozen(keys):
    features = "['res2', 'res3', 'res4', 'res5']"
    cfg = _rcnn_config(**keys, MODEL__RESNETS__OUT_FEATURES=features, MODEL__FPN__IN_FEATURES=features,
                       MODEL__RESNETS__DEPTH=18, MODEL__RESNETS__RES2_OUT_CHANNELS=64,
                       MODEL__EFFICIENTNET__NAME="efficientnet-b0")  # fmt: skip
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
    bottom_up = build_bottom_up(cfg)
    assert all(parameter.requires_grad for parameter in bottom_up.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in bottom_up.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in bottom_up.modules())
    assert not any(name.startswith(("fpn_", "bottom_up.")) for name in bottom_up.state_dict())
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2  # the detector's own


def test_largest_stride_is_pooled():
    cfg = _rcnn_config(
        MODEL__BACKBONE__NAME="build_efficientnet_backbone",
        MODEL__EFFICIENTNET__NAME="efficientnet-b0",
        MODEL__EFFICIENTNET__OUT_FEATURES="['res4', 'res2']",
    )
    assert SimCLR(build_bottom_up(cfg), 0.1).feature == "res4"


def test_unknown_feature_is_refused():
    cfg = _rcnn_config(
        MODEL__BACKBONE__NAME="build_efficientnet_backbone", MODEL__EFFICIENTNET__OUT_FEATURES="['res9']"
    )
    with pytest.raises(InputError, match="res9"):
        build_bottom_up(cfg)
