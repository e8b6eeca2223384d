import builtins

import pytest
import torch

from selftrain_d2.cli import main
from selftrain_d2.errors import InputError
from selftrain_d2.experiments.benchmarks import backbone as benchmark_backbone
from selftrain_d2.experiments.benchmarks.efficientdet import effdets_detector, our_detector


@pytest.fixture
def tiny(monkeypatch):
    """``tiny(name, size)``: the benchmark has this model alone, one or two images of it."""

    def change(name, size, batch=1):
        monkeypatch.setattr(benchmark_backbone, "BATCHES", {name: (batch, batch)})
        monkeypatch.setattr(benchmark_backbone, "GPU_SIZE", size)
        monkeypatch.setattr(benchmark_backbone, "CPU_SIZE", size)

    return change


def test_table_and_figures(tiny):
    tiny("efficientnet-b0", 64)
    results = benchmark_backbone.run(2)
    forward, train = (results["speed"]["efficientnet-b0"][p] for p in ("forward", "forward + backward"))
    assert {"ours", "timm", "ours, fused"} <= forward.keys()
    assert all(value["min"] > 0 for value in (*forward.values(), *train.values()))
    ratios = results["time_ratio"]["efficientnet-b0"]["forward"]
    assert "timm" not in ratios
    assert f"{ratios['ours']['median']:.2f}" in results["table"]
    assert len(results["table"].splitlines()) == 2 + len(forward) + len(train)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), [("spinenet-49s", "R50-FPN"), ("efficientdet-d0", "effdet")])
def test_beside_the_other(name, other, tiny):
    tiny(name, 128, batch=2)
    results = benchmark_backbone.run(1)
    for phase in ("forward", "forward + backward"):
        speeds, ratios = (results[key][name][phase] for key in ("speed", "time_ratio"))
        assert other in speeds and other not in ratios
        measured = speeds[other]["median"] / speeds["ours"]["median"]
        assert ratios["ours"]["median"] == pytest.approx(measured)


def test_efficientdets_do_the_same_work():
    """Outputs of the same shapes, from as many parameters."""
    ours = our_detector("efficientdet-d0", "cpu").eval()
    other = effdets_detector("efficientdet-d0", 128).eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in other.parameters())
    images = torch.zeros(1, 3, 128, 128)
    with torch.no_grad():
        shapes = [[[level.shape for level in kind] for kind in model(images)] for model in (ours, other)]
    assert shapes[0] == shapes[1]
    assert shapes[0][0] == [(1, 9 * 80, side, side) for side in (16, 8, 4, 2, 1)]


def test_a_model_it_does_not_have():
    with pytest.raises(InputError, match="efficientdet-d9: this benchmark has efficientnet-b0"):
        benchmark_backbone.run(1, models=["efficientdet-d9"])


def test_models_go_with_this_task(capsys):
    assert main(["benchmark", "--task", "train", "--models", "spinenet-49"]) == 2
    assert "--models goes with --task backbone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "model"), [("timm", "efficientnet-b0"), ("effdet.config", "efficientdet-d0")]
)
def test_needs_the_other(package, model, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=f"pip install {package.partition('.')[0]}"):
        benchmark_backbone.run(1, models=[model])
