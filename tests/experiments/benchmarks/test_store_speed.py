import mmap
import os

from selftrain_d2.experiments.benchmarks import store as benchmark_pseudo_label_store
from selftrain_d2.experiments.benchmarks.records import own_memory, records


def test_table_and_figures(monkeypatch):
    monkeypatch.setattr(benchmark_pseudo_label_store, "IMAGES", 3000)
    # Fresh processes would take seconds to start; they only matter for the memory figures.
    monkeypatch.setattr(
        benchmark_pseudo_label_store, "_in_fresh_process", lambda f, *arguments: f(*arguments)
    )
    results = benchmark_pseudo_label_store.run(2)
    written, loaded = results["written"], results["loaded"]
    assert written["boxes"] == _boxes(0.05) and loaded["boxes"] == _boxes(0.5)
    assert 2.7 < loaded["boxes"] / 3000 < 3.3  # as wanted: 3 boxes an image
    assert written["megabytes"] > 0.1 and written["seconds"] > 0 and written["resume_seconds"] > 0
    assert len(loaded["load_seconds"]) == len(loaded["verify_seconds"]) == 2
    assert loaded["epoch_seconds"] > 0 and loaded["epoch_seconds_2_workers"] > 0
    assert loaded["resident"] > loaded["growth"]
    assert f"{loaded['boxes']} boxes" in results["table"]
    assert "100000000 images by these rates, not measured" in results["table"]


def _boxes(threshold):
    names = [f"{i}.jpg" for i in range(3000)]
    rows = [row for shard in range(12) for row in records(names[256 * shard : 256 * (shard + 1)], shard)]
    return sum(int((row["scores"] >= threshold).sum()) for row in rows)


def test_own_memory_of_a_process():
    # Mapped, not allocated: an allocator may serve and keep 50 MB from what the process already holds.
    with mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as content:
        content.write(b"x" * len(content))
        before = own_memory(os.getpid())
    assert before > 50
    assert own_memory(os.getpid()) < before - 40
