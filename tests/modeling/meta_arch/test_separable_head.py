"""EfficientDet's heads: separable convolutions of all levels, batch norms of each."""

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from selftrain_d2.modeling.efficientdet_weights import config_of


def tiny_config():
    cfg = config_of("efficientdet-d0")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.BIFPN.REPEATS = 8, 2, 1
    return cfg


def test_layers():
    head = build_model(tiny_config()).head
    for subnet, last, outputs in (
        (head.cls_subnet, head.cls_score, 9 * 2),
        (head.bbox_subnet, head.bbox_pred, 9 * 4),
    ):
        kinds = [type(layer).__name__ for layer in subnet]
        assert kinds == ["Conv2d", "Conv2d", "CycleBatchNormList", "Swish"] * 3
        for depthwise, pointwise in ((subnet[0], subnet[1]), (subnet[8], subnet[9]), tuple(last)):
            assert depthwise.groups == 8 and depthwise.kernel_size == (3, 3) and depthwise.bias is None
            assert pointwise.kernel_size == (1, 1) and pointwise.bias is not None
        assert last[1].out_channels == outputs
        norms = [m for m in subnet.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 3 * 5 and {(m.eps, m.momentum, m.affine) for m in norms} == {(1e-3, 0.01, True)}
    # a score of 0.01 in the beginning
    assert torch.allclose(head.cls_score[1].bias.sigmoid(), torch.tensor(0.01))
    # normal with variance 1 / fan-in: 9 and 8 inputs
    weights = torch.cat(
        [m.weight.flatten() for m in head.modules() if isinstance(m, nn.Conv2d) and m.groups == 8]
    )
    assert abs(weights.std().item() * 3 - 1) < 0.1


def test_levels_share_convolutions_and_not_norms():
    head = build_model(tiny_config()).head.eval()
    for level, norm in enumerate(head.cls_subnet[-2]):
        nn.init.constant_(norm.bias, level)
    nn.init.normal_(head.cls_score[1].weight)
    outputs = [head([torch.zeros(1, 8, 4, 4)] * 5)[0] for _ in range(2)]
    for first, again in zip(*outputs):
        assert torch.equal(first, again)
    assert len({round(level[0, 0, 1, 1].item(), 4) for level in outputs[0]}) == 5


def test_every_parameter_gets_a_gradient():
    model = build_model(tiny_config())
    instances = Instances((96, 96))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 60.0]]))
    instances.gt_classes = torch.tensor([1])
    sample = {"image": torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8), "instances": instances}
    with EventStorage():
        sum(model([sample, sample]).values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
