"""Training in two processes on the CPU (gloo), started by detectron2's launch and by torchrun."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL, assert_refused, make_coco_set
from detectron2.utils import comm
from machines import ROOT, Machines

from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.engine import children
from selftrain_d2.engine.kept_checkpoints import best_of
from selftrain_d2.engine.process_group import Processes, run_in_processes
from selftrain_d2.engine.step_trainer import NonFiniteLossError, StepTrainer
from selftrain_d2.errors import InputError


@pytest.fixture
def arguments(tmp_path):
    """``arguments(output, *options)`` of `train`: nothing but the number of processes differs between runs.

    Batch norm is frozen, and nothing is drawn at random in the model. Of the two pseudo images of a step one
    has no box, so a process of two has none. Five images are evaluated, which two processes share unevenly.
    """
    coco = make_coco_set(tmp_path / "coco", 5, seed=0)
    identity = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": coco.images}
    writer = PseudoLabelWriter(tmp_path / "pseudo", identity, ["001.png", "002.png"])
    row = make_row("001.png", 96, 96, [[10, 10, 60, 60]], [0.9], [0])
    writer.write_shard(0, [row, make_row("002.png", 96, 96)])
    writer.finish()

    def build(output, *options):
        return [
            "--config-file", "Base-RetinaNet-EfficientNet-FPN.yaml",
            "--human-labels", "human", coco.json_file, coco.images,
            "--pseudo-labels", "pseudo", str(tmp_path / "pseudo"), *options[:2 * ("--num-gpus" in options)],
            *SMALL_MODEL, "DATASETS.TRAIN", "('human',)", "DATASETS.PSEUDO_TRAIN", "('pseudo',)",
            "DATASETS.TEST", "('human',)", "TEST.EVAL_PERIOD", "2",
            "SOLVER.IMS_PER_BATCH", "4", "SOLVER.PSEUDO_IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "5",
            "SOLVER.CHECKPOINT_PERIOD", "2",
            "MODEL.EFFICIENTNET.NORM", "FrozenBN", "MODEL.EFFICIENTNET.DROP_CONNECT_RATE", "0.0",
            "MODEL.FPN.OUTPUT_NORM", "", "MODEL.RETINANET.NORM", "",
            "MODEL.RETINANET.NORM_AFFINE_PER_LEVEL", "False",
            "OUTPUT_DIR", str(output), *options[2 * ("--num-gpus" in options):],
        ]  # fmt: skip

    return build


def _checkpoint(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def _assert_same_training(one, other, steps=5):
    a, b = _checkpoint(one), _checkpoint(other)
    for name in a["model"]:
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=1e-3, atol=1e-5, msg=name)
    averages = [x["trainer"]["hooks"]["LossNormalizer"] for x in (a, b)]
    assert averages[0] == pytest.approx(averages[1], rel=1e-4) and averages[0]["steps"] == steps
    positives = [x["trainer"]["hooks"]["RunState"]["positive_anchor_averages"] for x in (a, b)]
    for source, average in positives[0].items():
        assert positives[1][source] == pytest.approx(average)


def _levels(*sizes):
    """Anchors on so many levels from P3 on."""
    names = [f"p{level}" for level in range(3, 3 + len(sizes))]
    anchors = str([[size] for size in sizes])
    return "MODEL.RETINANET.IN_FEATURES", str(names), "MODEL.ANCHOR_GENERATOR.SIZES", anchors


@pytest.mark.parametrize(
    ("normalizer", "levels"),
    # The second without P6 and P7, as aerial_digits/lite0_128.yaml.
    [("batch", _levels(32, 64, 128, 256, 512)), ("moving_average", _levels(16, 32, 64))],
)
def test_two_processes_train_as_one_with_their_images(arguments, tmp_path, normalizer, levels):
    key = ("MODEL.RETINANET.LOSS_NORMALIZER", normalizer, *levels)
    key += ("TEST.VALIDATION_LOSS", "True", "TEST.BEST_METRIC", "validation/loss")
    assert main(["train", *arguments(tmp_path / "one", *key)]) == 0
    assert main(["train", *arguments(tmp_path / "two", "--num-gpus", "2", *key)]) == 0
    _assert_same_training(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "log.txt.rank1").exists()
    results = [json.loads((tmp_path / x / "results.json").read_text()) for x in ("one", "two")]
    for task in ("bbox", "validation"):
        assert results[0][task].keys() == results[1][task].keys()
    # Two processes count one of the five images twice.
    assert results[0]["validation"]["loss"] == pytest.approx(results[1]["validation"]["loss"], rel=0.2)
    assert best_of(tmp_path / "two")["steps"] == best_of(tmp_path / "one")["steps"]


@pytest.mark.slow
def test_last_steps_on_human_labels_in_two_processes(arguments, tmp_path):
    """Their losses have other names than those before: in every process at once."""
    refine = (
        *_levels(16, 32, 64),
        "SELFTRAIN.REFINE_ITERS",
        "2",
        "SOLVER.MAX_ITER",
        "4",
        "DATASETS.TEST",
        "()",
    )
    assert main(["train", *arguments(tmp_path / "one", *refine)]) == 0
    assert main(["train", *arguments(tmp_path / "two", "--num-gpus", "2", *refine)]) == 0
    _assert_same_training(tmp_path / "one", tmp_path / "two", steps=2)


@pytest.mark.slow
def test_parameters_without_gradient_are_refused(arguments, tmp_path, capfd):
    """P5's last convolution, which P3 and P4 do not need."""
    assert main(["train", *arguments(tmp_path / "run", "--num-gpus", "2", *_levels(16, 32))]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "No loss depends on 2 parameters" in error and "(backbone.fpn_output5.weight" in error
    assert not list((tmp_path / "run").glob("*.pth"))


# One process is killed in the fourth step, after the checkpoint of two steps and that of four.
_KILLED = """
if attempt == 0 and rank == 1:
    from selftrain_d2.engine.resume import RunState
    before_step = RunState.before_step
    def die(self):
        if self.trainer.iter == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        before_step(self)
    RunState.before_step = die
"""


def _resumed_at(folder):
    return [
        line.split()[-1] for line in (folder / "log.txt").read_text().splitlines() if "from iteration" in line
    ]


def test_torchrun_is_the_same_and_goes_on_when_a_process_was_killed(arguments, tmp_path):
    command = ["train", *arguments(tmp_path / "run")]
    with Machines(tmp_path, command, number=1, change=_KILLED, restarts=1) as machine:
        assert machine.wait() == [0], machine.output()
    assert _resumed_at(tmp_path / "run") == ["0", "2"]
    assert main(["train", *arguments(tmp_path / "one")]) == 0
    _assert_same_training(tmp_path / "one", tmp_path / "run")

    # One process goes on with what two have begun, and ends where they did.
    final = _checkpoint(tmp_path / "run")["model"]
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    assert main(["train", "--resume", *arguments(tmp_path / "run")]) == 0
    assert _resumed_at(tmp_path / "run") == ["0", "2", "2"]
    again = _checkpoint(tmp_path / "run")["model"]
    for name in final:
        torch.testing.assert_close(again[name], final[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("again", [True, False], ids=["and started again", "and the other goes on"])
def test_a_machine_is_killed_in_training(arguments, tmp_path, again):
    keys = ("SOLVER.PSEUDO_IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "16", "DATASETS.TEST", "()")
    slowly = "from selftrain_d2.engine.step_trainer import StepTrainer\nstep = StepTrainer.run_step\n"
    slowly += "StepTrainer.run_step = lambda self: (time.sleep(0.5), step(self))"
    number = 2 if again else "1:2"
    command = ["train", *arguments(tmp_path / "run", *keys)]
    with Machines(tmp_path, command, number=number, change=slowly, restarts=3) as machines:
        while not (tmp_path / "run" / "model_0000003.pth").exists():
            assert machines.agents[0].poll() is None, machines.output()  # it has not failed
            time.sleep(0.05)
        machines.kill(1)
        if again:
            machines.start_again(1)
            assert machines.wait() == [0, 0], machines.output()
        else:
            assert machines.agents[0].wait(1800) == 0, machines.output()
    first, second = _resumed_at(tmp_path / "run")
    assert first == "0" and int(second) >= 4
    assert main(["train", *arguments(tmp_path / "one", *keys)]) == 0
    _assert_same_training(tmp_path / "one", tmp_path / "run", steps=16)


def test_a_mistake_in_a_child_process_stays_one_sentence(arguments, tmp_path, capfd):
    command = ["train", *arguments(tmp_path / "output", "--num-gpus", "2", "SOLVER.IMS_PER_BATCH", "3")]
    assert main(command) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "selftrain-d2 train: error" in line]
    assert len(lines) == 1 and "SOLVER.IMS_PER_BATCH = 3 does not divide" in lines[0]


class _OneLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        loss = self.weight * batch[0]["value"]
        self.raw_losses = {"human": loss.detach(), "pseudo": None}
        return {"loss": loss}


def _loss_of_the_second_is_nan():
    rank = comm.get_rank()
    model, batch = _OneLoss(), [{"file_name": f"image_{rank}.png", "value": float("nan") if rank else 1.0}]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    StepTrainer(model, [batch], optimizer, save_batch=lambda *_: f"saved_{rank}.pth").train(0, 1)


def test_every_process_says_where_a_loss_was_not_finite():
    message = r"at step 0, for human labels \(loss nan\)\. Images: image_1\.png; the batch is saved in saved_1\.pth\.$"
    with pytest.raises(NonFiniteLossError, match=message):
        run_in_processes(_loss_of_the_second_is_nan, Processes(num_gpus=2), ())


def _end_with_a_collective():
    """Without a pause in which another thread could give its tensors back, until this one waits for something."""
    sys.setswitchinterval(1000)
    torch.distributed.broadcast_object_list([None])


def test_processes_that_end_right_after_a_collective():
    """gloo's threads outlived the interpreter: every third of such processes was aborted."""
    for _ in range(3):
        run_in_processes(_end_with_a_collective, Processes(num_gpus=2), ())


def test_processes_of_torchrun_that_end_right_after_a_collective(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "from test_processes import _end_with_a_collective\n"
        "from selftrain_d2.engine.process_group import main_process_leads, run_in_processes\n"
        "run_in_processes(_end_with_a_collective, None, (), 'cpu')\n"
        "with main_process_leads('cpu') as leads:\n"
        "    if leads:\n"
        "        run_in_processes(_end_with_a_collective, None, (), 'cpu')\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*torchrun, str(program)], check=True, env=environment, timeout=600)


def _wait(folder):
    (Path(folder) / f"{os.getpid()}.{torch.distributed.get_backend()}").touch()
    time.sleep(120)


def test_processes_end_with_their_parent_and_cpu_tensors_have_gloo(tmp_path, monkeypatch):
    """On a machine with one GPU, as it seems to this process. Only it is interrupted, not its children."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    requests = tuple((request, seconds / 10) for request, seconds in children.REQUESTS)
    monkeypatch.setattr(children, "REQUESTS", requests)

    def interrupt():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_in_processes(_wait, Processes(num_gpus=2), (str(tmp_path),), device="cpu")
    for name in os.listdir(tmp_path):
        pid, backend = name.split(".")
        assert backend == "gloo"
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.mark.parametrize(
    ("device", "processes", "message"),
    [
        ("cuda", Processes(num_gpus=5), "--num-gpus is 5, this machine has 4"),
        (
            "cuda:1",
            Processes(num_gpus=2),
            "MODEL.DEVICE is cuda:1, but each of several processes needs a GPU",
        ),
        ("cuda:1", Processes(num_machines=2, dist_url="tcp://a:1"), "MODEL.DEVICE is cuda:1"),
    ],
)
def test_gpus_of_several_processes(monkeypatch, device, processes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match=message):
        run_in_processes(print, processes, (), device)


def test_one_process_may_name_its_gpu():
    ran = []
    run_in_processes(ran.append, Processes(), ("here",), "cuda:1")
    assert ran == ["here"]


def test_one_gpu_for_several_processes_is_refused_before_training(arguments, tmp_path, capsys):
    options = ("MODEL.DEVICE", "cuda:1", "DATASETS.TEST", "()")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        for more in ((), ("--dry-run",)):
            command = ["train", *more, *arguments(tmp_path / "run", "--num-gpus", "2", *options)]
            assert_refused(command, capsys, "MODEL.DEVICE is cuda:1", output=tmp_path / "run")


def test_several_machines_need_an_address():
    with pytest.raises(InputError, match="--dist-url"):
        run_in_processes(print, Processes(num_machines=2), ())


def test_a_teacher_that_keeps_learning_is_the_same_in_two_processes(arguments, tmp_path, capfd):
    def command(output, *options):
        words = arguments(tmp_path / output, *options)
        at = words.index("--pseudo-labels")
        words[at : at + 3] = ["--unlabeled-images", "pseudo", str(tmp_path / "coco" / "images")]
        return ["train", *words]

    keys = ["SELFTRAIN.TEACHER", "moving_average", "MODEL.WEIGHTS", str(tmp_path / "teacher.pth")]
    keys += ["SELFTRAIN.SCORE_THRESH", "0.011", "SELFTRAIN.TEACHER_CHECK_PERIOD", "2"]
    assert main(["train", *arguments(tmp_path / "first"), "SOLVER.MAX_ITER", "1"]) == 0
    (tmp_path / "first" / "model_final.pth").rename(tmp_path / "teacher.pth")
    assert main(command("one", *keys)) == 0
    assert main(command("two", "--num-gpus", "2", *keys)) == 0
    _assert_same_training(tmp_path / "one", tmp_path / "two")
    teachers = [
        torch.load(tmp_path / name / "moving_teacher" / "model_final.pth", weights_only=True)["model"]
        for name in ("one", "two")
    ]
    for name, value in teachers[0].items():
        torch.testing.assert_close(value, teachers[1][name], rtol=1e-3, atol=1e-5, msg=name)
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.json").read_text().splitlines()]
    assert any("teacher_agreement" in row for row in rows)
