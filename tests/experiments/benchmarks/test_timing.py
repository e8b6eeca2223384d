"""The frame of the benchmarks, and that its augmentation contestants do the same work."""

import itertools
import json
import time

import pytest
import torch
from detectron2.structures import Instances

from selftrain_d2.cli import main
from selftrain_d2.experiments.benchmarks import augmentation as benchmark_augmentation
from selftrain_d2.experiments.benchmarks.timing import machine, markdown_table, ratio, spread, time_in_turns


def test_ratios_are_taken_within_rounds():
    # The machine gets slower from round to round; the ratio stays.
    speeds = {"a": [100.0, 50.0, 10.0], "b": [50.0, 25.0, 5.0]}
    assert ratio(speeds, "a", "b") == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_contestants_take_turns():
    calls = []

    def contestant(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)

        return call

    contestants = {"slow": contestant("slow", 0.02), "fast": contestant("fast", 0.002)}
    speeds = time_in_turns(contestants, items=10, rounds=4)
    assert calls[:2] == ["slow", "fast"]  # once each, unmeasured
    assert all(sorted(calls[i : i + 2]) == ["fast", "slow"] for i in range(2, 10, 2))
    assert [len(v) for v in speeds.values()] == [4, 4]
    assert max(speeds["slow"]) <= 10 / 0.02 and min(speeds["fast"]) > max(speeds["slow"])


def test_clock_is_the_one_given():
    ticks = itertools.count(step=2)
    speeds = time_in_turns({"a": lambda: None}, items=10, rounds=3, clock=lambda: next(ticks))
    assert speeds == {"a": [5.0, 5.0, 5.0]}


def test_markdown_table():
    assert markdown_table(["x", "y"], [["a", "1"]]) == "| x | y |\n| --- | ---: |\n| a | 1 |"


def test_machine_is_described():
    assert {"cpu", "cores", "python", "torch"} <= set(machine())


def pixels_and_boxes(result):
    """The image (3, H, W) and the boxes of any contestant's sample."""
    if isinstance(result, dict):
        return result["image"], result["instances"].gt_boxes.tensor
    image, labels = result
    return torch.as_tensor(image), torch.as_tensor(labels["boxes"] if isinstance(labels, dict) else labels)


@pytest.mark.parametrize("make", ["_from_files", "_from_memory"])
def test_all_contestants_make_samples_of_the_same_kind(tmp_path, make):
    records = benchmark_augmentation.make_records(tmp_path, number=1)
    assert all(len(record["annotations"]) == benchmark_augmentation.BOXES for record in records)
    contestants = getattr(benchmark_augmentation, make)(records)
    compared = {name for pair in benchmark_augmentation.COMPARED for name in pair}
    assert compared <= set(contestants)
    for name, contestant in contestants.items():
        (result,) = contestant()
        if name.startswith("decode only"):
            assert result.shape == (750, 1000, 3)
            continue
        image, boxes = pixels_and_boxes(result)
        assert image.dtype == torch.uint8 and image.shape == (3, 640, 640), name
        assert boxes.shape[1] == 4 and (boxes >= 0).all() and (boxes <= 640).all(), name
        assert image.float().std() > 1, name
        assert not isinstance(result, dict) or isinstance(result["instances"], Instances)


def test_command(tmp_path, capsys, monkeypatch):
    # The real task takes a minute; one record is enough to see the command work.
    make_records = benchmark_augmentation.make_records
    monkeypatch.setattr(
        benchmark_augmentation, "make_records", lambda folder, number: make_records(folder, 1)
    )
    output = tmp_path / "figures" / "augmentation.json"
    assert main(["benchmark", "--task", "augmentation", "--rounds", "2", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(output.read_text())
    for kind in ("decode included", "decode excluded"):
        assert kind in printed
        speed, ratios = figures["speed"][kind], figures["ratio"][kind]
        assert {"S1", "S2", "S3", "S4"} <= set(speed)
        assert all(0 < v["min"] <= v["median"] <= v["max"] for v in [*speed.values(), *ratios.values()])
    assert torch.get_num_threads() == 1
    assert "S4 / S1" in printed and figures["machine"]["torch"] == torch.__version__
    with pytest.raises(SystemExit):
        main(["benchmark", "--task", "augmentation", "--rounds", "0"])
