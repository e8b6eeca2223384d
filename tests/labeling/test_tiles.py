"""Tiles through the commands: a detector that finds what is painted, on images larger than what it sees."""

import json

import cv2
import numpy as np
import pytest
import torch
from conftest import assert_refused, small_rcnn_config
from deployment.test_export import run_folder
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from selftrain_d2 import Detector, InputError, Tiles, generate_pseudo_labels, load_pseudo_labels
from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.deployment import pictures
from selftrain_d2.labeling.tiles import check_tiles, read_pictures

TILE = 96  # pixels; the network sees as many


class PaintFinder(nn.Module):
    """Finds rectangles of red (class 0) and green (class 1); the score is the share of the image that one has."""

    def __init__(self, cfg):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.sizes = []

    def forward(self, inputs):
        self.sizes.append([tuple(item["image"].shape[1:]) for item in inputs])
        return [{"instances": self.find(item)} for item in inputs]

    def find(self, item):
        image = item["image"].permute(1, 2, 0).numpy()
        boxes, classes = [], []
        for class_id in (0, 1):
            _, _, stats, _ = cv2.connectedComponentsWithStats((image[..., class_id] == 255).astype(np.uint8))
            boxes += [[x, y, x + w, y + h] for x, y, w, h, _ in stats[1:]]
            classes += [class_id] * (len(stats) - 1)
        instances = Instances((item["height"], item["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.scores = instances.pred_boxes.area() / (image.shape[0] * image.shape[1])
        instances.pred_classes = torch.tensor(classes, dtype=torch.long)
        return instances


@pytest.fixture
def run(small_config, tmp_path):
    META_ARCH_REGISTRY._do_register("PaintFinder", PaintFinder)
    try:
        small_config.MODEL.META_ARCHITECTURE = "PaintFinder"
        small_config.INPUT.FORMAT = "RGB"
        yield run_folder(small_config, tmp_path / "run")
    finally:
        META_ARCH_REGISTRY._obj_map.pop("PaintFinder")


# Cut by no border, by a vertical one, by a corner, and by several (longer than a tile); two close to each other.
OBJECTS = [
    (5, 5, 25, 30, 0),
    (80, 8, 130, 40, 1),
    (60, 70, 110, 120, 0),
    (20, 140, 260, 190, 0),
    (150, 40, 190, 80, 1),
    (192, 40, 240, 80, 1),
]


@pytest.fixture
def images(tmp_path):
    """One that is larger than the tiles, one of a single tile, one without objects, and one that is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    large = np.zeros((200, 270, 3), np.uint8)
    for x0, y0, x1, y1, class_id in OBJECTS:
        large[y0:y1, x0:x1, class_id] = 255
    cv2.imwrite(str(folder / "large.png"), large[..., ::-1])
    cv2.imwrite(str(folder / "small.png"), large[:90, :96, ::-1])
    cv2.imwrite(str(folder / "wide.png"), np.zeros((50, 400, 3), np.uint8))
    (folder / "broken.png").write_bytes(b"no image")
    return folder


SMALL = [(5, 5, 25, 30, 0), (80, 8, 96, 40, 1), (60, 70, 96, 90, 0)]
CLASSES = ["--classes", "red", "green"]
TILES = ["--tile", str(TILE), "--overlap", "0.25"]


def test_predict_finds_each_object_once_in_pixels_of_the_file(run, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "LONGEST_SIDE", 200)
    output = tmp_path / "out"
    command = ["predict", run, "--images", str(images), *TILES, *CLASSES, "--batch-size", "3"]
    assert main([*command, "--score-thresh", "0.01", "--output", str(output)]) == 0
    assert "3 images, 1 skipped" in capsys.readouterr().out
    found = {"large.png": [], "small.png": []}
    for entry in json.loads((output / "predictions.json").read_text()):
        x, y, w, h = entry["bbox"]
        found[entry["file_name"]].append((x, y, x + w, y + h, entry["category_id"] - 1))
    assert {name: sorted(boxes) for name, boxes in found.items()} == {
        "large.png": sorted(OBJECTS),
        "small.png": sorted(SMALL),
    }
    picture = cv2.imread(str(output / "pictures" / "large.png.jpg"))
    assert picture.shape == (148, 200, 3)  # no longer than a picture may be
    assert picture[120, 100, 2] > 200 and picture[80, 100].max() < 50  # in the fourth object; in none


def test_label_writes_them_into_the_store_and_goes_on(run, images, tmp_path, capsys):
    output = tmp_path / "labels"
    start = ["label", "--config-file", f"{run}/config.yaml", "--images", str(images), "--output", str(output)]
    end = [*CLASSES, "--score-floor", "0.001", "MODEL.WEIGHTS", f"{run}/model_final.pth"]
    assert main([*start, *TILES, "--dry-run", *end]) == 0 and not output.exists()
    assert "96 x 96 pixels, 24 of them shared" in capsys.readouterr().out
    assert main([*start, *TILES, *end]) == 0
    labels = {d["image_id"]: d for d in load_pseudo_labels(output, 0.001)}
    large = labels["large.png"]
    assert (large["height"], large["width"]) == (200, 270)
    assert sorted((*a["bbox"], a["category_id"]) for a in large["annotations"]) == sorted(OBJECTS)
    assert len(labels["small.png"]["annotations"]) == 3 and not labels["wide.png"]["annotations"]
    manifest = read_manifest(output)
    assert manifest["tiles"] == {"size": TILE, "overlap": 0.25} and list(manifest["skipped"]) == [
        "broken.png"
    ]

    before = (output / "manifest.json").stat().st_mtime_ns
    assert main([*start, *TILES, *end]) == 0  # finished: nothing is redone
    assert (output / "manifest.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert_refused([*start, *end], capsys, "begun with another tiles", "choose another output folder")
    assert_refused([*start, "--tile", "64", *end], capsys, "begun with another tiles")
    (next(output.glob("shards/*.parquet"))).unlink()  # as if it had been stopped
    assert main([*start, *TILES, *end]) == 0
    assert read_manifest(output)["boxes"] == manifest["boxes"] == len(OBJECTS) + 3


def test_tiles_share_batches_across_images_and_fit_the_network(run, images):
    detector = Detector(run, class_names=["red", "green"], tiles=Tiles(TILE, 0.25), batch_size=4)
    image = cv2.imread(str(images / "large.png"))[..., ::-1]
    several = detector([image, str(images / "large.png"), image[:90, :96]])
    one = Detector(run, class_names=["red", "green"], tiles=Tiles(TILE, 0.25), batch_size=1)(image)
    for found in (several[0], several[1]):
        assert torch.equal(found.pred_boxes.tensor, one.pred_boxes.tensor)
        assert torch.equal(found.scores, one.scores) and found.image_size == (200, 270)
    assert len(several[2]) == 3
    sizes = detector._predict.model.sizes
    # Twice 3 x 4 tiles in batches of four, and the small image, which is no full tile.
    assert sizes == [[(TILE, TILE)] * 4] * 6 + [[(90, TILE)]]


def test_an_image_of_one_tile_is_as_without_tiles(small_config, images, tmp_path):
    """Of a real detector with random weights, test-time augmentation included."""
    small_config.SELFTRAIN.TTA.SCALES, small_config.SELFTRAIN.TTA.FLIP = (1.0, 0.5), True
    run = run_folder(small_config, tmp_path / "run")
    small_config.MODEL.WEIGHTS = f"{run}/model_final.pth"
    arguments = (small_config, images, ["small.png"])
    options = {"thing_classes": ["red", "green"], "score_floor": 0.001}
    for name, tiles in (("plain", None), ("tiles", Tiles(TILE, 0.2))):
        generate_pseudo_labels(*arguments, tmp_path / name, tiles=tiles, **options)
    plain, tiled = (load_pseudo_labels(tmp_path / name, 0.001)[0] for name in ("plain", "tiles"))
    assert tiled["annotations"] == plain["annotations"] and len(plain["annotations"]) > 5


def test_mistakes(run, images, tmp_path, capsys):
    start = ["predict", run, "--images", str(images), "--output", str(tmp_path / "out"), *CLASSES]
    assert_refused([*start, "--overlap", "0.3"], capsys, "--overlap goes with --tile")
    assert_refused([*start, "--tile", "0"], capsys, "at least 1 pixel")
    assert_refused([*start, "--tile", "96", "--overlap", "1"], capsys, "from 0 to 0.9")
    assert_refused([*start, "--tile", "96", "--overlap", "0"], capsys, "share no pixel")
    pixels = small_rcnn_config("SelfTrainingSemanticSegmentor", MODEL__BACKBONE__FREEZE_AT=0)
    segmentor = run_folder(pixels, tmp_path / "segmentor")
    command = ["predict", segmentor, *start[2:6], "--classes", "sky", "tree", "car", "--tile", "96"]
    assert_refused(command, capsys, "this model labels pixels: leave --tile out")


@pytest.mark.parametrize("mask_on", [True, False])
def test_masks_of_objects_are_refused(mask_on):
    model = build_model(small_rcnn_config("GeneralizedRCNN", MODEL__MASK_ON=mask_on))
    if not mask_on:
        return check_tiles(Tiles(96, 0.2), model)
    with pytest.raises(InputError, match="masks of objects: set"):
        check_tiles(Tiles(96, 0.2), model)


def test_images_that_pillow_takes_for_bombs_are_read(tmp_path, monkeypatch):
    from PIL import Image

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 50, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    (picture,) = read_pictures(str(tmp_path), ["a.png"], "BGR")
    assert picture["pixels"].shape == (40, 50, 3)
    assert Image.MAX_IMAGE_PIXELS == 900
