"""What training does with its folder: it is that of one run, resumed as asked, and failed runs leave no result."""

import json
import logging
import os
import resource

import pytest
import torch
from conftest import SMALL_MODEL, assert_refused
from detectron2.engine import HookBase, hooks

from selftrain_d2 import InputError, SelfTrainingTrainer
from selftrain_d2.cli import main, train_net
from selftrain_d2.engine.logs import log_to_file
from selftrain_d2.engine.run_folder import drop_rows
from selftrain_d2.folder_lock import FolderLock


@pytest.fixture
def command(coco_set, tmp_path):
    """``command(*words)``: a teacher of two steps, a checkpoint each, in ``tmp_path / "output"``."""

    def build(*words, options=()):
        return [
            "train", *options, "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml",
            "--human-labels", "human", coco_set.json_file, coco_set.images, *SMALL_MODEL,
            "DATASETS.TRAIN", "('human',)", "DATASETS.TEST", "()", "INPUT.AUGMENTATION.IMAGE_SIZE", "64",
            "SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1", "OUTPUT_DIR", str(tmp_path / "output"), *words,
        ]  # fmt: skip

    return build


@pytest.fixture
def small_run(student_config):
    """A config of one small step."""
    student_config.INPUT.AUGMENTATION.IMAGE_SIZE = 64
    student_config.SOLVER.MAX_ITER = student_config.SOLVER.CHECKPOINT_PERIOD = 1
    return student_config


def _content(folder):
    return {
        f: f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name not in (".lock", "log.txt")
    }


def test_a_folder_of_a_run_is_kept_and_resumed_as_asked(command, tmp_path, capsys):
    output = tmp_path / "output"
    output.mkdir()
    (output / "metrics.json").write_text(
        '{"iteration": 19, "total_loss": 1.0}\n{"iterat'
    )  # of a run that was killed
    assert main(command()) == 0
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1]
    before = _content(output)

    # Another run does not mix its checkpoints and metrics with these, nor does one that is refused leave its config.
    refused = ["holds a run already (model_final.pth)", "--resume", "OUTPUT_DIR"]
    assert_refused(command(), capsys, *refused)
    assert_refused(command(options=["--dry-run"]), capsys, *refused)
    assert_refused(
        command("SOLVER.MAX_ITER", "1", options=["--resume"]),
        capsys,
        "has 2 steps, more than SOLVER.MAX_ITER 1",
    )
    assert_refused(
        command("MODEL.FPN.OUT_CHANNELS", "24", options=["--resume"]),
        capsys,
        "is of another model than this config's",
    )
    # detectron2 gives parameters of equal options one group: norm layers and the others here.
    assert_refused(
        command("SOLVER.MAX_ITER", "3", "SOLVER.WEIGHT_DECAY_NORM", "0.0001", options=["--resume"]),
        capsys,
        "The optimizer of the checkpoint in",
        "give the SOLVER keys that the run was begun with",
    )
    lock = FolderLock(output)
    assert_refused(command(options=["--resume"]), capsys, f"is being written by process {os.getpid()}")
    lock.close()
    assert _content(output) == before

    # The learning rate and its schedule are those asked for.
    options = ["SOLVER.MAX_ITER", "3", "SOLVER.BASE_LR", "0.004", "SOLVER.MOMENTUM", "0.5"]
    assert main(command(*options, options=["--resume"])) == 0
    assert "initial_lr 0.01 -> 0.004" in (output / "log.txt").read_text()
    final = torch.load(output / "model_final.pth", weights_only=True)
    group = final["trainer"]["_trainer"]["optimizer"]["param_groups"][0]
    assert (group["initial_lr"], group["momentum"]) == (0.004, 0.5) and final["iteration"] == 2
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    # Half a cosine: after 1 of 2 steps, and after 2 of 3.
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * 0.5, 0.004 * 0.25])
    assert "BASE_LR: 0.004" in (output / "config.yaml").read_text()


def test_evaluation_leaves_the_config_of_the_run(command, tmp_path):
    output = tmp_path / "output"
    assert main(command("SOLVER.MAX_ITER", "1")) == 0
    config = (output / "config.yaml").read_text()
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "DATASETS.TEST", "('human',)"]
    assert main(command(*weights, "SOLVER.BASE_LR", "0.5", options=["--eval-only"])) == 0
    assert (output / "config.yaml").read_text() == config


def test_results_without_a_checkpoint_are_not_overwritten(command, tmp_path, capsys):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "results.json").write_text("{}")
    assert_refused(
        command(options=["--resume"]), capsys, "holds a run already (results.json): choose another"
    )


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ([], "the same command with --resume goes on from the last checkpoint, if there is one"),
        (["--resume"], "the same command goes on from the last checkpoint, if there is one"),
        (["--eval-only"], "the same command starts the evaluation again"),
    ],
)
def test_ctrl_c_says_how_to_go_on(command, monkeypatch, capsys, options, way):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_net, "run", interrupted)
    assert main(command(options=options)) == 130
    assert capsys.readouterr().err == f"selftrain-d2 train: stopped; {way}\n"


def test_ctrl_c_promises_nothing_where_nothing_goes_on(tmp_path, monkeypatch, capsys):
    from selftrain_d2.cli import make_splits

    monkeypatch.setattr(make_splits, "run", lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["splits", "a.json", "--fractions", "1", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "selftrain-d2 splits: stopped\n"


def test_rows_of_steps_to_come_are_dropped(tmp_path):
    file = tmp_path / "metrics.json"
    rows = [
        {"iteration": 19, "total_loss": 1.0},
        {"iteration": 9, "bbox/AP": 1.0},
        {"iteration": 20, "bbox/AP": 2.0},  # the evaluation that ended 20 steps
        {"iteration": 20, "total_loss": 3.0},
        {"iteration": 39, "total_loss": 4.0},
        {"iteration": 12, "bbox/AP": 5.0},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(file, "a") as writer:  # detectron2's, open already
        drop_rows(file, 20)
        writer.write('{"iteration": 21}\n')
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert kept == [*rows[:3], rows[5], {"iteration": 21}]
    drop_rows(tmp_path / "none.json", 0)


# ---- runs that fail ----------------------------------------------------------------------------------


class _Fails(HookBase):
    """Fails in a phase; after that it fails again, as a hook does whose files are not there."""

    def __init__(self, phase):
        self.phase = phase

    def before_train(self):
        self._fail("before_train")

    def after_step(self):
        self._fail("after_step")

    def after_train(self):
        raise RuntimeError("a second failure")

    def _fail(self, phase):
        if phase == self.phase:
            raise InputError("the first failure")


@pytest.mark.parametrize("phase", ["before_train", "after_step"])
def test_a_failed_run_has_no_result_and_tells_the_first_failure(small_run, tmp_path, phase):
    """Its only step is the last, which detectron2's hooks take for the end of training."""
    small_run.SELFTRAIN.WEIGHT_EMA_DECAY = 0.5
    small_run.DATASETS.TEST = ("human",)
    trainer = SelfTrainingTrainer(small_run)
    ended = []
    closes = hooks.HookBase()
    closes.after_train = lambda: ended.append(True)
    trainer.register_hooks([closes])
    trainer._hooks.insert(0, _Fails(phase))
    with pytest.raises(InputError, match="the first failure"):
        trainer.train()
    assert ended, "other hooks end in order"
    assert not (tmp_path / "output" / "weight_average").exists()
    assert not hasattr(trainer, "_last_eval_results")


# ---- a full disk -------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """The system lets no file grow over 5 MB, which a checkpoint needs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_a_checkpoint_is_written(command, tmp_path, small_files, capsys):
    output = tmp_path / "output"
    message = f"{output / 'model_0000000.pth'} cannot be written (File too large): make room"
    assert_refused(command(), capsys, message)
    assert not [f.name for f in output.iterdir() if "pth" in f.name or f.name == "last_checkpoint"]
    small_files()  # with room, the same command goes on
    assert main(command("SOLVER.MAX_ITER", "1")) == 0


def test_a_full_disk_while_metrics_are_written(command, monkeypatch, capsys):
    def full(writer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("detectron2.utils.events.JSONWriter.write", full)
    assert_refused(command(), capsys, "output cannot be written (No space left on device): make room")


def test_a_log_on_a_full_disk_is_cut_short_in_silence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger("selftrain_d2"), "handlers", [])
    with log_to_file(tmp_path / "log.txt"):
        (handler,) = logging.getLogger("selftrain_d2").handlers
        handler.stream.close()
        handler.stream = open("/dev/full", "w")  # noqa: SIM115 (closed by the handler)
        logging.getLogger("selftrain_d2").info("lost")
    assert not capsys.readouterr().err


def test_what_a_killed_run_left_half_written_is_removed(command, tmp_path):
    output = tmp_path / "output"
    (output / "weight_average").mkdir(parents=True)
    left = [output / ".model_0000001.pth.4711", output / "weight_average" / ".model_final.pth.4711"]
    for file in left:
        file.write_bytes(b"half")
    (output / ".notes").write_text("mine")
    assert main(command("SOLVER.MAX_ITER", "1")) == 0
    assert not any(file.exists() for file in left) and (output / ".notes").exists()
