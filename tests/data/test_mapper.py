"""From a dataset dict to a sample: files of every kind, labels of every kind, and what is refused."""

import copy
import random

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from fvcore.transforms.transform import TransformList
from PIL import Image

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.data.augmentation.box_only import BoxOnlyTransform
from selftrain_d2.data.augmentation.geometric import AffineTransform, ResizeCropPadTransform
from selftrain_d2.data.mapper import SelfTrainingDatasetMapper, read_image
from selftrain_d2.errors import InputError


def make_config(**augmentation):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.INPUT.AUGMENTATION.IMAGE_SIZE = 64
    for key, value in augmentation.items():
        setattr(cfg.INPUT.AUGMENTATION, key, value)
    return cfg


def make_mapper(*augmentations, **options):
    """A mapper of given augmentations instead of a policy."""
    return SelfTrainingDatasetMapper(True, augmentations=list(augmentations), image_format="BGR", **options)


@pytest.fixture
def record(tmp_path):
    """An image of 80 x 60 pixels with two objects and a crowd."""
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    box = {"bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
    return {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 17,
        "height": 60,
        "width": 80,
        "annotations": [
            {**box, "bbox": [10, 20, 30, 20], "category_id": 3},
            {**box, "bbox": [0, 0, 80, 60], "category_id": 1, "iscrowd": 1},
            {"bbox": [50, 5, 75, 55], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0},
        ],
    }


def test_training_sample(record):
    before = copy.deepcopy(record)
    sample = make_mapper()(record)
    assert record == before
    assert sample["image"].dtype == torch.uint8 and sample["image"].shape == (3, 60, 80)
    expected = utils.read_image(record["file_name"], "BGR").transpose(2, 0, 1)
    np.testing.assert_array_equal(sample["image"].numpy(), expected)
    instances = sample.pop("instances")
    assert instances.image_size == (60, 80)
    assert instances.gt_boxes.tensor.tolist() == [[10, 20, 40, 40], [50, 5, 75, 55]]
    assert instances.gt_boxes.tensor.dtype == torch.float32
    assert instances.gt_classes.tolist() == [3, 0]
    del sample["image"]
    kept = {key: record[key] for key in ("file_name", "image_id", "height", "width")}
    assert sample == {**kept, "label_source": "human"}


@pytest.mark.parametrize("source", ["human", "pseudo"])
@pytest.mark.parametrize("is_train", [True, False])
def test_label_source_is_kept(record, source, is_train):
    mapper = SelfTrainingDatasetMapper(make_config(), is_train)
    assert mapper({**record, "label_source": source})["label_source"] == source


def test_test_sample(record):
    mapper = SelfTrainingDatasetMapper(make_config(), is_train=False)
    for changed in (record, {k: v for k, v in record.items() if k != "annotations"}):
        sample = mapper(changed)
        assert sample["image"].shape == (3, 48, 64)
        assert (sample["height"], sample["width"]) == (60, 80)
        assert "instances" not in sample and "annotations" not in sample


@pytest.mark.parametrize("policy", ["S1", "S2", "S3", "S4"])
def test_the_same_random_state_gives_the_same_sample(record, policy):
    mapper = SelfTrainingDatasetMapper(make_config(POLICY=policy, AUTOAUGMENT="v1"), True)
    samples = []
    for seed in (5, 6, 5):
        np.random.seed(seed)
        # Only numpy's global state counts.
        random.seed(len(samples))
        torch.manual_seed(len(samples))
        samples.append([mapper(record) for _ in range(12)])
    for first, again in zip(samples[0], samples[2]):
        assert torch.equal(first["image"], again["image"])
        assert torch.equal(first["instances"].gt_boxes.tensor, again["instances"].gt_boxes.tensor)
    assert any(not torch.equal(a["image"], b["image"]) for a, b in zip(samples[0], samples[1]))


def test_equal_to_detectron2s_mapper(record):
    """Same draws, same samples, where no operation needs boxes."""
    cfg = make_config(POLICY="S4", RANDAUGMENT_LAYERS=2)
    ours = SelfTrainingDatasetMapper(cfg, True)
    theirs = DatasetMapper(True, augmentations=ours.augmentations.augs, image_format="BGR")
    for seed in range(30):
        np.random.seed(seed)
        sample = ours(record)
        np.random.seed(seed)
        expected = theirs(record)
        assert torch.equal(sample["image"], expected["image"])
        assert torch.equal(sample["instances"].gt_classes, expected["instances"].gt_classes)
        boxes = expected["instances"].gt_boxes.tensor
        torch.testing.assert_close(sample["instances"].gt_boxes.tensor, boxes)


# ---- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (640, 479)])
def test_jpeg_as_detectron2_reads_it(tmp_path, image_format, subsampling, size):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    path = str(tmp_path / "a.jpg")
    coarse.resize(size, Image.BICUBIC).save(path, quality=88, subsampling=subsampling)
    found = read_image(path, image_format)
    expected = utils.read_image(path, image_format)
    assert found.shape == expected.shape and found.dtype == np.uint8 and found.flags.c_contiguous
    # Pillow and OpenCV each bring a libjpeg-turbo; versions may differ in the last bit.
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / "a.jpg")
    image.resize((56, 36)).save(path, exif=exif)
    np.testing.assert_array_equal(read_image(path, "BGR"), utils.read_image(path, "BGR"))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "RGB"])
def test_other_modes_as_detectron2_reads_them(tmp_path, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8))
    for suffix in ("jpg", "png", "tif"):
        if (mode, suffix) in {("CMYK", "png")} or (suffix == "jpg" and mode in ("P", "RGBA", "LA", "1")):
            continue
        path = str(tmp_path / f"a.{suffix}")
        image.convert(mode).save(path)
        np.testing.assert_array_equal(read_image(path, "RGB"), utils.read_image(path, "RGB"))


@pytest.mark.parametrize("content", ["missing", "empty", "text", "half a JPEG", "half a PNG"])
@pytest.mark.parametrize("is_train", [True, False])
def test_unreadable_images_are_named(tmp_path, record, content, is_train):
    path = tmp_path / "broken.jpg"
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    if content == "empty":
        path.write_bytes(b"")
    elif content == "text":
        path.write_text("not an image")
    elif content.startswith("half"):
        whole.save(path, format=content.split()[-1])
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    mapper = SelfTrainingDatasetMapper(make_config(), is_train)
    with pytest.raises(InputError, match=r"Image .*broken\.jpg \(id 17\) cannot be read"):
        mapper({**record, "file_name": str(path)})


def test_a_jpeg_cut_short_is_not_filled_up(tmp_path, monkeypatch):
    path = tmp_path / "broken.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    # Some versions of OpenCV return such an image with grey at the bottom.
    monkeypatch.setattr("cv2.imdecode", lambda data, flags: np.full((60, 80, 3), 128, np.uint8))
    with pytest.raises(OSError, match="truncated"):
        read_image(str(path), "BGR")


# ---- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 81}, r"a\.png \(id 17\) is 80 x 60 pixels, but its annotations say 81 x 60"),
        ({"annotations": None}, r"a\.png \(id 17\) has no annotations to train on"),
        ({"proposal_boxes": np.zeros((1, 4))}, r"id 17\) carries precomputed proposals"),
        (
            {"annotations": [{"bbox": [1, 2, 3, 4, 5], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0}]},
            r"box of mode XYWHA_ABS",
        ),
    ],
)
def test_what_cannot_be_used_is_named(record, changes, message):
    record.update(changes)
    if record["annotations"] is None:
        del record["annotations"]
    with pytest.raises(InputError, match=message):
        make_mapper()(record)


@pytest.mark.parametrize("key", ["MODEL.LOAD_PROPOSALS", "INPUT.CROP.ENABLED"])
def test_settings_that_do_not_work_with_the_policies(key):
    cfg = make_config()
    cfg.merge_from_list([key, True])
    with pytest.raises(InputError, match=f"{key} does not work with"):
        SelfTrainingDatasetMapper(cfg, True)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_images_without_boxes_stay(record, mask_format):
    options = {"use_instance_mask": True, "instance_mask_format": mask_format}
    options.update(use_keypoint=True, keypoint_hflip_indices=np.array([1, 0, 2]))
    mapper = make_mapper(T.RandomFlip(), **options)
    crowd_only = [a for a in record["annotations"] if a.get("iscrowd")]
    for annotations in ([], crowd_only):
        instances = mapper({**record, "annotations": annotations})["instances"]
        assert len(instances) == 0
        assert instances.gt_boxes.tensor.shape == (0, 4)
        assert instances.gt_classes.shape == (0,) and instances.gt_classes.dtype == torch.int64
        assert len(instances.gt_masks) == 0 and instances.gt_keypoints.tensor.shape == (0, 3, 3)
    # Boxes that the augmentation pushes out leave an image without boxes, too.
    off = make_mapper(AffineTransform.translation_x(75, 60, 80))
    assert len(off(record)["instances"]) == 0


@pytest.mark.parametrize(("key", "option"), [("weight", "score_weighted"), ("score", "soft_labels")])
def test_pseudo_boxes_have_weights_or_scores(record, key, option):
    field = f"gt_{key}s"
    for annotation, value in zip(record["annotations"], (0.25, 0.5, 0.75)):
        annotation.update({"score": 0.9, key: value})
    pseudo = {**record, "label_source": "pseudo"}
    mapper = make_mapper(T.NoOpTransform(), **{option: True})
    assert mapper(pseudo)["instances"].get(field).tolist() == [0.25, 0.75]  # a crowd between them
    # Pushed to the right, the second box is lost.
    moved = make_mapper(AffineTransform.translation_x(30, 60, 80), **{option: True})(pseudo)["instances"]
    assert moved.gt_classes.tolist() == [3] and moved.get(field).tolist() == [0.25]
    del pseudo["annotations"][2][key]  # labels of a person in place of a teacher
    assert mapper(pseudo)["instances"].get(field).tolist() == [0.25, 1.0]
    assert not mapper(record)["instances"].has(field)
    assert not make_mapper()(pseudo)["instances"].has(field)
    cfg = make_config()
    cfg.SELFTRAIN[option.upper()] = True
    assert getattr(SelfTrainingDatasetMapper(cfg, True), option)


def paint(box, shape=(60, 80)):
    mask = np.zeros(shape, np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def with_masks(record, kind):
    boxes = [[10, 20, 40, 40], [50, 5, 75, 55]]
    annotations = []
    for x0, y0, x1, y1 in boxes:
        if kind == "polygon":
            segmentation = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        else:
            segmentation = mask_util.encode(np.asfortranarray(paint((x0, y0, x1, y1))))
        annotations.append(
            {
                "bbox": [x0, y0, x1, y1],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "segmentation": segmentation,
            }
        )
    return {**record, "annotations": annotations}


@pytest.mark.parametrize("policy", ["S1", "S4"])
@pytest.mark.parametrize(
    "kind, mask_format", [("polygon", "polygon"), ("polygon", "bitmask"), ("rle", "bitmask")]
)
def test_masks_follow_their_boxes(record, kind, mask_format, policy):
    cfg = make_config(POLICY=policy, RANDAUGMENT_LAYERS=2)
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, mask_format
    mapper = SelfTrainingDatasetMapper(cfg, True)
    record = with_masks(record, kind)
    checked = 0
    for seed in range(40):
        np.random.seed(seed)
        instances = mapper(record)["instances"]
        assert len(instances) == len(instances.gt_masks)
        if len(instances) == 0:
            continue
        hulls = instances.gt_masks.get_bounding_boxes().tensor
        boxes = instances.gt_boxes.tensor
        slack = 1 if policy == "S1" else 3  # nearest neighbours, up to a factor of 1.6
        assert (hulls[:, :2] >= boxes[:, :2] - slack).all() and (hulls[:, 2:] <= boxes[:, 2:] + slack).all()
        if policy == "S1":  # upright rectangles stay upright; the hull of a turned one is larger
            torch.testing.assert_close(hulls, boxes, rtol=0, atol=1.0)
        checked += len(instances)
    assert checked > 30


def test_masks_that_cannot_be_used(record):
    cfg = make_config()
    cfg.MODEL.MASK_ON = True
    mapper = SelfTrainingDatasetMapper(cfg, True)
    with pytest.raises(InputError, match=r"id 17\) has an annotation without a usable mask \(NoneType\)"):
        mapper(record)
    with pytest.raises(
        InputError, match=r"without a usable mask \(dict\); INPUT.MASK_FORMAT 'polygon' needs"
    ):
        mapper(with_masks(record, "rle"))


def with_keypoints(record):
    """Two objects with a left and a right point each, one of them not labeled."""
    points = [[15, 30, 2, 35, 30, 1], [55, 10, 2, 0, 0, 0]]
    annotations = [a for a in record["annotations"] if not a.get("iscrowd")]
    return {**record, "annotations": [{**a, "keypoints": p} for a, p in zip(annotations, points)]}


KEYPOINTS = {"use_keypoint": True, "keypoint_hflip_indices": np.array([1, 0])}


def keypoints(record, *transforms):
    return make_mapper(*transforms, **KEYPOINTS)(record)["instances"].gt_keypoints.tensor.tolist()


def test_keypoints(record):
    record = with_keypoints(record)
    assert keypoints(record) == [[[15, 30, 2], [35, 30, 1]], [[55, 10, 2], [0, 0, 0]]]
    # Mirrored: left becomes right.
    assert keypoints(record, T.HFlipTransform(80)) == [[[45, 30, 1], [65, 30, 2]], [[0, 0, 0], [25, 10, 2]]]
    assert keypoints(record, T.HFlipTransform(80), T.HFlipTransform(80)) == keypoints(record)
    assert keypoints(record, AffineTransform.flip_x(None, 60, 80)) == keypoints(record, T.HFlipTransform(80))
    # Pushed off the image and back: no longer there.
    there, back = (AffineTransform.translation_x(dx, 60, 80) for dx in (-20, 20))
    assert keypoints(record, there, back) == [[[0, 0, 0], [35, 30, 1]], [[55, 10, 2], [0, 0, 0]]]


def test_keypoints_inside_boxes(record):
    record = with_keypoints(record)
    flip = BoxOnlyTransform(
        np.array([[10, 20, 40, 40]]), [AffineTransform.flip_x(None, 20, 30)], np.array([0])
    )
    # The first object alone is mirrored about its box's middle, x = 25.
    assert keypoints(record, flip) == [[[15, 30, 1], [35, 30, 2]], [[55, 10, 2], [0, 0, 0]]]
    shift = BoxOnlyTransform(
        np.array([[10, 20, 40, 40]]), [AffineTransform.translation_x(10, 20, 30)], np.array([0])
    )
    assert keypoints(record, shift) == [[[25, 30, 2], [0, 0, 0]], [[55, 10, 2], [0, 0, 0]]]


def test_keypoints_that_cannot_be_used(record):
    with pytest.raises(InputError, match=r"id 17\) has an annotation without 2 keypoints"):
        keypoints(record)


def test_keypoints_of_a_config(record):
    metadata = MetadataCatalog.get("mapper_test_keypoints")
    metadata.keypoint_names, metadata.keypoint_flip_map = ["left", "right"], [("left", "right")]
    try:
        cfg = make_config(POLICY="S3", AUTOAUGMENT="v1")
        cfg.MODEL.KEYPOINT_ON, cfg.DATASETS.TRAIN = True, ("mapper_test_keypoints",)
        mapper = SelfTrainingDatasetMapper(cfg, True)
        for seed in range(30):
            np.random.seed(seed)
            instances = mapper(with_keypoints(record))["instances"]
            points = instances.gt_keypoints.tensor
            assert points.shape == (len(instances), 2, 3) and torch.isfinite(points).all()
            assert (points[..., :2] >= 0).all() and (points[..., :2] <= 64).all()
            assert (points[points[..., 2] == 0] == 0).all()
    finally:
        MetadataCatalog.remove("mapper_test_keypoints")


def test_semantic_segmentation(record, tmp_path):
    labels = np.random.default_rng(0).integers(0, 5, (60, 80), dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    sample = make_mapper(AffineTransform.translation_y(20, 60, 80))(record)
    assert "sem_seg_file_name" not in sample
    assert sample["sem_seg"].dtype == torch.int64
    np.testing.assert_array_equal(sample["sem_seg"][20:], labels[:40])
    assert (sample["sem_seg"][:20] == 255).all()
    assert sample["valid_pixel_share"] == 40 / 60
    np.random.seed(0)
    sample = SelfTrainingDatasetMapper(make_config(POLICY="S4"), True)(record)
    assert sample["sem_seg"].shape == (64, 64) and set(sample["sem_seg"].unique().tolist()) <= {
        *range(5),
        255,
    }


def test_valid_pixels_are_those_that_the_head_does_not_ignore(record, tmp_path):
    labels = np.zeros((60, 80), dtype=np.uint8)
    labels[:15] = 7
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    cfg = make_config(POLICY="S1", SCALE_RANGE=(1.0, 1.0))
    cfg.INPUT.AUGMENTATION.IMAGE_SIZE = 80
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 7
    sample = SelfTrainingDatasetMapper(cfg, True)(record)
    assert sample["valid_pixel_share"] == np.mean(sample["sem_seg"].numpy() != 7) < 1


def test_transform_lists_are_flat(record):
    """The drawn transforms, as detectron2 returns them, give the sample again."""
    mapper = SelfTrainingDatasetMapper(make_config(POLICY="S4", RANDAUGMENT_LAYERS=2), True)
    np.random.seed(1)
    image = read_image(record["file_name"], "BGR")
    drawn = mapper.augmentations(T.AugInput(image, boxes=np.array([[10.0, 20, 40, 40]])))
    assert isinstance(drawn, TransformList) and len(drawn.transforms) == 4
    np.random.seed(1)
    sample = mapper(record)
    np.testing.assert_array_equal(drawn.apply_image(image).transpose(2, 0, 1), sample["image"].numpy())


# ---- boxes that are neither objects nor background --------------------------------------------------


def hull(pixels):
    """Of the True ones, XYXY."""
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("policy", ["S1", "S3", "S4"])
def test_ignored_boxes_are_where_their_pixels_are(tmp_path, policy):
    """Flipped, cropped, resized, turned: a white box on black. The object beside it is where it is without."""
    image = np.zeros((60, 80, 3), np.uint8)
    image[20:50, 30:60] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    annotations = [
        {"bbox": [2, 4, 20, 50], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "score": 0.9},
        {"bbox": [30, 20, 60, 50], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 1},
    ]
    record = {"file_name": str(tmp_path / "a.png"), "label_source": "pseudo", "annotations": annotations}
    cfg = make_config(POLICY=policy, IMAGE_SIZE=128, SCALE_RANGE=(0.8, 2.0))
    mapper, seen, visible = SelfTrainingDatasetMapper(cfg, True), 0, []
    for seed in range(40):
        samples = []
        for changes in ({"ignore_crowd": True}, {}):
            np.random.seed(seed)
            samples.append(mapper({**record, **changes}))
        ignoring, plain = samples
        assert set(ignoring) - set(plain) == {"ignored_boxes"} and "ignore_crowd" not in ignoring
        assert torch.equal(ignoring["image"], plain["image"])
        for field in ("gt_boxes", "gt_classes"):
            one, other = (s["instances"].get(field) for s in samples)
            assert torch.equal(getattr(one, "tensor", one), getattr(other, "tensor", other))
        white = ignoring["image"].min(dim=0)[0].numpy() > 190
        boxes = ignoring["ignored_boxes"].tensor.numpy()
        if policy != "S1":  # colours and occlusion are changed too: the box may show less than it is
            visible.append(len(boxes))
        elif white.any():
            seen += 1
            np.testing.assert_allclose(boxes, [hull(white)], atol=1.5)
        else:
            assert not len(boxes) or (boxes[0, 2:] - boxes[0, :2]).min() < 1.5
    assert seen > 20 or policy != "S1"
    assert len(visible) in (0, 40) and set(visible) <= {0, 1}


def test_little_that_is_left_of_an_ignored_box_is_no_background(record):
    """5 of its 100 pixels: an object is lost there, a region is not. Of what is outside nothing is left."""

    def mapped(crowd):
        box = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": crowd}
        annotations = [{**box, "bbox": [0, 0, 80, 10]}, {**box, "bbox": [40, 30, 80, 60]}]
        cut = ResizeCropPadTransform((2.0, 2.0), (6, 76), (40, 8), (64, 64))
        return make_mapper(cut, ignore_crowd=True)({**record, "annotations": annotations})

    objects, regions = mapped(0), mapped(1)
    # Columns 76 to 80 and rows 6 to 26 are seen, twice as large: 16 of 800 pixels of the first box.
    assert len(objects["instances"]) == 0 and len(objects["ignored_boxes"]) == 0
    assert regions["ignored_boxes"].tensor.tolist() == [[0, 0, 8, 8]]
    assert regions["ignored_boxes"].tensor.dtype == torch.float32


def test_crowds_are_ignored_where_the_config_says_so(record):
    cfg = make_config()
    assert "ignored_boxes" not in SelfTrainingDatasetMapper(cfg, True)(record)
    cfg.SELFTRAIN.IGNORE_CROWD = True
    assert len(SelfTrainingDatasetMapper(cfg, True)(record)["ignored_boxes"]) == 1
    assert len(SelfTrainingDatasetMapper(cfg, True)({**record, "annotations": []})["ignored_boxes"]) == 0
    assert "ignored_boxes" not in SelfTrainingDatasetMapper(cfg, False)(record)
    sample = make_mapper(T.HFlipTransform(80), ignore_crowd=True)(record)
    assert sample["ignored_boxes"].tensor.tolist() == [[0, 0, 80, 60]]
