import os

import numpy as np
import pytest

from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels.shards import SCHEMA
from selftrain_d2.experiments.benchmarks import writers
from selftrain_d2.experiments.benchmarks.records import ImageNames, records


def test_every_record_is_written_once_and_verified():
    figures = writers.run(images=3000, processes=3)
    of_writers = figures["writers"]
    assert sum(w["shards"] for w in of_writers) == figures["files"] == 12  # of 256 images
    # Made anew here, shard by shard.
    shards = (range(first, min(first + 256, 3000)) for first in range(0, 3000, 256))
    rows = [row for i, shard in enumerate(shards) for row in records([ImageNames(3000)[n] for n in shard], i)]
    assert figures["boxes"] == sum(w["boxes"] for w in of_writers) == sum(len(row["scores"]) for row in rows)
    assert 9.5 < figures["boxes"] / 3000 < 10.5
    assert all(w["megabytes"][-1][1] > 0 and w["cpu_seconds"] > 0 for w in of_writers if w["shards"])
    assert f"{figures['boxes']:,} boxes found are those written" in figures["table"]


def test_growth_is_that_of_each_writer_by_itself():
    """Two writers of other sizes and other speeds, whose memory grows by 2 MB a shard; the first tenth is noise."""
    grown = [
        {"shards": 40, "megabytes": [[1, 99.0], [4, 20.0], [20, 52.0], [40, 92.0]]},
        {"shards": 10, "megabytes": [[1, 70.0], [5, 78.0], [10, 88.0]]},
    ]
    assert writers._growth(grown) == pytest.approx(2e6 / 256)
    flat = [
        {"shards": 40, "megabytes": [[1, 9.0], [4, 20.0], [40, 20.0]]},
        {"shards": 1, "megabytes": [[1, 7.0]]},
    ]
    assert writers._growth(flat) == 0 and writers._growth([flat[1]]) == 0
    assert writers._megabytes_at(grown[0], 0.1) == 20.0 and writers._megabytes_at(grown[0], 0.5) == 52.0


def test_a_writer_that_dies_is_told(monkeypatch):
    monkeypatch.setattr(writers, "_work", lambda *arguments: os._exit(3))
    with pytest.raises(RuntimeError, match=r"exit codes \[3\]"):
        writers.run(images=300, processes=2)


def test_what_is_found_is_compared_with_what_was_written(monkeypatch):
    work = writers._work

    def forgetful(writer, taken, total, processes, results):
        class Results:
            put = staticmethod(lambda figures: results.put({**figures, "boxes": figures["boxes"] - 1}))

        work(writer, taken, total, processes, Results)

    monkeypatch.setattr(writers, "_work", forgetful)
    with pytest.raises(RuntimeError, match="boxes were found"):
        writers.run(images=300, processes=1)


def test_names_and_records():
    names = ImageNames(2_000_000)
    assert len(names) == 2_000_000 and names[1_234_567] == "train/0567/image_001234567.jpg"
    assert list(ImageNames(2)) == ["train/0000/image_000000000.jpg", "train/0001/image_000000001.jpg"]
    rows = list(records(list(ImageNames(500)), seed=1))
    scores = np.concatenate([row["scores"] for row in rows])
    assert 0.25 < (scores >= 0.5).mean() < 0.35 and scores.min() >= 0.05 and scores.max() <= 1
    for row in rows:
        assert len(row["boxes"]) == 4 * len(row["scores"]) == 4 * len(row["category_ids"])
        x0, y0, x1, y1 = row["boxes"].reshape(-1, 4).T
        assert (x0 >= 0).all() and (x1 > x0).all() and (x1 <= 640).all() and (y1 > y0).all()
    assert {len(row) for row in rows} == {len(SCHEMA)}


def test_sizes_belong_to_this_task(capsys):
    assert main(["benchmark", "--task", "store", "--images", "3"]) == 2
    assert "--images goes with --task writers" in capsys.readouterr().err
