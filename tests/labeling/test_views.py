"""Test-time augmentation, with a detector that sees painted rectangles and nothing else."""

import cv2
import numpy as np
import pytest
import torch
from conftest import make_coco_set, small_rcnn_config
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

from selftrain_d2 import InputError, generate_pseudo_labels, load_pseudo_labels
from selftrain_d2.data.image_sources import list_images
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.scaled_images import scale_augmentations
from selftrain_d2.labeling.inference import Teacher, read_ahead
from selftrain_d2.labeling.views import localization_scores, mean_scores, mirrored, voted_boxes


class PaintDetector(torch.nn.Module):
    """Finds one red and one green rectangle by their colours, in the pixels that it is given.

    It is blind to what lies in the right half of what it sees, and to what is narrower than 12 pixels
    there. Its score is the higher, the larger the image: 0.5 at 96 pixels of width.
    """

    def __init__(self, cfg=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.widths = []

    def forward(self, inputs):
        self.widths.append(inputs[0]["image"].shape[2])
        return [{"instances": self._one(**sample)} for sample in inputs]

    @staticmethod
    def _one(image, height, width):
        boxes, classes = [], []
        for category, channel in enumerate((0, 1)):  # RGB
            # What is grey is no colour.
            rows, columns = torch.nonzero(image[channel].int() - image[2].int() > 127, as_tuple=True)
            if len(rows):
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                if box[0] + box[2] < image.shape[2] and box[2] - box[0] >= 12:
                    boxes.append(box)
                    classes.append(category)
        found = Instances(tuple(image.shape[1:]))
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        found.scores = torch.full((len(boxes),), 0.4 + 0.1 * image.shape[2] / 96)
        found.pred_classes = torch.tensor(classes, dtype=torch.long)
        return detector_postprocess(found, height, width)


@pytest.fixture
def painted(tmp_path):
    """Red at the left and small, green at the right and large."""
    pixels = np.zeros((72, 96, 3), np.uint8)
    pixels[16:40, 8:16, 2] = 255
    pixels[24:64, 56:88, 1] = 255
    (tmp_path / "painted").mkdir()
    cv2.imwrite(str(tmp_path / "painted" / "a.png"), pixels)
    return tmp_path / "painted"


RED, GREEN = [8, 16, 16, 40], [56, 24, 88, 64]


@pytest.fixture
def config(small_config, tmp_path):
    if "PaintDetector" not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(PaintDetector)
    small_config.MODEL.META_ARCHITECTURE = "PaintDetector"
    small_config.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": PaintDetector().state_dict()}, small_config.MODEL.WEIGHTS)
    return small_config


@pytest.mark.parametrize(
    ("flip", "scales", "expected"),
    [
        (False, (1.0,), {}),
        (True, (1.0,), {1: (GREEN, 0.5)}),
        (False, (2.0,), {0: (RED, 0.6)}),
        (False, (0.5, 1.0, 2.0), {0: (RED, 0.6)}),
        (True, (2.0, 0.5), {0: (RED, 0.6), 1: (GREEN, 0.6)}),
        (True, (1.5, 1.0), {0: (RED, 0.55), 1: (GREEN, 0.55)}),
    ],
)
def test_boxes_of_all_views_come_back_to_their_places(config, painted, tmp_path, flip, scales, expected):
    """Each object once, where it was painted, with the score of the best view that saw it."""
    config.SELFTRAIN.TTA.FLIP, config.SELFTRAIN.TTA.SCALES = flip, scales
    generate_pseudo_labels(config, painted, ["a.png"], tmp_path / "labels", thing_classes=["red", "green"])
    (found,) = load_pseudo_labels(tmp_path / "labels", 0.05)
    assert sorted(a["category_id"] for a in found["annotations"]) == sorted(expected)
    for annotation in found["annotations"]:
        box, score = expected[annotation["category_id"]]
        np.testing.assert_allclose(annotation["bbox"], box, atol=1)
        assert annotation["score"] == pytest.approx(score, abs=1e-6)


def _merged(config, painted, **keys):
    for key, value in keys.items():
        config.merge_from_list([key.replace("__", "."), value])
    detector = PaintDetector()
    samples = list(read_ahead(config, str(painted), ["a.png"], 1))
    return Teacher(config, detector)(samples)[0], detector


def test_every_view_is_seen_at_its_size(config, painted):
    _, detector = _merged(config, painted, SELFTRAIN__TTA__FLIP=True, SELFTRAIN__TTA__SCALES=(1.0, 0.5))
    assert detector.widths == [96, 96, 48, 48]


def test_no_more_than_the_detectors_own_limit(config, painted):
    keys = {"SELFTRAIN__TTA__FLIP": True, "SELFTRAIN__TTA__SCALES": (2.0,)}
    assert len(_merged(config, painted, **keys)[0]) == 2
    assert len(_merged(config, painted, TEST__DETECTIONS_PER_IMAGE=1, **keys)[0]) == 1


def test_soft_nms_keeps_what_nms_would_drop_at_a_lower_score(config, painted):
    """Green is seen at scales 1 and 2, mirrored: the same box with scores 0.5 and 0.6."""
    keys = {"SELFTRAIN__TTA__FLIP": True, "SELFTRAIN__TTA__SCALES": (1.0, 2.0)}
    merged, _ = _merged(config, painted, MODEL__RETINANET__SOFT_NMS_SIGMA=0.5, **keys)
    green = merged[merged.pred_classes == 1]
    np.testing.assert_allclose(green.scores, [0.6, 0.5 * np.exp(-1 / 0.5)], rtol=1e-5)
    np.testing.assert_allclose(green.pred_boxes.tensor, [GREEN, GREEN], atol=1e-4)
    merged, _ = _merged(config, painted, MODEL__RETINANET__SCORE_THRESH_TEST=0.1, **keys)
    assert (merged.pred_classes == 1).sum() == 1


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_voting_takes_the_mean_of_the_views_by_score(config, painted, sigma):
    """Red is seen where it is at twice the size, with 0.6, and 2 pixels to the right at 1.5 times, with 0.55."""

    class Shifting(PaintDetector):
        @staticmethod
        def _one(image, height, width):
            found = PaintDetector._one(image, height, width)
            found.pred_boxes.tensor[:, 0::2] += 2.0 * (image.shape[2] == 144)
            return found

    config.merge_from_list(["SELFTRAIN.TTA.SCALES", (2.0, 1.5), "MODEL.RETINANET.SOFT_NMS_SIGMA", sigma])
    samples = list(read_ahead(config, str(painted), ["a.png"], 1))
    for threshold, right in ((0.0, 0.0), (0.5, 2 * 0.55 / (0.6 + 0.55)), (0.9, 0.0)):
        config.SELFTRAIN.TTA.BOX_VOTING = threshold
        found = Teacher(config, Shifting())(samples)[0]
        best = found[found.pred_classes == 0][0]
        np.testing.assert_allclose(best.pred_boxes.tensor, [np.add(RED, [right, 0, right, 0])], atol=1e-4)
        assert best.scores.item() == pytest.approx(0.6)


def test_votes_by_hand():
    """Two views of one object, a neighbour below the IoU, and an object of another class at the same place."""
    candidates = Instances(
        (100, 100),
        pred_boxes=Boxes(
            torch.tensor([[10.0, 10, 30, 30], [12, 10, 32, 30], [25, 10, 45, 30], [10, 10, 30, 30]])
        ),
        scores=torch.tensor([0.9, 0.6, 0.5, 0.8]),
        pred_classes=torch.tensor([0, 0, 0, 1]),
    )
    voted = voted_boxes(candidates[torch.tensor([0, 2, 3])], candidates, 0.6)
    np.testing.assert_allclose(
        voted, [[10.8, 10, 30.8, 30], [25, 10, 45, 30], [10, 10, 30, 30]], rtol=1e-6
    )  # (0.9 * 10 + 0.6 * 12) / 1.5 = 10.8


def _seen(*boxes_and_classes):
    boxes = torch.tensor([box for box, _ in boxes_and_classes], dtype=torch.float32).reshape(-1, 4)
    found = Instances((50, 50), pred_boxes=Boxes(boxes), scores=torch.full((len(boxes),), 0.5))
    found.pred_classes = torch.tensor([c for _, c in boxes_and_classes], dtype=torch.long)
    return found


def test_localization_scores_by_hand():
    one = _seen(([0, 0, 10, 10], 0), ([20, 20, 40, 40], 1))
    two = _seen(([0, 0, 10, 8], 0), ([0, 0, 10, 5], 0), ([20, 20, 40, 40], 0))
    # 80 of 100 pixels are common; where the second is, the other view has a box of another class.
    torch.testing.assert_close(localization_scores(one, [one, two]), torch.tensor([0.8, 0.0]))
    # Seen from the other side: 50 of 100, and no box of that class there.
    torch.testing.assert_close(localization_scores(two, [one, two]), torch.tensor([0.8, 0.5, 0.0]))
    three = _seen(([0, 0, 10, 10], 0), ([20, 20, 40, 30], 1))
    expected = torch.tensor([(0.8 + 1.0) / 2, (0.0 + 0.5) / 2])
    torch.testing.assert_close(localization_scores(one, [one, two, three]), expected)
    assert localization_scores(_seen(), [_seen(), _seen()]).tolist() == []
    assert localization_scores(one, [one, _seen()]).tolist() == [0.0, 0.0]


def test_mean_scores_by_hand():
    """The first object is seen by both views, by the second twice; the other one by one view alone."""
    one = _seen(([0, 0, 10, 10], 0), ([20, 20, 40, 40], 1))
    two = _seen(([0, 0, 10, 8], 0), ([0, 0, 10, 6], 0), ([20, 20, 40, 40], 0))
    one.scores, two.scores = torch.tensor([0.8, 0.6]), torch.tensor([0.2, 0.4, 0.9])
    for boxes, threshold, expected in (
        (one, 0.5, [(0.8 + 0.4) / 2, 0.6 / 2]),
        (one, 0.7, [(0.8 + 0.2) / 2, 0.6 / 2]),  # of the IoUs 0.8 and 0.6 one is left
        (one, 0.9, [0.8 / 2, 0.6 / 2]),
    ):
        torch.testing.assert_close(mean_scores(boxes, [one, two], threshold), torch.tensor(expected))
    lowered = one[:1]
    lowered.scores = torch.tensor([0.4])  # half of what the view had
    torch.testing.assert_close(mean_scores(lowered, [one, two], 0.5), torch.tensor([0.3]))
    assert mean_scores(_seen(), [_seen(), _seen()], 0.5).tolist() == []


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_the_mean_of_the_views_scores_sorts_and_selects(config, painted, sigma):
    """Red is seen at twice the size alone, with 0.6; green mirrored, with 0.5 and 0.6."""
    keys = {
        "SELFTRAIN__TTA__FLIP": True,
        "SELFTRAIN__TTA__SCALES": (1.0, 2.0),
        "SELFTRAIN__TTA__SCORES": "mean",
    }
    keys |= {"MODEL__RETINANET__SOFT_NMS_SIGMA": sigma, "MODEL__RETINANET__SCORE_THRESH_TEST": 0.02}

    def found(**more):
        merged, _ = _merged(config, painted, **{**keys, **more})
        return list(zip(merged.pred_classes.tolist(), merged.scores.tolist()))

    expected = [(1, pytest.approx((0.5 + 0.6) / 4)), (0, pytest.approx(0.6 / 4))]
    if sigma:  # green once more, as the other view has it
        expected.append((1, pytest.approx(0.5 * np.exp(-1 / sigma) * (0.5 + 0.6) / 4 / 0.6)))
    assert found() == expected
    assert found(MODEL__RETINANET__SCORE_THRESH_TEST=0.2) == expected[:1]
    if not sigma:  # Soft-NMS takes its most by the best scores
        assert found(MODEL__RETINANET__SCORE_THRESH_TEST=0.05, TEST__DETECTIONS_PER_IMAGE=1) == expected[:1]


def test_localization_scores_are_written_and_select(config, painted, tmp_path):
    """Green is seen by two of four views, mirrored at both scales; red by one."""
    config.SELFTRAIN.TTA.FLIP, config.SELFTRAIN.TTA.SCALES = True, (1.0, 2.0)
    folder = tmp_path / "labels"
    generate_pseudo_labels(config, painted, ["a.png"], folder, thing_classes=["red", "green"])
    assert read_manifest(folder)["views"] == 4

    def classes(**selection):
        (found,) = load_pseudo_labels(folder, 0.05, **selection)
        return [(a["category_id"], a.get("iscrowd", 0)) for a in found["annotations"]]

    assert sorted(classes()) == [(0, 0), (1, 0)]
    assert classes(localization_thresh=0.3) == [(1, 0)]  # a third
    assert classes(localization_thresh=0.4) == []
    assert classes(localization_thresh=0.3, ignore_score_thresh=0.05) == [(1, 0), (0, 1)]

    config.SELFTRAIN.TTA.FLIP, config.SELFTRAIN.TTA.SCALES = False, (2.0,)
    generate_pseudo_labels(config, painted, ["a.png"], tmp_path / "once", thing_classes=["red", "green"])
    with pytest.raises(InputError, match="needs a teacher that looks several times"):
        load_pseudo_labels(tmp_path / "once", localization_thresh=0.3)


def test_mirroring_twice_changes_nothing():
    instances = Instances((5, 7), pred_boxes=Boxes(torch.tensor([[1.0, 2, 3, 4]])), scores=torch.ones(1))
    instances.pred_masks = torch.zeros(1, 5, 7, dtype=torch.bool)
    instances.pred_masks[0, 2:4, 1:3] = True
    once = mirrored(instances)
    assert once.pred_boxes.tensor.tolist() == [[4, 2, 6, 4]]
    assert once.pred_masks[0].nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
    twice = mirrored(once)
    assert torch.equal(twice.pred_boxes.tensor, instances.pred_boxes.tensor)
    assert torch.equal(twice.pred_masks, instances.pred_masks)


def _random_retinanet(config):
    torch.manual_seed(0)
    config.MODEL.META_ARCHITECTURE = "SelfTrainingRetinaNet"
    config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.05
    model = build_model(config)
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
    torch.nn.init.constant_(model.head.cls_score.bias, -1.0)
    return config, model


def _random_mask_rcnn(config):
    torch.manual_seed(1)
    config = small_rcnn_config(
        "GeneralizedRCNN",
        MODEL__MASK_ON="True",
        INPUT__AUGMENTATION__IMAGE_SIZE="96",
        DATALOADER__NUM_WORKERS="0",
    )
    return config, build_model(config)


@pytest.mark.parametrize("build", [_random_retinanet, _random_mask_rcnn])
def test_a_mirrored_image_has_mirrored_labels(small_config, tmp_path, build):
    """Not so for a detector alone; with FLIP both are the same two views."""
    config, model = build(small_config)
    photos = make_coco_set(tmp_path / "photos", 1, seed=2).images
    cv2.imwrite(f"{photos}/mirrored.png", cv2.imread(f"{photos}/001.png")[:, ::-1])

    def detect():
        samples = read_ahead(config, photos, ["001.png", "mirrored.png"], 2)
        return Teacher(config, model)(list(samples))

    config.SELFTRAIN.TTA.FLIP = True
    plain, image = detect()
    image = mirrored(image)
    assert len(plain) == len(image) > 5
    np.testing.assert_allclose(plain.scores, image.scores, atol=1e-5)
    # Boxes of equal score may change places: each must be somewhere in the other.
    distance = (plain.pred_boxes.tensor[:, None] - image.pred_boxes.tensor).abs().amax(dim=2)
    assert (distance.amin(dim=0) < 0.01).all() and (distance.amin(dim=1) < 0.01).all()
    if plain.has("pred_masks"):
        same = image.pred_masks[distance.argmin(dim=1)]
        assert plain.pred_masks.any() and (plain.pred_masks != same).float().mean() < 0.01
    config.SELFTRAIN.TTA.FLIP = False
    plain, image = detect()
    assert len(plain) != len(image) or not np.allclose(plain.scores, image.scores, atol=1e-5)


def test_empty_views(config, tmp_path):
    cv2.imwrite(str(tmp_path / "black.png"), np.zeros((40, 50, 3), np.uint8))
    config.SELFTRAIN.TTA.FLIP = True
    samples = list(read_ahead(config, str(tmp_path), ["black.png"], 1))
    assert len(Teacher(config, PaintDetector())(samples)[0]) == 0


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -1.0), (1.0, 1.0), (float("nan"),), (float("inf"),)])
def test_impossible_scales(small_config, scales):
    small_config.SELFTRAIN.TTA.SCALES = scales
    with pytest.raises(InputError, match=r"SELFTRAIN\.TTA\.SCALES"):
        scale_augmentations(small_config)


def test_folders_labeled_with_and_without_do_not_mix(config, painted, tmp_path):
    def generate():
        generate_pseudo_labels(
            config, painted, list_images(painted), tmp_path / "labels", thing_classes=["r", "g"]
        )

    generate()
    for key, value in (("TTA.FLIP", True), ("TTA.SCALES", (1.0, 2.0)), ("LABEL_PRECISION", "bfloat16")):
        before = config.clone()
        config.merge_from_list([f"SELFTRAIN.{key}", value])
        with pytest.raises(InputError, match="another teacher_config_sha256"):
            generate()
        config = before
