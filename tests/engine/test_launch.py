import pytest
import torch

from selftrain_d2 import SelfTrainingTrainer
from selftrain_d2.engine.launch import train


@pytest.mark.parametrize("benchmark", [True, False])
def test_cudnn_benchmark_is_set_while_training(student_config, monkeypatch, benchmark):
    seen = []
    monkeypatch.setattr(
        SelfTrainingTrainer, "train", lambda self: seen.append(torch.backends.cudnn.benchmark)
    )
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not benchmark)
    student_config.CUDNN_BENCHMARK = benchmark
    train(student_config)
    assert seen == [benchmark]
    assert (
        torch.backends.cudnn.benchmark is not benchmark
    )  # labeling and other runs in this process go without
