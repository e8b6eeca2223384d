"""What is said of boxes out of the anchors' reach, and anchors that fit them, from a COCO file to config.yaml."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, assert_refused, make_coco_set
from detectron2.config import get_cfg
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detectron2.structures import BoxMode

from selftrain_d2 import InputError, add_selftrain_config
from selftrain_d2.cli import main
from selftrain_d2.cli.common import find_config
from selftrain_d2.data.coco_file import dataset_dicts, read_coco
from selftrain_d2.engine.box_reach import IMAGE_SIZES, box_reach, fit_anchors
from selftrain_d2.engine.checks import build_without_memory
from selftrain_d2.engine.loop import stages
from selftrain_d2.modeling import anchors as anchors_module

CONFIG = "Base-RetinaNet-EfficientNet-FPN.yaml"
CELLS = Path(__file__).parents[4] / "shared" / "data" / "bccd" / "trainval.json"
ONE_ANCHOR = ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0]]", "MODEL.ANCHOR_GENERATOR.SIZES"]


@pytest.fixture(scope="module")
def model():
    return build_without_memory(config())


def config(*options, file=CONFIG):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.merge_from_file(str(find_config(file)), allow_unsafe=False)
    cfg.merge_from_list([*SMALL_MODEL, *options])
    return cfg


def squares(side, number=1, category_id=0, image=96):
    """Dataset dicts of squares whose centres are those of anchors of stride 8 and offset 0.5."""
    boxes = [[44 - side / 2, 44 - side / 2, 44 + side / 2, 44 + side / 2]] * number
    annotations = [
        {"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category_id, "iscrowd": 0} for b in boxes
    ]
    return [{"height": image, "width": image, "annotations": annotations}]


def test_shares_by_class_worked_out_by_hand(model):
    """Anchors of 32 px at stride 8: squares of 28 have IoU 0.77, of 16 0.25, of 70 0.21; ids are 0, 1, 2."""
    cfg = config(*ONE_ANCHOR, "[[32], [32], [32], [32], [32]]")
    dicts = squares(28, 7) + squares(16, 3) + squares(70, 2, 1)
    reach = box_reach(cfg, model, dicts, ["cell", "blob", "none"])
    assert reach.boxes.tolist() == [10, 2, 0]
    assert reach.missed[:2].tolist() == [0.3, 1.0] and np.isnan(reach.missed[2])
    assert reach.line() == (
        "41.7% of 12 human boxes are without an anchor of IoU 0.5 at IMAGE_SIZE 96: blob 100.0% of 2, cell 30.0% of 10."
    )
    # 16, 28 and 70 px cannot all be near 32 px, at any size and with any one factor.
    assert "blob 100.0% of 2, cell 30.0% of 10 are" in reach.warning()
    assert "no size up to 2048 would do" in reach.warning() and "no factor" in reach.warning()
    assert reach.numbers()["classes"][2] == {"name": "none", "boxes": 0, "out_of_reach": None}


def test_a_fifth_out_of_reach_is_not_loud(model):
    cfg = config(*ONE_ANCHOR, "[[32], [32], [32], [32], [32]]")
    assert not box_reach(cfg, model, squares(28, 8) + squares(16, 2), ["cell"]).warning()
    assert box_reach(cfg, model, squares(28, 7) + squares(16, 2), ["cell"]).warning()


def test_the_size_that_would_do_is_the_smallest_larger_one(model):
    """Squares of 16 px with anchors of 32 px: their IoU is a half from 16 * 2 ** 0.5 = 22.6 px on, so from 136 px."""
    cfg = config(*ONE_ANCHOR, "[[32], [32], [32], [32], [32]]", "MODEL.ANCHOR_GENERATOR.OFFSET", "0.0")
    reach = box_reach(cfg, model, squares(16, 5), ["cell"], by_size=True)
    does = [s for s, row in zip(reach.image_sizes, reach.missed_by_size) if row[0] <= 0.2]
    # Locations are up to 4 px from a centre: 28 px (168 px) are safe, under 22.6 px nothing is.
    assert 136 <= min(does) <= 192 and f"IMAGE_SIZE 96; {min(does)} would do" in reach.warning()
    assert reach.image_sizes == IMAGE_SIZES


def test_objects_too_large_are_told_a_smaller_size(model):
    cfg = config(*ONE_ANCHOR, "[[32], [32], [32], [32], [32]]", "INPUT.AUGMENTATION.IMAGE_SIZE", "512")
    # 60 px become 40 px at 64; 90 px become 60 px there, 480 px at 512, and no factor goes beyond 4 * 32 px.
    assert "IMAGE_SIZE 512; 64 would do" in box_reach(cfg, model, squares(60, 4), ["cell"]).warning()
    warning = box_reach(cfg, model, squares(90, 4), ["cell"]).warning()
    assert "no size up to 2048 would do, but no factor" in warning


def test_one_factor_nearest_to_one_is_fitted(model):
    """Squares of 16.2 px with anchors of 32 px: IoU is 0.51 with 2 ** (-4 / 8) times, 0.43 with 2 ** (-3 / 8) times."""
    cfg = config(*ONE_ANCHOR, "[[32], [64], [128], [256], [512]]")
    fitted = fit_anchors(cfg, model, squares(16.2, 9))
    sizes = np.array(fitted.MODEL.ANCHOR_GENERATOR.SIZES)
    np.testing.assert_allclose(sizes, 2**-0.5 * np.array([[32], [64], [128], [256], [512]]), atol=1e-4)
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0] == [32]
    assert not box_reach(fitted, model, squares(16.2, 9), ["cell"]).warning()
    # Anchors that fit stay as they are, and so does a config of one level's sizes for all.
    cfg = config(*ONE_ANCHOR, "[[8.0, 16, 32]]")
    assert fit_anchors(cfg, model, squares(16, 9)).MODEL.ANCHOR_GENERATOR.SIZES == [[8, 16, 32]]


def test_a_rare_class_counts_as_much_as_a_frequent_one(model):
    """40 and 10 px: 0.42 times 96 and 32 px reaches both; 1 time reaches 99.7 % of all boxes."""
    cfg = config(*ONE_ANCHOR, "[[32], [96], [96], [96], [96]]")
    dicts = squares(40, 900) + squares(10, 3, 1)
    fitted = fit_anchors(cfg, model, dicts)
    reach = box_reach(fitted, model, dicts, ["cell", "platelet"])
    assert box_reach(cfg, model, dicts, ["cell", "platelet"]).missed[1] == 1
    assert reach.missed.tolist() == [0, 0]


def test_no_anchors_to_fit_is_one_sentence(model, monkeypatch):
    cfg = config()
    with pytest.raises(InputError, match=r"RetinaNet, R-CNN.*leave it out"):
        fit_anchors(cfg, torch.nn.Linear(1, 1), squares(16))
    locations = anchors_module.Locations([8, 16], 0.5, 1.5)
    monkeypatch.setattr("selftrain_d2.engine.box_reach.matched_by", lambda *_: locations)
    with pytest.raises(InputError, match="upright anchors"):
        fit_anchors(cfg, model, squares(16))
    reach = box_reach(cfg, model, squares(3, 4), ["dot"])  # between locations at 40 and 48
    assert reach.line().endswith(
        "without a location of a level that takes their size at IMAGE_SIZE 96: dot 0.0% of 4."
    )


def test_a_generator_that_knows_no_sizes_is_refused(model):
    class OneSize(DefaultAnchorGenerator):
        @classmethod
        def from_config(cls, cfg, input_shape):
            return {**super().from_config(cfg, input_shape), "sizes": [[100.0]]}

    cfg = config("MODEL.ANCHOR_GENERATOR.NAME", "OneSize")
    try:
        ANCHOR_GENERATOR_REGISTRY.register(OneSize)
        with pytest.raises(InputError, match="OneSize do not grow"):
            fit_anchors(cfg, model, squares(16, 9))
    finally:
        del ANCHOR_GENERATOR_REGISTRY._obj_map["OneSize"]


@pytest.mark.skipif(not CELLS.exists(), reason=f"needs the blood cells in {CELLS.parent}")
def test_blood_cells():
    """Platelets are 12 px at 192 px: not even anchors of their size at stride 8 cover them reliably."""
    file = read_coco(CELLS)
    dicts = dataset_dicts(file, "images")
    platelets = file.class_names.index("Platelets")

    model = build_without_memory(config(file="neon_trees/lite0_256.yaml"))

    def share(size, fit=False):
        cfg = config("INPUT.AUGMENTATION.IMAGE_SIZE", str(size), file="neon_trees/lite0_256.yaml")
        cfg = fit_anchors(cfg, model, dicts) if fit else cfg
        reach = box_reach(cfg, model, dicts, file.class_names)
        return reach.missed[platelets], reach.warning()

    missed, warning = share(192)
    assert missed > 0.99 and "416 would do, but no factor" in warning
    missed, warning = share(256)
    assert 0.9 < missed < 0.99 and "and so would --fit-anchors" in warning
    missed, warning = share(256, fit=True)
    assert missed < 0.2 and not warning
    assert not share(416)[1]


@pytest.fixture
def tiny(tmp_path):
    """A COCO set whose boxes are 10 px: out of reach of anchors from 32 px on."""
    coco = make_coco_set(tmp_path / "coco", 2, seed=0)
    for annotation in coco.content["annotations"]:
        annotation["bbox"][2:] = [10, 10]
    with open(coco.json_file, "w") as file:
        json.dump(coco.content, file)
    return coco


def train(coco, *options, keys=()):
    labels = ["--human-labels", "human", coco.json_file, coco.images, *options]
    keys = [*SMALL_MODEL, "DATASETS.TRAIN", "('human',)", "SOLVER.MAX_ITER", "1", *keys]
    return ["train", "--config-file", CONFIG, *labels, *keys]


def test_a_dry_run_says_it(tiny, capsys):
    assert main(train(tiny, "--dry-run")) == 0
    lines = capsys.readouterr().out
    assert "boxes: 100.0% of " in lines and "warning: Out of the detector's reach" in lines
    assert main(train(tiny, "--dry-run", "--fit-anchors")) == 0
    lines = capsys.readouterr().out
    assert "anchor sizes: [[" in lines and "boxes: 100.0% of" not in lines
    assert_refused(
        train(
            tiny, "--eval-only", "--fit-anchors", keys=["DATASETS.TEST", "('human',)", "MODEL.WEIGHTS", "w"]
        ),
        capsys,
        "--fit-anchors goes with training",
    )


def test_fitted_anchors_stay_with_their_weights(tiny, tmp_path, capsys):
    output = tmp_path / "output"
    keys = ["OUTPUT_DIR", str(output)]
    assert main(train(tiny, "--fit-anchors", keys=keys)) == 0
    log = (output / "log.txt").read_text()
    assert "human boxes are without an anchor of IoU 0.5 at IMAGE_SIZE 96: " in log
    written = config()
    written.merge_from_file(str(output / "config.yaml"))
    sizes = written.MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes[0][0] < 20 and sizes[1][0] == pytest.approx(2 * sizes[0][0], abs=1e-3)

    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    images = ["--images", tiny.images, "--output", str(tmp_path / "labels")]
    capsys.readouterr()
    told = ["were trained with MODEL.ANCHOR_GENERATOR.SIZES", "give the config.yaml"]
    assert_refused(["label", "--config-file", CONFIG, *images, *SMALL_MODEL, *weights], capsys, *told)
    assert main(["label", "--config-file", str(output / "config.yaml"), *images, *weights]) == 0
    test = ["DATASETS.TEST", "('human',)", *weights, "OUTPUT_DIR", str(tmp_path / "evaluation")]
    capsys.readouterr()
    assert_refused(train(tiny, "--eval-only", keys=test), capsys, *told)
    # A run does not go on with other anchors than it was begun with.
    longer = [*keys, "SOLVER.MAX_ITER", "2"]
    assert_refused(train(tiny, "--resume", keys=longer), capsys, "anchor_sizes", "choose another OUTPUT_DIR")


def test_all_stages_of_the_loop_have_them(tiny, tmp_path, monkeypatch):
    seen, unlabeled = [], make_coco_set(tmp_path / "unlabeled", 2, seed=7)

    def stop(cfg, *_, **__):
        seen.append(cfg.MODEL.ANCHOR_GENERATOR.SIZES)
        raise InputError("stopped here")

    monkeypatch.setattr(stages, "train", stop)
    loops, made = [], stages.Stages.__init__
    monkeypatch.setattr(stages.Stages, "__init__", lambda loop, *a: (made(loop, *a), loops.append(loop))[0])
    command = [
        "self-train", "--fit-anchors", "--config-file", CONFIG, "--labeled-json", tiny.json_file,
        "--labeled-images", tiny.images, "--unlabeled-images", unlabeled.images, "--output", str(tmp_path / "output"),
        *SMALL_MODEL,
    ]  # fmt: skip
    assert main(command) == 2
    assert seen[0][0][0] < 20
    student = loops[0].student_config({"weights": "w.pth"}, 1)
    assert seen[0] == student.MODEL.ANCHOR_GENERATOR.SIZES
    record = json.loads((tmp_path / "output" / "teacher" / "stage.json").read_text())
    assert record["settings"]["MODEL.ANCHOR_GENERATOR.SIZES"] == seen[0]
