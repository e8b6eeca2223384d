import copy

import pytest
import torch
from conftest import small_rcnn_config
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

SIZE = 64


def _batch(sources):
    generator = torch.Generator().manual_seed(0)
    batch = []
    for i, source in enumerate(sources):
        count = i % 3
        instances = Instances((SIZE, SIZE))
        boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 4.0, 60.0, 50.0]])[:count]
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.arange(count)
        instances.gt_masks = PolygonMasks(
            [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tolist()]
        )
        image = torch.randint(0, 255, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        sem_seg = torch.randint(0, 3, (SIZE, SIZE), generator=generator)
        batch.append({"image": image, "instances": instances, "sem_seg": sem_seg, "label_source": source})
    return batch


def _losses(model, batch):
    torch.manual_seed(0)
    with EventStorage():
        return model(batch)


CASCADE = {"MODEL__ROI_HEADS__NAME": "CascadeROIHeads", "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": "True"}
ARCHITECTURES = [
    ("GeneralizedRCNN", {}),
    ("GeneralizedRCNN", {"MODEL__MASK_ON": "True"}),
    ("GeneralizedRCNN", CASCADE),
    ("PanopticFPN", {"MODEL__MASK_ON": "True"}),
    ("SemanticSegmentor", {}),
]


@pytest.mark.parametrize(("name", "options"), ARCHITECTURES)
def test_losses_of_each_source_are_those_of_the_plain_architecture(name, options):
    torch.manual_seed(0)
    plain = build_model(small_rcnn_config(name, **options)).train()
    ours = build_model(small_rcnn_config(f"SelfTraining{name}", **options)).train()
    ours.load_state_dict(plain.state_dict())  # the same names
    batch = _batch(["human", "pseudo", "human", "pseudo", "pseudo"])
    ours.loss_weights = (0.25, 3.0)

    torch.manual_seed(0)
    with EventStorage():
        mixed = ours(batch)
        torch.manual_seed(0)
        expected = {s: plain([x for x in batch if x["label_source"] == s]) for s in ("human", "pseudo")}

    assert len(mixed) == len(expected["human"]) + len(expected["pseudo"]) >= 2
    for source, weight in zip(("human", "pseudo"), ours.loss_weights):
        for loss_name, loss in expected[source].items():
            torch.testing.assert_close(mixed[f"{loss_name}_{source}"], weight * loss)
        torch.testing.assert_close(ours.raw_losses[source], sum(expected[source].values()).detach())
    sum(mixed.values()).backward()


def test_without_pseudo_labels_it_is_the_plain_architecture():
    torch.manual_seed(0)
    plain = build_model(small_rcnn_config("GeneralizedRCNN")).train()
    ours = build_model(small_rcnn_config("SelfTrainingGeneralizedRCNN")).train()
    ours.load_state_dict(plain.state_dict())
    ours.loss_weights = (0.1, 0.1)  # of no effect here
    batch = _batch(["human"] * 3)
    mine, theirs = _losses(ours, batch), _losses(plain, batch)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name])
    assert ours.raw_losses["pseudo"] is None


def test_inference_is_the_plain_architectures():
    torch.manual_seed(0)
    plain = build_model(small_rcnn_config("GeneralizedRCNN")).eval()
    ours = build_model(small_rcnn_config("SelfTrainingGeneralizedRCNN")).eval()
    ours.load_state_dict(plain.state_dict())
    image = [{"image": _batch(["human"])[0]["image"], "height": SIZE, "width": SIZE}]
    with torch.no_grad():
        one, other = ours(image)[0]["instances"], plain(copy.deepcopy(image))[0]["instances"]
    torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor)
