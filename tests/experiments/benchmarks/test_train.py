import pytest
import torch
from torch import nn

from selftrain_d2.experiments.benchmarks import train as benchmark_train


def test_multiply_adds_of_a_network_worked_out_by_hand():
    class Model(nn.Module):
        head_in_features = ("p",)

        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
            self.backbone.forward = lambda x: {"p": self.backbone[0](x)}
            self.head = nn.ModuleList([nn.Conv2d(8, 4, 1)])
            self.head.forward = lambda features: self.head[0](features[0])
            self.device = torch.device("cpu")

    # 16 x 16 pixels: 3 * 8 * 9 in the first convolution, 8 * 4 in the second
    assert benchmark_train._multiply_adds(Model(), 16) == 16 * 16 * (3 * 8 * 9 + 8 * 4)


def test_every_contestant_is_measured(monkeypatch):
    monkeypatch.setattr(benchmark_train, "CPU_SIZE", 64)
    monkeypatch.setattr(benchmark_train, "CPU_IMAGES", {"efficientnet-b0": 2})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = benchmark_train.run(rounds=1)
    speeds = results["speed"]["efficientnet-b0"]
    assert len(speeds) == 5 and all(s["median"] > 0 for s in speeds.values())
    assert results["time_ratio"]["efficientnet-b0"][benchmark_train.SUPERVISED]["median"] == 1
    moving = benchmark_train.MOVING_TEACHER
    shown = results["moving_teacher_ratio"]["efficientnet-b0"]["median"]
    one_step = speeds[benchmark_train.ONE_FORWARD]["median"]
    assert shown == pytest.approx(one_step / speeds[moving]["median"])  # of one round
    assert f"takes {shown:.2f}" in results["table"]
    rates = results["tflops"]["efficientnet-b0"]
    # The same network on the same images: rates differ as speeds do.
    one, two = benchmark_train.ONE_FORWARD, benchmark_train.TWO_FORWARDS
    assert rates[one] / rates[two] == pytest.approx(speeds[one]["median"] / speeds[two]["median"])
    assert all(key in results["table"] for key in speeds)
    memory = results["memory_gib"]["efficientnet-b0"]
    assert memory[two] < 0.7 * memory[one]  # an image at a time
    assert memory[one] == pytest.approx(memory[benchmark_train.SUPERVISED], rel=0.05)


def test_memory_kept_for_backward_worked_out_by_hand():
    weight = nn.Parameter(torch.ones(1000))
    inputs = torch.ones(1000)

    def step():
        hidden = inputs * weight  # keeps the inputs: 4 kB
        (hidden.exp().sum()).backward()  # exp keeps its output: 4 kB more; the parameter does not count

    assert benchmark_train._kept_for_backward(step) * 2**30 == 8000
