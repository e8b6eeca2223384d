from selftrain_d2.experiments.benchmarks import export


def test_every_contestant_is_timed(monkeypatch):
    monkeypatch.setattr(export, "SIZE", 96)
    results = export.run(rounds=1)
    assert results["time_ratio"]["PyTorch"]["median"] == 1
    assert all(results["speed"][name]["median"] > 0 for name in ("TorchScript", "ONNX Runtime"))
