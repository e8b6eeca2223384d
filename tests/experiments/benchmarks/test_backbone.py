import builtins

import pytest

from selftrain_d2.errors import InputError
from selftrain_d2.experiments.benchmarks import backbone as benchmark_backbone


def test_table_and_figures(monkeypatch):
    monkeypatch.setattr(benchmark_backbone, "BATCHES", {"efficientnet-b0": (1, 1)})
    monkeypatch.setattr(benchmark_backbone, "GPU_SIZE", 64)
    monkeypatch.setattr(benchmark_backbone, "CPU_SIZE", 64)
    results = benchmark_backbone.run(2)
    forward, train = (results["speed"]["efficientnet-b0"][p] for p in ("forward", "forward + backward"))
    assert {"ours", "timm", "ours, fused"} <= forward.keys()
    assert all(value["min"] > 0 for value in (*forward.values(), *train.values()))
    ratios = results["time_ratio"]["efficientnet-b0"]["forward"]
    assert "timm" not in ratios
    assert f"{ratios['ours']['median']:.2f}" in results["table"]
    assert len(results["table"].splitlines()) == 2 + len(forward) + len(train)


def test_spinenet_beside_detectron2s_pyramid(monkeypatch):
    monkeypatch.setattr(benchmark_backbone, "BATCHES", {"spinenet-49s": (2, 2)})
    monkeypatch.setattr(benchmark_backbone, "GPU_SIZE", 128)
    monkeypatch.setattr(benchmark_backbone, "CPU_SIZE", 128)
    results = benchmark_backbone.run(1)
    for phase in ("forward", "forward + backward"):
        speeds, ratios = (results[key]["spinenet-49s"][phase] for key in ("speed", "time_ratio"))
        assert "R50-FPN" in speeds and "R50-FPN" not in ratios
        measured = speeds["R50-FPN"]["median"] / speeds["ours"]["median"]
        assert ratios["ours"]["median"] == pytest.approx(measured)


def test_needs_timm(monkeypatch):
    real = builtins.__import__

    def without_timm(name, *args, **kwargs):
        if name == "timm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(InputError, match="pip install timm"):
        benchmark_backbone.run(1)
