import numpy as np
import pytest
import torch

from selftrain_d2 import SelfTrainingTrainer
from selftrain_d2.data.random_state import stage_seed
from selftrain_d2.engine.stage import stage_of_weights, with_stage


def _images(cfg, steps=3):
    """The augmented human images of the first steps, as bytes."""
    trainer = SelfTrainingTrainer(cfg)
    trainer.resume_or_load(resume=False)
    batches = iter(trainer.data_loader)
    return [
        sample["image"].numpy().tobytes()
        for _ in range(steps)
        for sample in next(batches)
        if sample["label_source"] == "human"
    ]


def _supervised(cfg, output, **solver):
    cfg = cfg.clone()
    cfg.DATASETS.PSEUDO_TRAIN, cfg.SOLVER.PSEUDO_IMS_PER_BATCH = (), 0
    cfg.OUTPUT_DIR = str(output)
    cfg.SOLVER.update(solver)
    return cfg


def test_stages_draw_their_own_images_and_student_and_control_the_same(student_config, tmp_path):
    """With nothing but the starting weights to go by, as the single commands have it."""
    cfg = student_config
    cfg.SEED, cfg.DATALOADER.NUM_WORKERS = 3, 0
    teacher = _supervised(cfg, tmp_path / "teacher", MAX_ITER=1)
    trainer = SelfTrainingTrainer(teacher)
    trainer.resume_or_load(resume=False)
    trainer.train()
    weights = str(tmp_path / "teacher" / "model_final.pth")
    assert stage_of_weights(weights) == 0

    control = _supervised(cfg, tmp_path / "control")
    control.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS = weights
    seen = {
        "teacher": _images(teacher),
        "student": _images(cfg),
        "control": _images(control),
    }
    assert seen["student"] == seen["control"]
    assert not set(seen["teacher"]) & set(seen["student"])
    assert seen["teacher"] == _images(teacher)

    cfg.SELFTRAIN.STAGE = 2  # the next round
    assert not set(_images(cfg)) & (set(seen["teacher"]) | set(seen["student"]))


def test_stage_of_a_run(small_config, tmp_path):
    def stage(weights="", pseudo=(), resume=False, asked=-1):
        cfg = small_config.clone()
        cfg.MODEL.WEIGHTS, cfg.DATASETS.PSEUDO_TRAIN, cfg.SELFTRAIN.STAGE = str(weights), pseudo, asked
        cfg.OUTPUT_DIR = str(tmp_path / "run")
        cfg.freeze()
        found = with_stage(cfg, resume)
        assert found.is_frozen() and asked == cfg.SELFTRAIN.STAGE
        return found.SELFTRAIN.STAGE

    def checkpoint(name, **content):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"model": {"a": torch.zeros(2)}, **content}, tmp_path / name)
        return tmp_path / name

    classes = {"thing_classes": ["red"]}
    assert stage() == 0
    assert stage(pseudo=("pseudo",)) == 1  # from random weights
    assert stage(checkpoint("imagenet.pth")) == 0
    assert stage(checkpoint("older.pth", classes=classes)) == 1  # a teacher of before stages were written
    assert stage(checkpoint("student.pth", classes=classes, stage={"stage": 1})) == 2
    assert stage(tmp_path / "student.pth", asked=7) == 7
    assert stage("detectron2://somewhere.pkl") == 0 and stage(tmp_path / "missing.pth") == 0
    (tmp_path / "damaged.pth").write_bytes(b"no checkpoint")
    assert stage(tmp_path / "damaged.pth") == 0
    # A resumed run keeps its own, wherever its first weights went.
    checkpoint("run/model_0000001.pth", stage={"stage": 3})
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    assert stage(tmp_path / "missing.pth", resume=True) == 3
    assert stage(tmp_path / "missing.pth") == 0


@pytest.mark.parametrize("seed", [0, 7])
def test_seeds_of_stages(small_config, seed):
    cfg = small_config
    cfg.SEED = seed
    seeds = []
    for cfg.SELFTRAIN.STAGE in range(4):
        seeds.append(stage_seed(cfg))
        np.random.default_rng(seeds[-1])
    assert seeds[0] == seed and len(set(seeds)) == 4
    cfg.SEED = -1
    assert stage_seed(cfg) is None
