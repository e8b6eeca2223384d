import math
import os

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from selftrain_d2 import InputError, SelfTrainingTrainer
from selftrain_d2.engine.config_checks import check_best_metric
from selftrain_d2.engine.kept_checkpoints import BestCheckpoint, LastCheckpoints, best_of
from selftrain_d2.modeling.checkpoint import BEST_WEIGHTS, SafeDetectionCheckpointer


def _save_steps(folder, steps, keep):
    hook = LastCheckpoints(SafeDetectionCheckpointer(nn.Linear(1, 1), str(folder)), 10, keep)
    hook.max_iter = 100
    for step in steps:
        hook.step(step)
    return sorted(path.name for path in folder.glob("*.pth"))


def test_the_last_ones_stay_also_after_a_restart(tmp_path):
    (tmp_path / "not_finite_step_0000001_rank_0.pth").write_bytes(b"")
    other = ["not_finite_step_0000001_rank_0.pth"]
    assert _save_steps(tmp_path, range(30), 2) == ["model_0000019.pth", "model_0000029.pth", *other]
    assert _save_steps(tmp_path, range(30, 55), 2) == ["model_0000039.pth", "model_0000049.pth", *other]
    last = _save_steps(tmp_path, range(55, 100), 2)
    assert last == ["model_0000089.pth", "model_0000099.pth", "model_final.pth", *other]


def test_the_one_just_saved_stays_though_the_clock_went_back(tmp_path):
    """As where a job goes on at another machine."""
    _save_steps(tmp_path, range(20), 2)
    for path in tmp_path.glob("*.pth"):
        os.utime(path, (4e9, 4e9))
    assert _save_steps(tmp_path, range(20, 30), 2) == ["model_0000019.pth", "model_0000029.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000029.pth"


def test_those_of_steps_to_come_go_first(tmp_path):
    """Where a run went on from an earlier checkpoint."""
    _save_steps(tmp_path, range(50), 0)
    assert _save_steps(tmp_path, range(20, 30), 2) == ["model_0000019.pth", "model_0000029.pth"]


def test_all_stay_by_default(tmp_path):
    assert len(_save_steps(tmp_path, range(50), 0)) == 5


def test_the_best_has_the_weights_that_were_evaluated_and_is_none_to_resume_from(student_config, tmp_path):
    cfg, output = student_config, tmp_path / "output"
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD, cfg.TEST.BEST_METRIC = ("human",), 1, "bbox/AP"
    cfg.SOLVER.MAX_ITER = 3
    aps = [math.nan, 30.0, 10.0]

    class Trainer(SelfTrainingTrainer):
        @classmethod
        def test(cls, cfg, model):
            return {"bbox": {"AP": aps.pop(0)}}

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    best = torch.load(output / BEST_WEIGHTS, weights_only=True)
    assert best["best"] == best_of(output) == {"metric": "bbox/AP", "value": 30.0, "steps": 2}
    second = torch.load(output / "model_0000001.pth", weights_only=True)["model"]
    assert all(torch.equal(value, second[name]) for name, value in best["model"].items())
    assert (
        best["classes"] == {"thing_classes": ["red", "green"]} and "stage" in best and "trainer" not in best
    )
    assert (output / "last_checkpoint").read_text() == "model_final.pth"


class Counting(DatasetEvaluator):
    """A project's own: results in a group and with a name that nobody else has."""

    def __init__(self, shares):
        self.shares = shares

    def reset(self):
        pass

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return {"count": {"share right": self.shares.pop(0)}}


@pytest.mark.parametrize(
    ("metric", "fragment"), [("count/share right", None), ("bbox/AP", "the evaluation has count/share right")]
)
def test_the_best_by_an_evaluator_of_a_project(student_config, tmp_path, metric, fragment):
    cfg = student_config
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD, cfg.TEST.BEST_METRIC = ("human",), 1, metric
    cfg.SOLVER.MAX_ITER = 3
    shares = [0.25, 0.75, 0.5]

    class Trainer(SelfTrainingTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return Counting(shares)

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    if fragment is None:
        trainer.train()
        assert best_of(tmp_path / "output") == {"metric": metric, "value": 0.75, "steps": 2}
    else:
        with pytest.raises(InputError, match=fragment):
            trainer.train()


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(student_config):
    """Killed after the checkpoint of step 2, before its evaluation."""
    cfg = student_config
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD, cfg.TEST.BEST_METRIC = ("human",), 1, "bbox/AP"
    cfg.SOLVER.MAX_ITER = 3
    aps = [10.0, KeyboardInterrupt(), 30.0, 20.0]

    class Trainer(SelfTrainingTrainer):
        @classmethod
        def test(cls, cfg, model):
            ap = aps.pop(0)
            if isinstance(ap, BaseException):
                raise ap
            return {"bbox": {"AP": ap}}

    with pytest.raises(KeyboardInterrupt):
        Trainer(cfg).train()
    assert best_of(cfg.OUTPUT_DIR)["steps"] == 1
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert best_of(cfg.OUTPUT_DIR) == {"metric": "bbox/AP", "value": 30.0, "steps": 2} and not aps
    assert trainer._last_eval_results == {"bbox": {"AP": 20.0}}


def _evaluated(folder, *aps, metric="bbox/AP", start_iter=1):
    best = BestCheckpoint(metric, str(folder), {})
    best.begin(start_iter)
    task, name = metric.split("/")
    for steps, ap in enumerate(aps, start_iter):
        best.update({task: {name: ap}}, steps, nn.Linear(1, 1))
    return best_of(folder)


def test_what_counts_as_better(tmp_path):
    nothing = {"metric": "bbox/AP", "value": None, "steps": 1}
    assert _evaluated(tmp_path / "nan", math.nan, math.nan) == nothing
    assert _evaluated(tmp_path / "nan", math.nan) == nothing
    assert _evaluated(tmp_path / "nan", 0.0, start_iter=5)["steps"] == 5
    assert _evaluated(tmp_path / "loss", 0.5, 0.25, 1.0, math.nan, metric="validation/loss")["value"] == 0.25
    # A run that goes on from before its best step meets that step again.
    assert _evaluated(tmp_path / "loss", 0.5, 0.25, 1.0, metric="validation/loss")["steps"] == 2
    # Another metric, or another run, begins anew.
    assert _evaluated(tmp_path / "loss", 0.1, metric="bbox/AP")["value"] == 0.1
    assert _evaluated(tmp_path / "loss", start_iter=0) is None
    with pytest.raises(InputError, match="'bbox/AP5', but the evaluation has bbox/AP"):
        BestCheckpoint("bbox/AP5", str(tmp_path), {}).update({"bbox": {"AP": 1.0}}, 1, nn.Linear(1, 1))


@pytest.fixture
def names():
    """Two sets of images with two classes."""
    for name in ("one", "two"):
        MetadataCatalog.get(name).thing_classes = ["red", "green"]
    yield ("one", "two")
    for name in ("one", "two"):
        MetadataCatalog.pop(name)


@pytest.mark.parametrize(
    "metric", ["bbox/AP", "bbox/AP-red", "segm/AP50", "validation/loss", "validation/loss_cls"]
)
def test_metrics_of_a_detector(small_config, names, metric):
    small_config.DATASETS.TEST, small_config.TEST.BEST_METRIC = ("one",), metric
    small_config.MODEL.MASK_ON, small_config.TEST.VALIDATION_LOSS = True, True
    check_best_metric(small_config)
    small_config.DATASETS.TEST = names
    with pytest.raises(InputError, match="such as one/bbox/AP"):
        check_best_metric(small_config)
    small_config.TEST.BEST_METRIC = f"two/{metric}"
    check_best_metric(small_config)


@pytest.mark.parametrize(
    ("metric", "test_sets", "teacher", "fragment"),
    [
        ("AP", ("one",), "last", "'AP': it must be a metric of the evaluation, such as bbox/AP"),
        ("segm/AP", ("one",), "last", "such as bbox/AP"),
        ("bbox/AP-blue", ("one",), "last", "such as bbox/AP"),
        ("validation/loss", ("one",), "last", "such as bbox/AP"),
        ("sem_seg/mIoU", ("one",), "last", "such as bbox/AP"),
        ("bbox/AP", (), "last", "needs images to evaluate on"),
        ("", ("one",), "best", "set TEST.BEST_METRIC"),
    ],
)
def test_metrics_that_are_none(small_config, names, metric, test_sets, teacher, fragment):
    small_config.DATASETS.TEST, small_config.TEST.BEST_METRIC = test_sets, metric
    small_config.SELFTRAIN.TEACHER_CHECKPOINT = teacher
    with pytest.raises(InputError, match=fragment):
        check_best_metric(small_config)
