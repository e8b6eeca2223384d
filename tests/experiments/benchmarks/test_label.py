import os

import pytest
import torch

from selftrain_d2.experiments.benchmarks import label as benchmark


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "SIZE", 64)
    monkeypatch.setattr(benchmark, "IMAGES", 16)
    monkeypatch.setattr(benchmark, "FILES", 2)
    monkeypatch.setattr(benchmark, "BATCH", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_contestant_is_measured(small, monkeypatch):
    monkeypatch.setattr(benchmark, "_memory", lambda folder: {10: 400.0})
    results = benchmark.run(rounds=1)
    assert len(results["speed"]) == 10 and all(s["median"] > 0 for s in results["speed"].values())
    assert len(results["ratio"]) == 6
    speed, ratios = results["speed"], results["ratio"]
    for one, other in benchmark.COMPARED:
        expected = speed[one]["median"] / speed[other]["median"]
        assert ratios[f"{one} / {other}"]["median"] == pytest.approx(expected)
        assert f"{one} / {other}" in results["table"]
    assert ("| 10 images listed and labeled | 400.0 |" in results["table"]) == os.path.exists(
        "/proc/self/status"
    )


def test_contestants_do_the_same_work(small, tmp_path, monkeypatch):
    """Each shows every image to the detector once, in batches of the size it says."""
    photos, cfg = benchmark._photos(tmp_path), benchmark._config(tmp_path)
    seen, build = [], benchmark.build_model

    def built(cfg):
        detector = build(cfg)
        forward = detector.forward
        detector.forward = lambda inputs: (
            seen.append([x["image"].shape[1:] for x in inputs]) or forward(inputs)
        )
        return detector

    monkeypatch.setattr(benchmark, "build_model", built)
    monkeypatch.setattr("selftrain_d2.labeling.generate.build_model", built)
    batches = {}
    for name, contestant in benchmark._contestants(cfg, photos, tmp_path).items():
        seen.clear()
        contestant()
        batches[name] = [len(batch) for batch in seen]
        if "shapes" not in name:
            assert {tuple(shape) for batch in seen for shape in batch} == {(48, 64)}
    for name in (
        benchmark.TOOL,
        benchmark.TOOL_ALONE,
        benchmark.BARE,
        benchmark.BARE_READING,
        benchmark.PEERS[1],
    ):
        assert batches[name] == [4] * 4
    assert batches[benchmark.PEERS[0]] == [1] * 16
    assert batches["two shapes by turns, looking ahead"] == [4, 4]
    assert batches["two shapes by turns, as they come"] == [2] * 4
    assert sum(batches["eight shapes by turns, as they come"]) == 8


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="tells the memory on Linux alone")
def test_memory_is_that_of_a_process_that_labeled(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "LISTED", (40,))
    memory = benchmark._memory(tmp_path)
    assert list(memory) == [40] and 100 < memory[40] < 2000
